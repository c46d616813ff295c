"""Differential expression, accessibility and protein: how two groups of cells differ, and with what probability.

Values are compared in pairs of cells, one from each group, each with an independent posterior draw (Lopez et al., Deep
generative modeling for single-cell transcriptomics, 2018; Boyeau et al., An empirical Bayes method for differential
expression analysis of single cells with deep generative models, 2023). Differences among the cells of a group count as
uncertainty: a feature is called if it differs between most cells of the two groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from pyromosaic.accepted import Column, Count, Level, Positive, Seed, Weight, checked
from pyromosaic.data import Modality, ModalitySchema, Mosaic
from pyromosaic.data.tables import word
from pyromosaic.data.traits import EffectScale

Scale = EffectScale
Mode = Literal["change", "vanilla"]
Delta = Positive | Literal["default"] | None
#: Posterior draws, one for each of some cells (repeated cells get independent draws), given cell numbers, the batch to
#: decode for (None: the cell's batch), a seed, and a seed of what all cells share (the decoder's weights), which is the
#: same for both groups; shape (cells, features).
Draw = Callable[[np.ndarray, str | None, int, int], np.ndarray]

DELTAS = {"log2": 0.25, "difference": 0.05}
LEAST_DELTAS = {"log2": 0.1, "difference": 0.02}  # lower limits of estimated thresholds
PREFIXES = {"log2": "lfc", "difference": "difference"}
PORTION = 1000  # largest number of pairs drawn at once
SHARED = 50  # least number of draws of what all cells share
BLOCK = 5_000_000  # pairs × features summarised at once
CHUNK = 4096  # cells read at once


class Contrast(NamedTuple):
    """Two groups of cells: their names and cell numbers."""

    group1: str
    group2: str
    cells1: np.ndarray
    cells2: np.ndarray


@checked
def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    features: Sequence[str] | None = None,
    mode: Mode = "change",
    delta: Delta = "default",
    pseudocount: Weight = 1e-6,
    scale: Scale = "log2",
    fdr: Level = 0.05,
) -> pd.DataFrame:
    """Compare two groups of cells, feature by feature, by pairs of draws.

    The effect in a pair is ``log2((first + pseudocount) / (second + pseudocount))`` or ``first - second``. A feature
    has changed if the effect is beyond delta on the same side of zero in most pairs.

    Parameters
    ----------
    first, second
        Draws from the two groups, pairs × features each; row k of one is paired with row k of the other.
    features
        Names of the features; their numbers by default.
    mode
        ``"change"``: the probability that the effect is at least delta, or that it is at most -delta, whichever is
        larger. ``"vanilla"``: the probability that the first value is larger than the second, by any amount.
    delta
        Smallest effect that counts, in change mode; by default 0.25 for a log2 fold change and 0.05 for a difference.
        None estimates it (`estimate_delta`).
    pseudocount
        Added to both sides of a fold change; values well below it have almost no effect.
    scale
        ``"log2"`` (fold change) or ``"difference"``.
    fdr
        Accepted share of false discoveries among the called features.

    Returns
    -------
    pandas.DataFrame
        One row per feature, the most certain first (ties by the size of the effect). ``probability`` as described under
        `mode`; ``bayes_factor``, its natural log odds (negative in vanilla mode if the second is larger); ``lfc_mean``,
        ``lfc_median``, ``lfc_sd``, ``lfc_low`` and ``lfc_high`` (5 % and 95 % quantiles) of the effect over pairs,
        ``difference_...`` for differences; ``delta``, in change mode; ``is_significant``, the longest list with an
        expected share of false discoveries (in vanilla mode: of wrong directions) of at most `fdr`.

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite (or not positive with the pseudocount, for fold changes), or an
        argument is out of range.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> first, second = rng.gamma(100, [[0.04, 0.01]], (500, 2)), rng.gamma(100, 0.01, (500, 2))
    >>> table = compare(first, second, features=["CD19", "CD3D"])
    >>> table[["probability", "lfc_median", "is_significant"]].round(1)
             probability  lfc_median  is_significant
    feature
    CD19             1.0         2.0            True
    CD3D             0.1        -0.0           False
    """
    check_delta(mode, delta)
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 2 or first.shape != second.shape or first.size == 0:
        raise ValueError(
            "draws must have the same shape, pairs × features, at least one of each; "
            f"found {first.shape} and {second.shape}"
        )
    names = np.arange(first.shape[1]) if features is None else list(features)
    if len(names) != first.shape[1]:
        raise ValueError(f"there are {len(names)} feature names for {first.shape[1]} features")
    return decide(effect(first, second, scale, pseudocount), names, mode, delta, scale, fdr)


def effect(first: np.ndarray, second: np.ndarray, scale: Scale, pseudocount: float) -> np.ndarray:
    """Fold change or difference in each pair, as `compare` defines it."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("draws to compare must be finite numbers; found one that is not")
    if scale == "difference":
        return first - second
    least = min(first.min(), second.min()) + pseudocount
    if pseudocount < 0 or least <= 0:
        raise ValueError(
            f"fold changes need a pseudocount of at least 0 and values above 0 after adding it; found the pseudocount "
            f"{pseudocount} and the value {least}"
        )
    return np.log2((first + pseudocount) / (second + pseudocount))


