"""Sources: one modality as the user gave it, before any of its values is checked."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyromosaic.data.matrix import Matrix, Stacked, is_readable
from pyromosaic.data.spec import ModalitySchema, ModalitySpec

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


@dataclass
class _Source:
    """One modality as the user gave it: measurements, names, and the table of its cells."""

    matrix: Any
    cells: pd.Index
    features: pd.Index
    obs: pd.DataFrame
    measured: np.ndarray | None = None  # rows that are not holes; None for all
    exposures: Any = None
    panels: tuple[np.ndarray, np.ndarray] | None = None  # features of each panel, panel of each row; None: all


def _words(names: Any) -> str:
    """All names, in quotes, for a message."""
    return ", ".join(repr(str(n)) for n in names) or "none"


def _some(names: Collection[str]) -> str:
    """The first three names, in quotes, for a message."""
    return _words(sorted(names)[:3]) + (", …" if len(names) > 3 else "")


def _first_duplicate(names: pd.Index) -> str:
    return str(names[names.duplicated()][0])


def _obs(name: str, data: "AnnData | MuData") -> pd.DataFrame:
    """The `obs` of the data, which must be in memory."""
    if not isinstance(data.obs, pd.DataFrame):
        raise ValueError(
            f"modality {name!r} was opened by read_lazy; accepted: anndata.read_h5ad(path), "
            'or anndata.read_h5ad(path, backed="r"), which leaves the measurements in the file'
        )
    return data.obs


def _source(name: str, adata: "AnnData | Sequence[AnnData]", spec: ModalitySpec, prefix: str = "") -> _Source:
    if isinstance(adata, Sequence):
        return _stacked(name, [_source(name, part, spec, prefix) for part in adata])
    obs = _obs(name, adata)
    for layer in (spec.layer, spec.exposure_layer):
        if layer is not None and layer not in adata.layers:
            raise ValueError(
                f"modality {name!r}: there is no layer {layer!r}; it has {_words(set(adata.layers) - {None})}"
            )
    matrix = adata.X if spec.layer is None else adata.layers[spec.layer]
    if matrix is None:
        raise ValueError(f"modality {name!r}: X is empty; name the layer that holds the values")
    cells = adata.obs_names if not prefix else pd.Index(prefix + adata.obs_names.astype(str))
    exposures = None if spec.exposure_layer is None else adata.layers[spec.exposure_layer]
    return _Source(matrix, cells, adata.var_names, obs, exposures=exposures)


def _stacked(name: str, parts: list[_Source]) -> _Source:
    """Cells of several tables, which may have other features: a panel for each table."""
    for part in parts:
        _check_source(name, part, None)
    names = [part.features.astype(str) for part in parts]
    features = pd.Index(np.concatenate(names)).unique()
    columns = [own.get_indexer(features) for own in names]
    sources = [Stacked([Matrix(part.matrix, c) for part, c in zip(parts, columns, strict=True)])]
    if parts[0].exposures is not None:
        sources += [Stacked([Matrix(part.exposures, c) for part, c in zip(parts, columns, strict=True)])]
    masks = np.stack([c >= 0 for c in columns])
    panel = np.repeat(np.arange(len(parts)), [len(part.cells) for part in parts])
    return _Source(
        sources[0],
        pd.Index(np.concatenate([np.asarray(part.cells) for part in parts])),
        features,
        pd.concat([part.obs for part in parts]),
        exposures=sources[1] if len(sources) > 1 else None,
        panels=None if masks.all() else (masks, panel),
    )


def _absent(known: ModalitySchema) -> _Source:
    """Empty data for a modality of the model that no cell has."""
    names = pd.Index([], dtype=object)
    matrix = np.zeros((0, known.n_features), dtype=np.float32)
    return _Source(matrix, names, pd.Index(known.features), pd.DataFrame(index=names))


def _block(name: str, key: str | None, adata: "AnnData", obs: pd.DataFrame, spec: ModalitySpec) -> _Source:
    """One modality in `X` (without a key) or in `obsm`."""
    if key is None:
        source = _source(name, adata, spec)
    elif key not in adata.obsm:
        raise ValueError(f"modality {name!r}: obsm has no key {key!r}; it has {_words(adata.obsm.keys())}")
    elif (layer := spec.layer or spec.exposure_layer) is not None:
        raise ValueError(f"modality {name!r}: obsm has no layers, but its ModalitySpec names {layer!r}; leave it out")
    else:
        values: Any = adata.obsm[key]
        features = pd.Index([f"{name}_{i}" for i in range(values.shape[1])])
        if isinstance(values, pd.DataFrame):
            features, nullable = values.columns.astype(str), values.to_numpy().dtype == object
            numbers = nullable and all(map(pd.api.types.is_numeric_dtype, values.dtypes))
            values = values.to_numpy(np.float64, na_value=np.nan) if numbers else values.to_numpy()
        source = _Source(values, adata.obs_names, features, obs)
    if isinstance(source.matrix, np.ndarray):
        source.measured = pd.DataFrame(source.matrix).notna().any(axis=1).to_numpy()
    return source


def _check_source(name: str, source: _Source, obs: pd.DataFrame | None) -> None:
    """Refuse measurements that cannot be read, and names that are not unique."""
    if not is_readable(source.matrix):
        raise ValueError(
            f"modality {name!r}: the measurements are a {type(source.matrix).__name__}; accepted: "
            "a NumPy array, a scipy sparse matrix or array, or those of a backed AnnData"
        )
    if source.matrix.dtype.kind not in "biuf":
        raise ValueError(f"modality {name!r}: values of type {source.matrix.dtype}; accepted: real numbers")
    if source.cells.has_duplicates:
        raise ValueError(
            f"modality {name!r}: cell name {_first_duplicate(source.cells)!r} occurs more than once; "
            "cell names must be unique (obs_names_make_unique makes them so)"
        )
    if source.features.has_duplicates:
        raise ValueError(
            f"modality {name!r}: feature name {_first_duplicate(source.features)!r} occurs more than once; "
            "feature names must be unique (var_names_make_unique makes them so)"
        )
    if len(source.cells) == 0 or (source.measured is not None and not source.measured.any()):
        raise ValueError(f"modality {name!r} has no cell; leave it out, or give it cells")
    if len(source.features) == 0:
        raise ValueError(f"modality {name!r} has no feature; leave it out, or give it features")
    if obs is not None and not source.cells.isin(obs.index).all():
        stray = source.cells[~source.cells.isin(obs.index)][0]
        raise ValueError(f"modality {name!r}: cell {stray!r} is not in the obs of the MuData; call its update() first")


def in_order(name: str, features: pd.Index, known: ModalitySchema) -> np.ndarray | None:
    """The column of each feature of the model, -1 where the data have none; None if they have all in this order."""
    if tuple(features) == known.features:
        return None
    columns = features.get_indexer(pd.Index(known.features))
    strange, has = features[~features.isin(known.features)], columns >= 0
    if not has.any():
        raise ValueError(
            f"modality {name!r}: the data have none of the {len(has)} features of the model; its features are "
            f"{_words(known.features[:3])}, …, and those of the data {_words(features[:3])}, …"
        )
    if len(strange):
        warnings.warn(
            f"modality {name!r}: the model does not know {len(strange)} of the {len(features)} features of the data, "
            f"which are left out ({_some(strange)})",
            stacklevel=2,
        )
    if known.shares[has].sum() < 0.5:
        warnings.warn(
            f"modality {name!r}: the data have only {has.sum()} of the {len(has)} features of the model; the others "
            "count as not measured",
            stacklevel=2,
        )
    return columns


def missing_columns(
    source: _Source, columns: np.ndarray | None, rows: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Panels of these rows from features that the data, or some of their tables, do not have."""
    parts = []
    if source.panels is not None:
        masks, panel = source.panels
        parts.append((masks if columns is None else masks[:, columns] & (columns >= 0), panel[rows]))
    if columns is not None and (columns < 0).any():
        parts.append((columns[None] >= 0, np.zeros(len(rows), dtype=int)))
    return parts
