"""Registration: from the user's tables and matrices to checked modalities."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data.chromatin import warn_of_cut_sites
from pyromosaic.data.controls import warn_of_controls
from pyromosaic.data.matrix import CHUNK, DENSE_ABOVE, Matrix, MissingValues, check_values, suspicion
from pyromosaic.data.modality import Modality
from pyromosaic.data.panel_sources import (
    extended,
    found,
    from_missing,
    lacking,
    profile_of,
    remembered,
    sizes,
)
from pyromosaic.data.panels import CellPanels
from pyromosaic.data.sources import _some, _Source, _words, in_order, missing_columns
from pyromosaic.data.spec import DATA_KINDS, LIKELIHOOD_BY_NAME, ModalitySchema, ModalitySpec, Schema
from pyromosaic.data.tables import (
    WHOLE,
    Contradiction,
    Reading,
    Table,
    codes,
    contradictions,
    look_up,
    readings,
    warn_of,
    warn_of_not_known,
    warn_of_spellings,
    word,
    words,
)
from pyromosaic.foreign import check_words


def _specifications(
    found: list[str],
    modalities: Mapping[str, ModalitySpec | str | type] | None,
    schema: Schema | None,
    shared: Mapping[str, Any],
) -> dict[str, ModalitySpec]:
    """The specification of each modality."""
    if not found or modalities == {}:
        raise ValueError("there is no modality to register; give at least one")
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"the name of a modality must be text; found {name!r}")
    if schema is not None:
        if modalities is not None or shared:
            raise ValueError("the schema already specifies the modalities; leave out modalities and other settings")
        absent = [name for name in schema.modalities if name not in found]
        strange = [name for name in found if name not in schema.modalities]
        if absent and strange:
            raise ValueError(
                f"the data lack the model's modality {absent[0]!r} and have {strange[0]!r}, "
                "which the model does not know; rename the modality, or leave it out"
            )
        return {name: m.spec for name, m in schema.modalities.items()}
    if modalities is None:
        for name in found:
            if name.lower() not in LIKELIHOOD_BY_NAME:
                raise ValueError(
                    f"modality {name!r}: its name does not say which likelihood it needs; "
                    f'pass one, e.g. modalities={{"{name}": "nb"}}'
                )
        modalities = {name: LIKELIHOOD_BY_NAME[name.lower()] for name in found}
    settings = [field.name for field in fields(ModalitySpec)][1:]
    unknown = [name for name in shared if name not in settings]
    check_words("registration", unknown, settings)
    if unknown:
        raise TypeError(f"registration has no argument {unknown[0]!r}; accepted for all modalities: {_words(settings)}")
    specs = {}
    for name, given in modalities.items():
        if name not in found:
            raise ValueError(f"there is no modality {name!r}; found {_words(found)}")
        try:
            specs[name] = given if isinstance(given, ModalitySpec) else ModalitySpec(given, **shared)
        except ValueError as error:
            raise ValueError(f"modality {name!r}: {error}") from error
    if shared and all(isinstance(given, ModalitySpec) for given in modalities.values()):
        raise ValueError(f"{_words(shared)} applies to no modality: each has a ModalitySpec; set it there")
    return specs


def _columns(
    specs: Mapping[str, ModalitySpec], tables: Sequence[Table], cells: pd.Index, absent: Collection[str]
) -> dict[str, pd.DataFrame]:
    """For each modality, its columns for all cells of the mosaic.

    A value is looked up in the table of the modality, then in those of other modalities, then in that of the whole
    MuData. Therefore a cell without the modality has a batch, too. Sizes are never taken from another modality. An
    absent modality needs no columns.
    """
    found: dict[str, pd.DataFrame] = {}
    read: dict[tuple[str, str], list[Reading]] = {}  # each column once, sizes once per modality
    batch_keys = [spec.batch_key for spec in specs.values()]
    for name, spec in specs.items():
        wanted = [*spec.categorical, *spec.continuous_covariates]
        wanted += [k for k in (spec.label_key, spec.size_factor_key) if k is not None]
        columns = {}
        for key in wanted:
            own = name if key == spec.size_factor_key else WHOLE  # sizes are not looked up in other modalities
            places = [t for t in tables if own == WHOLE or t.modality in (name, WHOLE)]
            if (key, own) not in read:
                read[key, own] = readings(places, key, cells, unlabelled(specs, key))
                said = contradictions(read[key, own])
                if key in spec.continuous_covariates:  # measured covariates may differ by modality
                    said = [each for each in said if each.second.modality == WHOLE]
                _check_agreement(said, [n for n, k in zip(specs, batch_keys, strict=True) if k == key])
            column = look_up(read[key, own], name)
            if column is None and name not in absent:
                raise ValueError(
                    f"modality {name!r}: no obs has a column {key!r}; there are {_columns_of(places, tables)}"
                )
            columns[key] = pd.Series(None, cells, dtype=object) if column is None else column
        found[name] = pd.DataFrame(columns, index=cells)
    return found


def unlabelled(specs: Mapping[str, ModalitySpec], key: str) -> set[str]:
    """The values of a column that mean "not known", by the specifications."""
    labels = {name: spec for name, spec in specs.items() if spec.label_key is not None}
    return {
        word(spec.unlabelled)
        for name, spec in labels.items()
        if str(spec.label_key).removeprefix(f"{name}:") == key.removeprefix(f"{name}:")
    }


def _check_agreement(said: list[Contradiction], modalities_with_this_batch: Collection[str]) -> None:
    """Refuse a cell that has different batches in two modalities, and warn about other contradictions."""
    for each in said:
        if each.first.modality in modalities_with_this_batch and each.second.modality in modalities_with_this_batch:
            raise ValueError(
                f"{each}: two cells have the same name, or a batch has two names; make the names of cells unique, e.g. "
                "by adding the sample, or use one name for the batch. If a column differs between modalities on "
                "purpose, give it another name in each"
            )
    warn_of(said)


def _check_vocabularies(modalities: Mapping[str, Modality]) -> None:
    """Warn about columns with two spellings of a value, or of which a modality shares no value with others."""
    for key in dict.fromkeys(k for m in modalities.values() for k in m.schema.categories):
        used = {name: set(m.schema.categories[key]) for name, m in modalities.items() if key in m.schema.categories}
        if warn_of_spellings(key, set().union(*used.values())):
            continue
        for name, own in used.items():
            others = set().union(*(words for other, words in used.items() if other != name))
            if others and not own & others:
                warnings.warn(
                    f"column {key!r} has no value in common between modality {name!r} ({_some(own)}) and others "
                    f"({_some(others)}); in cells with the latter, {name!r} is imputed as an average over its "
                    "values. If values mean the same, spell them in the same way",
                    stacklevel=2,
                )
                break


def _check_new_batches(known: Mapping[str, ModalitySchema], columns: Mapping[str, pd.DataFrame]) -> None:
    """Warn about new batches whose name is another spelling of a batch of the model."""
    found: dict[str, set[str]] = {}
    for name, schema in known.items():
        if (key := schema.spec.batch_key) is not None:
            found.setdefault(key, set()).update(schema.categories[key], words(columns[name][key].dropna()))
    for key, values in found.items():
        warn_of_spellings(key, values)


def _columns_of(places: Sequence[Table], tables: Sequence[Table]) -> str:
    """Names of the columns of some tables, without the copies that MuData makes of columns of modalities."""
    copies = {f"{t.modality}:{column}" for t in tables for column in t.obs}
    return _words(dict.fromkeys(str(column) for t in places for column in t.obs if column not in copies))


def _with_batches(known: ModalitySchema, cells: pd.Index, table: pd.DataFrame) -> ModalitySchema:
    """The schema with the new batches of these cells after its own."""
    key = known.spec.batch_key
    if key is None:
        return known
    batches = known.categories[key]
    new = sorted(set(words(table.loc[cells, key].dropna())) - set(batches))
    return replace(known, categories={**known.categories, key: (*batches, *new)})


def _modality(
    name: str,
    spec: ModalitySpec,
    source: _Source,
    cells: pd.Index,
    table: pd.DataFrame,
    known: ModalitySchema | None,
    average_new_batches: bool = False,
    n_old_batches: int = 0,
    panel_groups: tuple[str, pd.Series] | None = None,
    panels: Any = None,
) -> Modality:
    """Check one modality, and put it in the mosaic's order of cells and the schema's order of features."""
    features, columns = source.features.astype(str), None
    if known is not None:
        columns = in_order(name, features, known)
        features = pd.Index(known.features)
    rows = source.cells.get_indexer(cells)
    if source.measured is not None:
        rows = np.where((rows >= 0) & source.measured[rows], rows, -1)
    present = rows >= 0
    matrix = Matrix(source.matrix, columns, spec.cut_sites)
    categorical = np.full((len(cells), len(spec.categorical)), -1, dtype=np.int64)
    categories: dict[str, tuple[str, ...]] = {}
    for i, key in enumerate(spec.categorical):
        values = table[key]
        unknown = values[present].isna()
        if unknown.any():
            raise ValueError(
                f"modality {name!r}: column {key!r} has no value for cell {unknown.index[unknown][0]!r}; "
                "every cell needs one"
            )
        spelled = words(values)
        warn_of_not_known(spelled[present], f"modality {name!r}: column {key!r}")
        if known is None:
            categories[key] = tuple(sorted(spelled[present].unique()))
        else:
            categories[key] = known.categories[key]
            unseen = present & ~spelled.isin(categories[key]).to_numpy()
            if unseen.any() and not (average_new_batches and key == spec.batch_key):
                raise ValueError(
                    f"modality {name!r}: cell {cells[unseen][0]!r} has {key} {spelled[unseen].iloc[0]!r}, "
                    f"which the model has not seen; seen: {_words(categories[key])}"
                )
        categorical[:, i] = codes(spelled, categories[key])

    groups: np.ndarray | None = None
    batches: tuple[str, ...] = ("",)
    if spec.batch_key:
        groups, batches = categorical[present, 0] + 1, ("", *categories[spec.batch_key])  # 0: a new batch
    own, parts = rows[present], missing_columns(source, columns, rows[present])
    checked = (matrix, own, spec.data_kind, name, cells[present], features, groups, len(batches))
    try:
        summary = check_values(*checked)
    except MissingValues as error:
        parts.append(from_missing(error, spec, matrix, own, table[present], features))
        summary = check_values(*checked)
    if panel_groups is not None:
        panel_groups = (panel_groups[0], panel_groups[1][present])
    known_panels = None if known is None else known.panels
    of = found(name, matrix, own, cells[present], features, parts, panel_groups, panels, known_panels)
    masks, panel = (np.ones((1, len(features)), dtype=bool), np.zeros(len(own), dtype=int)) if of is None else of
    _check_empty(name, spec, summary.empty, cells[present])
    if spec.traits.background and known is None:
        warn_of_controls(name, features)
    nowhere = np.flatnonzero(~masks.any(axis=0))
    if known is None and len(nowhere):
        raise ValueError(f"modality {name!r}: feature {features[nowhere[0]]!r} was measured in no cell; leave it out")
    of_batch = np.zeros(len(own), dtype=int) if groups is None else groups
    measured = np.stack([masks[np.unique(panel[of_batch == i])].all(axis=0) for i in range(len(batches))])
    n_cells = np.bincount(of_batch, minlength=len(batches))
    _warn_unmeasured(name, summary.detected, n_cells, batches, known, measured)
    cut = warn_of_cut_sites(name, spec, Matrix(source.matrix)[own[:: 1 + len(own) // 1000]])
    looks = None if cut else suspicion(matrix, rows[present], summary.totals, spec.data_kind, spec.traits.sized)
    if looks is not None and isinstance(spec.likelihood, str) and not spec.allow_non_integer:
        warnings.warn(
            f"modality {name!r}: {looks}, and likelihood {spec.likelihood!r} is for "
            f"{'raw counts' if spec.data_kind == 'count' else 'values on a continuous scale'}; if the values are not, "
            "name the layer that has such values, or another likelihood",
            stacklevel=2,
        )
    profile = profile_of(spec, matrix, own, masks, panel) if known is None else known.shares
    totals = summary.totals
    if of is not None or known_panels is not None:
        shared = masks if known_panels is None else known_panels.by_group(len(features))
        every = np.full(len(features), not spec.traits.shares)
        if known is None or known_panels is not None:
            every &= shared.all(axis=0)
        totals = sizes(matrix, own, masks, panel, profile, every)
    library = _library(name, spec, totals, cells, present, table)

    continuous = np.zeros((len(cells), len(spec.continuous_covariates)), dtype=np.float32)
    moments: dict[str, tuple[float, float]] = {}
    for i, key in enumerate(spec.continuous_covariates):
        numbers = pd.to_numeric(table[key], errors="coerce").to_numpy(dtype=float)
        bad = present & ~np.isfinite(numbers)
        if bad.any():
            raise ValueError(
                f"modality {name!r}: the continuous covariate {key!r} must be finite in every cell; found "
                f"{table[key][bad].iloc[0]!r} in cell {cells[bad][0]!r}"
            )
        own = numbers[present]
        moments[key] = known.continuous[key] if known else (float(own.mean()), float(own.std()) or 1.0)
        continuous[:, i] = np.where(np.isfinite(numbers), (numbers - moments[key][0]) / moments[key][1], 0)

    labels, label_names = _labels(name, spec, table, cells, present, known)
    exposures, exposure = None, 1.0
    if source.exposures is not None:
        exposures = Matrix(source.exposures, columns)
        exposure = _exposure(name, spec, exposures, rows[present], cells[present], features)
    n_measured = np.bincount(panel, minlength=len(masks)) @ masks
    if known is not None and spec.batch_key and len(batches) - 1 > n_old_batches:
        known = replace(known, panels=extended(known, masks, panel, of_batch - 1, n_old_batches))
    schema = known or ModalitySchema(
        spec=spec,
        features=tuple(features),
        categories=categories,
        continuous=moments,
        labels=label_names,
        library=float(np.nanmedian(library)),
        exposure=exposure,
        detected=tuple((summary.detected.sum(axis=0) / n_measured).round(4).tolist()),
        profile=tuple(profile.tolist()),
        panels=None
        if of is None
        else remembered(
            masks, panel, of_batch - (groups is not None), batches[groups is not None :], spec, panel_groups
        ),
    )
    # A user's likelihood may not support sparse tensors.
    dense = not isinstance(spec.likelihood, str) or DATA_KINDS[spec.likelihood] != "count"
    dense |= summary.density > DENSE_ABOVE
    of_cells = None
    if of is not None:
        numbers = np.full(len(cells), -1)
        numbers[present] = panel
        of_cells = CellPanels(masks, numbers, masks @ profile)
    return Modality(name, schema, matrix, rows, categorical, continuous, library, labels, dense, exposures, of_cells)


def not_empty(matrix: Any) -> np.ndarray:
    """Which rows have a value other than 0; a missing value counts as other than 0."""
    rows, found = np.arange(matrix.shape[0]), Matrix(matrix)
    parts = [found[rows[start : start + CHUNK]] != 0 for start in range(0, len(rows), CHUNK)]
    return np.concatenate([np.asarray(part.sum(axis=1)).ravel() > 0 for part in parts])


def _check_empty(name: str, spec: ModalitySpec, empty: np.ndarray, cells: pd.Index) -> None:
    """Refuse cells whose values are all 0, unless the specification keeps them."""
    if empty.any() and spec.empty_cells != "keep" and spec.exposure_layer is None:
        raise ValueError(
            f"modality {name!r}: all values are 0 in {empty.sum()} of {len(cells)} cells (the first: "
            f"{cells[empty][0]!r}); if the modality was not measured in them, remove them from it, or set "
            'empty_cells="holes" in its ModalitySpec'
        )


def _warn_unmeasured(
    name: str,
    detected: np.ndarray,
    n_cells: np.ndarray,
    batches: Sequence[str],
    known: ModalitySchema | None,
    measured: np.ndarray,
) -> None:
    """Warn about features that are 0 in all cells of a batch, but not in the training data or in other batches.

    Because cells differ, the warning needs two such features and one per cent of all, or one that half of the other
    cells have.
    """
    share = None if known is None or not known.detected else np.array(known.detected)
    where = "in other batches" if share is None else "in the training data"
    missing = lacking(detected, n_cells, share, measured)
    if share is None:
        share = detected.sum(axis=0) / np.maximum(1, (detected > 0).T @ n_cells)
    doubtful = (missing.sum(axis=1) >= max(2, detected.shape[1] // 100)) | (missing & (share >= 0.5)).any(axis=1)
    found = [i for i in np.argsort(-missing.sum(axis=1), kind="stable") if doubtful[i]]
    if found:
        said = [
            f"{missing[i].sum()} in all {n_cells[i]} cells" + f" of batch {batches[i]!r}" * (batches[i] != "")
            for i in found
        ]
        more = f", and some in {len(said) - 3} further batches" if len(said) > 3 else ""
        warnings.warn(
            f"modality {name!r}: some of {detected.shape[1]} features are always 0, but not {where}: "
            f"{', '.join(said[:3])}{more}; if they were not measured there, the model takes these zeros for "
            "measurements: set them to NaN, or pass a table of panels (mosaic.suggested_panels makes one)",
            stacklevel=2,
        )


def _exposure(
    name: str, spec: ModalitySpec, exposures: Matrix, rows: np.ndarray, cells: pd.Index, features: pd.Index
) -> float:
    """Median exposure above 0 in a sample of the cells, after all exposures were checked."""
    check_values(exposures, rows, "nonnegative", f"{name}, layer {spec.exposure_layer}", cells, features)
    some = exposures.tensor(rows[:: 1 + len(rows) // 1000], dense=True)
    return float(some[some > 0].median()) if (some > 0).any() else 1.0


def _library(
    name: str, spec: ModalitySpec, totals: np.ndarray, cells: pd.Index, present: np.ndarray, table: pd.DataFrame
) -> np.ndarray:
    """Size of each cell in counts; NaN where the modality was not measured."""
    library = np.full(len(cells), np.nan)
    if spec.size_factor_key is not None:
        library[present] = pd.to_numeric(table[spec.size_factor_key][present], errors="coerce")
        source = f"column {spec.size_factor_key!r}"
    else:
        library[present], source = 1.0 if spec.data_kind == "real" else totals, "the sum of its counts"
    bad = present & ~((library > 0) & np.isfinite(library))
    if bad.any() and (spec.needs_library or spec.size_factor_key is not None):
        raise ValueError(
            f"modality {name!r}: cell {cells[bad][0]!r} has size {library[bad][0]} ({source}), but likelihood "
            f"{spec.likelihood_name!r} needs a finite size above 0; remove the cell from this modality"
        )
    if spec.size_factor_key is not None and spec.traits.kind == "count":
        _warn_of_sizes(
            f"modality {name!r}: the sizes in {source}", library[present & (library > 0)], totals[library[present] > 0]
        )
    return library.astype(np.float32)


def _warn_of_sizes(what: str, sizes: np.ndarray, totals: np.ndarray) -> None:
    """Warn about sizes that are far from the total counts of cells, or hardly correlate with them."""
    sizes, totals = sizes[totals > 0], totals[totals > 0]
    if len(totals) == 0:
        return
    problem, ratio = "", float(np.median(sizes / totals))
    logs = np.log(sizes), np.log(totals)
    if not 0.5 <= ratio <= 2:
        problem = (
            f"are {ratio:.2g} times the cells' total counts (median), and imputed values change by the same factor; "
            "sizes are numbers of counts: multiply size factors near 1 by the median total count"
        )
    elif len(totals) >= 20 and logs[1].std() > 0.1:
        together = float(np.corrcoef(logs)[0, 1]) if logs[0].std() > 0 else 0.0
        if together < 0.25:
            problem = (
                f"hardly correlate with the cells' total counts ({together:.2f} on the log scale); pass the sizes of "
                "this modality"
            )
    if problem:
        warnings.warn(f"{what} {problem}", stacklevel=2)


def _labels(
    name: str,
    spec: ModalitySpec,
    table: pd.DataFrame,
    cells: pd.Index,
    present: np.ndarray,
    known: ModalitySchema | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label numbers of all cells (-1 unknown) and the label categories."""
    if spec.label_key is None:
        return np.full(len(cells), -1, dtype=np.int64), ()
    found = words(table[spec.label_key])
    warn_of_not_known(found, f"modality {name!r}: column {spec.label_key!r}")
    names = known.labels if known else tuple(sorted(found.dropna().unique()))
    if spec.dispersion == "gene-label" and not names:
        raise ValueError(
            f"modality {name!r}: dispersion 'gene-label' needs labels; found none in column {spec.label_key!r}. "
            "Choose dispersion 'gene'"
        )
    unseen = present & (found.notna() & ~found.isin(names)).to_numpy()
    if unseen.any():
        raise ValueError(
            f"modality {name!r}: cell {cells[unseen][0]!r} has label {found[unseen].iloc[0]!r}, "
            f"which the model has not seen; seen: {_words(names)}, or {spec.unlabelled!r} for unknown"
        )
    return codes(found, names), names
