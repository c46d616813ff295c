"""Where panels come from: NaN, features that a table of cells lacks, and tables of panels; and sizes across panels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data.matrix import CHUNK, Matrix, MissingValues
from pyromosaic.data.modality import Modality
from pyromosaic.data.panels import Panels, packed
from pyromosaic.data.spec import ModalitySchema, ModalitySpec
from pyromosaic.data.tables import Table, look_up, readings, word, words

SHARED = 0.1  # least share of a cell's counts in the features of all panels for these to give its size


def grouping(
    name: str, spec: ModalitySpec, tables: Sequence[Table], cells: pd.Index, given: Any, known: ModalitySchema | None
) -> tuple[str, pd.Series] | None:
    """The column of the groups whose panels a table or the model gives, and the group of each cell; None if neither.

    Raises
    ------
    ValueError
        If the table does not say which column its rows are from, or there is no such column.
    """
    if given is None:
        if known is None or known.panels is None or known.panels.key is None:
            return None
        found = look_up(readings(tables, known.panels.key, cells), name)
        return None if found is None else (known.panels.key, words(found))
    named = getattr(getattr(given, "index", None), "name", None)
    key = spec.batch_key if named is None else str(named)
    if key is None:
        raise ValueError(
            f"modality {name!r}: the rows of the table of panels are batches, and no batch_key is given; name its "
            "index after another column of obs, or pass a batch_key"
        )
    found = look_up(readings(tables, key, cells), name)
    if found is None:
        raise ValueError(f"modality {name!r}: the table of panels has groups of column {key!r}, which no obs has")
    return key, words(found)


def remembered(
    masks: np.ndarray, codes: np.ndarray, batch: np.ndarray, batches: Sequence[str], spec: ModalitySpec, by: Any
) -> Panels:
    """What a model remembers of panels.

    Parameters
    ----------
    masks, codes
        Features of each panel, and the panel of each cell.
    batch, batches
        The batch of each cell, and the names of the batches.
    spec
        The modality.
    by
        Column and values of another grouping of the cells that gives their panels; None if there is none.
    """
    own = [np.unique(codes[batch == i]) for i in range(len(batches))]
    table = np.stack([masks[some].any(axis=0) for some in own])
    if spec.batch_key is not None and all(len(some) == 1 for some in own):
        key, names, of = spec.batch_key, list(batches), table
    elif by is not None:
        key, names = by[0], sorted(set(by[1]))
        of = np.stack([masks[np.unique(codes[(by[1] == group).to_numpy()])].any(axis=0) for group in names])
    else:
        key, names, of = None, [str(i) for i in range(len(masks))], masks
    groups = tuple((group, packed(mask)) for group, mask in zip(names, of, strict=True))
    return Panels(key, groups, tuple(map(packed, table)))


def extended(
    known: ModalitySchema, masks: np.ndarray, codes: np.ndarray, batch: np.ndarray, first: int
) -> Panels | None:
    """The panels of a schema whose batches from number `first` on are new."""
    key = str(known.spec.batch_key)
    names, n = known.categories[key], known.n_features
    new = [masks[np.unique(codes[batch == i])].any(axis=0) for i in range(first, len(names))]
    if known.panels is None and all(mask.all() for mask in new):
        return None
    old = known.panels or Panels(key, tuple((name, packed(np.ones(n, bool))) for name in names[:first]), ())
    batches = old.batches or tuple(mask for _, mask in old.groups)
    more = tuple(map(packed, new))
    groups = tuple(zip(names[first:], more, strict=True)) if old.key == key else ()
    return Panels(old.key, (*old.groups, *groups), (*batches, *more))


def combined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Panels of the features that are in all of several panels of a cell: masks, and the number of each cell's.

    Parameters
    ----------
    parts
        Masks of shape (panels, features), and the number of each cell's, shape (cells,).
    """
    masks, codes = np.ones_like(parts[0][0][:1]), np.zeros(len(parts[0][1]), dtype=np.int64)
    for more, numbers in parts:
        pairs, codes = np.unique(codes * len(more) + numbers, return_inverse=True)
        masks = masks[pairs // len(more)] & more[pairs % len(more)]
    masks, merged = np.unique(masks, axis=0, return_inverse=True)
    return masks, merged.ravel()[codes]


def found(
    name: str,
    matrix: Matrix,
    rows: np.ndarray,
    cells: pd.Index,
    features: pd.Index,
    parts: list[tuple[np.ndarray, np.ndarray]],
    by: tuple[str, pd.Series] | None,
    given: Any,
    known: Panels | None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Panels of cells from all sources: masks, and the number of each cell's; None if all features are in all.

    Parameters
    ----------
    name, matrix, rows, cells, features
        The modality, and the rows and names of the cells that have it.
    parts
        Panels from the data themselves, see `combined`.
    by, given, known
        The groups of these cells, and a table or a model that gives the panels of groups. A model's panels are used
        where the data have only zeros.

    Raises
    ------
    ValueError
        If a cell has no measured feature, or the table is contradicted by a value other than 0.
    """
    if by is not None:
        key, values = by
        if given is not None:
            masks, codes, names = from_table(name, given, features, values, key)
            wrong = np.argwhere(~masks & (sums_by_panel(matrix, rows, codes, len(masks)) > 0))
            if len(wrong):
                group, feature = names[wrong[0][0]], features[wrong[0][1]]
                raise ValueError(
                    f"modality {name!r}: the table of panels says that feature {feature!r} was not measured in {key} "
                    f"{group!r}, but the data have values other than 0 there; correct the one or the other"
                )
            parts = [*parts, (masks, codes)]
        elif known is not None:
            codes = pd.Index([group for group, _ in known.groups]).get_indexer(pd.Index(values))
            masks = np.append(known.by_group(len(features)), np.ones((1, len(features)), dtype=bool), axis=0)
            codes = np.where(codes < 0, len(masks) - 1, codes)
            parts = [*parts, (masks | (sums_by_panel(matrix, rows, codes, len(masks)) > 0), codes)]
    if not parts:
        return None
    masks, codes = combined(parts)
    if masks.all():
        return None
    none: np.ndarray = np.logical_not(masks.any(axis=1))[codes]
    if none.any():
        group = "" if by is None else f" of {by[0]} {by[1].iloc[int(np.argmax(none))]!r}"
        raise ValueError(
            f"modality {name!r}: no feature was measured in {none.sum()} of {len(cells)} cells (the first: "
            f"{cells[none][0]!r}{group}); remove them from this modality"
        )
    return masks, codes


def from_table(
    name: str, table: Any, features: pd.Index, values: pd.Series, key: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Panels of cells from a table of groups × features.

    Parameters
    ----------
    name
        The modality.
    table
        True where a feature was measured; a feature without a column was measured everywhere.
    features
        Names of all features.
    values, key
        The group of each cell that has the modality, as strings, and the name of this column.

    Returns
    -------
    masks, codes, names
        Shape (groups, features); number of each cell's group; names of the groups.

    Raises
    ------
    ValueError
        If the table has unknown or repeated names, lacks a group, or has values other than True and False.
    """
    what = f"modality {name!r}: the table of panels"
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"{what} must be a DataFrame, groups of cells × features; found a {type(table).__name__}")
    rows, columns = pd.Index([word(r) for r in table.index]), table.columns.astype(str)
    for names, noun in ((rows, "row"), (columns, "column")):
        if names.has_duplicates:
            raise ValueError(f"{what} has the {noun} {str(names[names.duplicated()][0])!r} twice; keep one")
    place = features.get_indexer(columns)
    if (place < 0).any():
        raise ValueError(
            f"{what} has the column {str(columns[place < 0][0])!r}, which is no feature of the modality; accepted: "
            "names of its features"
        )
    found = table.to_numpy(dtype=object)
    if not all(isinstance(v, bool | np.bool_ | int | np.integer | float) and v in (0, 1) for v in found.ravel()):
        raise ValueError(f"{what} must have True or False for each group and feature; found other values")
    present = list(dict.fromkeys(values))
    for one, other, said in (
        (rows, present, f"which is no value of column {key!r}"),
        (present, rows, ""),
    ):
        strange = [str(v) for v in one if v not in set(other)]
        if strange and said:
            raise ValueError(f"{what} has the row {strange[0]!r}, {said}; it has {', '.join(map(repr, sorted(other)))}")
        if strange:
            raise ValueError(f"{what} has no row for {key} {strange[0]!r}; give one for each")
    masks = np.ones((len(rows), len(features)), dtype=bool)
    masks[:, place] = found.astype(bool)
    return masks, rows.get_indexer(pd.Index(values)), list(rows)


def from_missing(
    error: MissingValues, spec: ModalitySpec, matrix: Matrix, rows: np.ndarray, table: pd.DataFrame, features: pd.Index
) -> tuple[np.ndarray, np.ndarray]:
    """Panels of batches from NaN: masks, and the number of each row's; NaN in the matrix is read as 0 from now on.

    Raises
    ------
    ValueError
        If a feature is NaN in only some cells of a batch: `error` with more words.
    """
    group, names = np.zeros(len(rows), dtype=np.int64), pd.Index([""])
    if spec.batch_key is not None:
        group, names = pd.factorize(words(table[spec.batch_key]))
    missing = np.zeros((len(names), matrix.shape[1]), dtype=np.int64)
    for start in range(0, len(rows), CHUNK):
        block, of = matrix.raw(rows[start : start + CHUNK]), group[start : start + CHUNK]
        holes: Any = np.isnan(block) if isinstance(block, np.ndarray) else block.copy()
        if not isinstance(block, np.ndarray):
            holes.data = np.isnan(block.data).astype(np.int64)
        for g in np.unique(of):
            missing[g] += np.asarray(holes[np.flatnonzero(of == g)].sum(axis=0)).ravel()
    stray = np.argwhere((missing > 0) & (missing < np.bincount(group)[:, None]))
    if len(stray):
        where = "the data (there is no batch_key)" if spec.batch_key is None else f"batch {names[stray[0][0]]!r}"
        raise ValueError(
            f"{error}. NaN in all cells of a batch means that a feature was not measured there, but feature "
            f"{features[stray[0][1]]!r} is NaN in only some cells of {where}"
        ) from None
    matrix.has_holes = True
    return missing == 0, group


def sums_by_panel(matrix: Matrix, rows: np.ndarray, codes: np.ndarray, n_panels: int, at_most: int = 0) -> np.ndarray:
    """Sum of each feature over the rows of each panel, shape (panels, features).

    Parameters
    ----------
    matrix, rows, codes, n_panels
        The measurements, and the panel of each row.
    at_most
        Number of rows of a panel to use, evenly spaced; 0 for all.
    """
    sums = np.zeros((n_panels, matrix.shape[1]))
    for p in range(n_panels):
        own = rows[codes == p]
        own = own[:: 1 + len(own) // at_most] if at_most else own
        for start in range(0, len(own), CHUNK):
            sums[p] += np.asarray(abs(matrix[own[start : start + CHUNK]]).sum(axis=0, dtype=np.float64)).ravel()
    return sums


def rates_of(sums: np.ndarray, n_cells: np.ndarray, masks: np.ndarray, n_steps: int = 200) -> np.ndarray:
    """Expected share of each feature in the counts of a cell, also across panels, shape (features,).

    It is the maximum likelihood estimate of r in ``x ~ Poisson(s * r)``, with a size s for each panel, from the sums of
    the measured features. If no feature connects two panels, their cells count as equally large.

    Parameters
    ----------
    sums, masks
        Sum of each feature over the cells of a panel, and which features it has, each of shape (panels, features).
    n_cells
        Number of these cells, shape (panels,).

    Examples
    --------
    >>> masks = np.array([[True, True, False], [False, True, True]])
    >>> rates_of(np.array([[2.0, 6.0, 0.0], [0.0, 12.0, 4.0]]), np.array([1, 1]), masks).round(3)
    array([0.2, 0.6, 0.2])
    """
    measured = masks.astype(float)
    sums = (sums + 1e-9) * measured
    sizes = n_cells.astype(float)
    for _ in range(1 if masks.all() else n_steps):
        rates = sums.sum(axis=0) / np.maximum(sizes @ measured, 1e-300)
        sizes = sums.sum(axis=1) / np.maximum(measured @ rates, 1e-300)
    return np.asarray(rates / rates.sum())


def profile_of(
    spec: ModalitySpec, matrix: Matrix, rows: np.ndarray, masks: np.ndarray, panel: np.ndarray, at_most: int = 1000
) -> np.ndarray:
    """Expected share of each feature in the counts of a cell, from some cells of each panel."""
    if spec.data_kind == "real":
        return np.full(masks.shape[1], 1 / masks.shape[1])
    n_cells = np.bincount(panel, minlength=len(masks))
    sums = sums_by_panel(matrix, rows, panel, len(masks), at_most)
    used = -(-n_cells // (1 + n_cells // at_most))
    rates = np.array([float(f"{rate:.4g}") for rate in rates_of(sums * (n_cells / used)[:, None], n_cells, masks)])
    return np.asarray(rates / rates.sum())


def sizes(
    matrix: Matrix, rows: np.ndarray, masks: np.ndarray, codes: np.ndarray, profile: np.ndarray, shared: np.ndarray
) -> np.ndarray:
    """Totals of cells as if all features had been measured.

    The total over some features is divided by their share of the profile: over the features that all panels have
    (`shared`), if these have enough of the counts and are not all 0 in the cell, else over all of the cell's panel.
    """
    common = masks & shared
    common = np.where((common @ profile >= SHARED)[:, None], common, masks)
    weights = np.stack([each / np.maximum(each @ profile, 1e-12)[:, None] for each in (common, masks)], axis=2)
    totals = np.zeros((len(rows), 2))
    for start in range(0, len(rows), CHUNK):
        block, of = matrix[rows[start : start + CHUNK]], codes[start : start + CHUNK]
        for p in np.unique(of):
            own = np.flatnonzero(of == p)
            totals[start + own] = np.asarray(block[own] @ weights[p])
    return np.where(totals[:, 0] > 0, totals[:, 0], totals[:, 1])


def lacking(
    detected: np.ndarray, n_cells: np.ndarray, share: np.ndarray | None = None, masks: np.ndarray | None = None
) -> np.ndarray:
    """Features that are 0 in all cells of a group, which would be too unlikely by chance; shape (groups, features).

    If all cells were alike, such a feature would be 0 by chance with a probability below ``exp(-10)``.

    Parameters
    ----------
    detected
        Number of cells of a group in which a feature is not 0, shape (groups, features).
    n_cells
        Number of cells of each group.
    share
        Share of all cells in which a feature is not 0; by default over the groups in which it is.
    masks
        Features that are known to be measured in a group, shape (groups, features); others are left out.
    """
    if share is None:
        share = detected.sum(axis=0) / np.maximum(1, (detected > 0).T @ n_cells)
    found = (detected == 0) & (-n_cells[:, None] * np.log1p(-np.minimum(share, 1 - 1e-9)) >= 10)
    return np.asarray(found if masks is None else found & masks)


def suggested(modality: Modality, values: pd.Series) -> pd.DataFrame:
    """Groups × features: False where a feature was not measured, or is `lacking`.

    Parameters
    ----------
    modality
        The modality.
    values
        The group of each cell of the mosaic; missing in cells to leave out.
    """
    cells = np.flatnonzero(modality.present)
    groups, names = pd.factorize(values.iloc[cells], sort=True)
    detected = np.zeros((len(names), modality.schema.n_features), dtype=np.int64)
    masks = np.ones(detected.shape, dtype=bool)
    for g in range(len(names)):
        own = cells[groups == g]
        masks[g] = modality.measured(own).any(axis=0)
        for part in np.array_split(own, -(-len(own) // CHUNK)):
            detected[g] += np.asarray((modality.read(part) != 0).sum(axis=0)).ravel()
    missing = lacking(detected, np.bincount(groups[groups >= 0], minlength=len(names)))
    return pd.DataFrame(masks & ~missing, pd.Index(names, name=values.name), list(modality.schema.features))