def estimate_delta(effects: ArrayLike, scale: Scale = "log2") -> float:
    """Smallest effect that counts, estimated from the mean effects of all features.

    A mixture of three normals describes features that decrease, stay the same and increase. Delta is 0.6 times the
    average distance of the two outer means from zero (Boyeau et al. 2023), and at least 0.1 for a log2 fold change or
    0.02 for a difference.

    Parameters
    ----------
    effects
        Mean effect of each feature.
    scale
        ``"log2"`` or ``"difference"``.

    Returns
    -------
    float
        Delta, on the scale of the effects.

    Raises
    ------
    ValueError
        If there are fewer than 3 features.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> effects = np.concatenate([rng.normal(0, 0.05, 80), rng.normal(2, 0.1, 10), rng.normal(-2, 0.1, 10)])
    >>> round(estimate_delta(effects), 1)
    1.2
    """
    from sklearn.mixture import GaussianMixture

    effects = np.asarray(effects, dtype=float)[:, None]
    if len(effects) < 3:
        raise ValueError(f"estimating delta needs at least 3 features; found {len(effects)}; pass a number instead")
    mixture = GaussianMixture(
        3,
        max_iter=1000,
        weights_init=np.full(3, 1 / 3),
        means_init=np.quantile(effects, (0.05, 0.5, 0.95), axis=0),
        precisions_init=np.full((3, 1, 1), 1 / (effects.var() / 4 + 1e-6)),
    ).fit(effects)
    outer = np.sort(mixture.means_.ravel())[[0, 2]]
    return max(LEAST_DELTAS[scale], 0.6 * float(np.abs(outer).mean()))


def decide(
    effects: np.ndarray, features: Sequence[Any] | np.ndarray, mode: Mode, delta: Delta, scale: Scale, fdr: float
) -> pd.DataFrame:
    """The table that `compare` returns, from the effects, pairs × features."""
    least: float = 0.0
    if mode == "change":
        if delta is None:
            least = estimate_delta(effects.mean(0, dtype=np.float64), scale)
        else:
            least = DELTAS[scale] if delta == "default" else float(delta)
    n_blocks = min(effects.shape[1], -(-effects.size // BLOCK))
    summaries = np.concatenate(
        [_summary(block, mode, least) for block in np.array_split(effects, n_blocks, axis=1)], axis=1
    )
    prefix = PREFIXES[scale]
    columns = ["probability", *(f"{prefix}_{word}" for word in ("mean", "median", "sd", "low", "high"))]
    table = pd.DataFrame(summaries.T, pd.Index(features, name="feature"), columns)
    p = table["probability"].to_numpy()
    table.insert(1, "bayes_factor", np.log(p + 1e-8) - np.log(1 - p + 1e-8))
    sure = np.maximum(p, 1 - p) if mode == "vanilla" else p
    order = np.lexsort((-table[f"{prefix}_mean"].abs().to_numpy(), -sure))
    table = table.iloc[order]
    if mode == "change":
        table["delta"] = least
    expected_false = np.cumsum(1 - sure[order]) / np.arange(1, len(order) + 1)
    table["is_significant"] = expected_false <= fdr
    return table


def _summary(effects: np.ndarray, mode: Mode, delta: float) -> np.ndarray:
    """Probability, mean, median, standard deviation, 5 % and 95 % quantiles over pairs, shape (6, features)."""
    if mode == "vanilla":
        probability = (effects > 0).mean(0) + 0.5 * (effects == 0).mean(0)
    else:
        probability = np.maximum((effects >= delta).mean(0), (effects <= -delta).mean(0))
    low, median, high = np.quantile(effects, (0.05, 0.5, 0.95), axis=0)
    mean, sd = effects.mean(0, dtype=np.float64), effects.std(0, dtype=np.float64)
    return np.stack([probability, mean, median, sd, low, high])


def effect_scale(schema: ModalitySchema) -> tuple[Scale, float]:
    """Scale on which a modality is compared, and its pseudocount.

    RNA is compared by fold changes of proportions, with a pseudocount of one count in a hundred cells of median size;
    accessibility and real values by differences; other values (e.g. the expected count of a protein in a cell of median
    size) by fold changes with a pseudocount of 1. A user's likelihood sets both in its `pyromosaic.data.Traits`.
    """
    traits = schema.spec.traits
    if traits.scale == "difference":
        return "difference", 0.0
    return "log2", traits.pseudocount / (schema.library if traits.shares else 1.0)


def check_delta(mode: Mode, delta: Delta) -> None:
    """Refuse a smallest effect where every effect counts."""
    if mode == "vanilla" and delta != "default":
        raise ValueError(f"delta has no effect in mode 'vanilla'; found {delta!r}; leave it out")


@checked
def contrasts(
    mosaic: Mosaic,
    groupby: Column | None = None,
    group1: object = None,
    group2: object = None,
    cells1: Sequence[str] | np.ndarray | pd.Index | pd.Series | None = None,
    cells2: Sequence[str] | np.ndarray | pd.Index | pd.Series | None = None,
) -> list[Contrast]:
    """The groups to compare, from a column of `obs` or from lists of cells.

    Parameters
    ----------
    mosaic
        The data.
    groupby
        Column of `obs`; cells without a value are left out.
    group1, group2
        Values in that column, compared as strings. Without `group1`, each group in turn is compared with the rest;
        without `group2`, the second group is the rest.
    cells1, cells2
        Names, numbers or masks of cells instead of groups; without `cells2`, the second group is the rest.

    Returns
    -------
    list of Contrast
        Pairs of groups, each with names and cell numbers.

    Raises
    ------
    ValueError
        If groups are defined in neither or both of these ways, a column or value does not exist, a group has no cell,
        or the groups overlap.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50}, types=2)[0])
    >>> [(c.group1, c.group2, len(c.cells1)) for c in contrasts(mosaic, "celltype")]
    [('type0', 'rest', 30), ('type1', 'rest', 30)]
    """
    if (groupby is None) == (cells1 is None) or (cells1 is not None and (group1 is not None or group2 is not None)):
        raise ValueError("define groups either by groupby (with group1, group2) or by cells1 (with cells2)")
    if cells1 is not None:
        first = np.unique(mosaic.find(cells1))
        rest = np.setdiff1d(np.arange(mosaic.n_cells), first)
        second = rest if cells2 is None else np.unique(mosaic.find(cells2))
        chosen = [Contrast("cells1", "rest" if cells2 is None else "cells2", first, second)]
    else:
        if cells2 is not None or (group1 is None and group2 is not None):
            raise ValueError("a second group needs a first one: pass group1 with group2, and cells1 with cells2")
        column = mosaic.words(str(groupby))
        known, words = column.notna().to_numpy(), column.to_numpy()
        values = sorted(set(words[known]))
        for group in (group1, group2):
            if group is not None and not pd.api.types.is_scalar(group):
                raise ValueError(
                    f"a group must be one value of the column; found a {type(group).__name__}; pass its cells"
                )
            if group is not None and word(group) not in values:
                raise ValueError(f"column {groupby!r} has no value {group!r}; it has {', '.join(map(repr, values))}")
        names = values if group1 is None else [word(group1)]
        other = "rest" if group2 is None else word(group2)
        chosen = [
            Contrast(
                name,
                other,
                np.flatnonzero(words == name),
                np.flatnonzero(known & (words != name) if group2 is None else words == other),
            )
            for name in names
        ]
    for contrast in chosen:
        if len(contrast.cells2) == 0:
            raise ValueError(f"group {contrast.group2!r} has no cell to compare {contrast.group1!r} with")
        common = np.intersect1d(contrast.cells1, contrast.cells2)
        if len(common):
            raise ValueError(f"the groups overlap: cell {mosaic.obs_names[common[0]]!r} is in both")
    return chosen


@checked
def compare_groups(
    contrast: Contrast,
    draw1: Draw,
    draw2: Draw,
    modality: Modality,
    columns: np.ndarray | None = None,
    *,
    mode: Mode = "change",
    delta: Delta = "default",
    fdr: Level = 0.05,
    batch_correction: bool = False,
    n_samples: Count = 5000,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Compare two groups of cells in one modality, by pairs of cells drawn with replacement.

    Only the effects are held in memory, 4 bytes per pair and feature.

    Parameters
    ----------
    contrast
        The groups.
    draw1, draw2
        Posterior draws for the cells of each group and the requested features.
    modality
        The modality; it may be missing in all of these cells.
    columns
        Numbers of the requested features; None for all.
    mode, delta, fdr
        As in `compare`, on the scale and with the pseudocount of `effect_scale`.
    batch_correction
        Decode both cells of a pair for the same batch, with equally many pairs for each batch of the modality;
        otherwise each cell is decoded for the batch it comes from.
    n_samples
        Number of pairs.
    seed
        Seed of pairs and draws.

    Returns
    -------
    pandas.DataFrame
        The table of `compare`, preceded by ``comparison``, ``group1`` and ``group2``, and followed by the columns of
        `observed` for both groups.

    Raises
    ------
    ValueError
        If an argument is out of range, or batch correction is requested for a modality without batches.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50}, types=2)[0])
    >>> rna = mosaic.modalities["rna"]
    >>> def draw(cells, batch, seed, shared):  # shares as measured, in place of a model's
    ...     return rna.tensor(cells).to_dense().numpy() / rna.library[cells, None]
    >>> (contrast,) = contrasts(mosaic, "celltype", "type0")
    >>> table = compare_groups(contrast, draw, draw, rna, n_samples=200)
    >>> table["comparison"].iloc[0], len(table)
    ('type0 vs rest', 50)
    """
    check_delta(mode, delta)
    schema = modality.schema
    batches: tuple[str | None, ...] = (None,)
    if batch_correction:
        if schema.spec.batch_key is None:
            raise ValueError(f"modality {modality.name!r} has no batch_key, and no batch effect to correct")
        batches = tuple(schema.categories[schema.spec.batch_key])
    columns = np.arange(schema.n_features) if columns is None else columns
    if len(columns) == 0:
        raise ValueError("features must be names or a mask with at least one feature; found none")
    scale, pseudocount = effect_scale(schema)

    sides = [
        (draw, cells, np.random.default_rng([seed, side]))
        for side, (draw, cells) in enumerate([(draw1, contrast.cells1), (draw2, contrast.cells2)])
    ]
    n_pairs = -(-n_samples // len(batches))
    portion = min(PORTION, -(-n_pairs // SHARED))
    of_shared = np.random.default_rng([seed, 2])
    effects = np.empty((n_pairs * len(batches), len(columns)), dtype=np.float32)
    for i, batch in enumerate(batches):
        for start in range(0, n_pairs, portion):
            n, shared = min(portion, n_pairs - start), int(of_shared.integers(2**31))
            one, other = [
                draw(rng.choice(cells, n), batch, int(rng.integers(2**31)), shared) for draw, cells, rng in sides
            ]
            at = i * n_pairs + start
            effects[at : at + n] = effect(one, other, scale, pseudocount)

    features = np.asarray(schema.features, dtype=object)[columns]
    table = decide(effects, features, mode, delta, scale, fdr)
    table.insert(0, "comparison", f"{contrast.group1} vs {contrast.group2}")
    table.insert(1, "group1", contrast.group1)
    table.insert(2, "group2", contrast.group2)
    seen = pd.concat(
        [
            observed(modality, cells, columns).add_suffix(s)
            for s, cells in (("1", contrast.cells1), ("2", contrast.cells2))
        ],
        axis=1,
    )
    return table.join(seen)


def observed(modality: Modality, cells: np.ndarray, columns: np.ndarray) -> pd.DataFrame:
    """Measured values in the cells of a group in which a feature was measured.

    Parameters
    ----------
    modality
        The modality.
    cells, columns
        Numbers of cells and features.

    Returns
    -------
    pandas.DataFrame
        Features × ``raw_mean``, ``nonzero_share`` and ``normalized_mean``, the mean after every cell is scaled to the
        median size; NaN if the feature was measured in no cell.
    """
    cells = cells[modality.present[cells]]
    sums = np.zeros((3, modality.schema.n_features))
    for start in range(0, len(cells), CHUNK):
        part = cells[start : start + CHUNK]
        values, ones = modality.read(part), np.ones(len(part))
        library = modality.library[part].astype(np.float64)
        factor = modality.schema.library / np.where(library > 0, library, 1.0)
        sums += np.stack([ones @ values, ones @ (values != 0), factor @ values])
    n = np.full(sums.shape[1], len(cells)) if modality.panels is None else modality.panels.number(cells)
    means = np.where(n > 0, sums / np.maximum(n, 1), np.nan)[:, columns]
    features = np.asarray(modality.schema.features, dtype=object)[columns]
    return pd.DataFrame(means.T, pd.Index(features, name="feature"), ["raw_mean", "nonzero_share", "normalized_mean"])
