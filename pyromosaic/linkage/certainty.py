"""What is known before a matching by shape, and how sure the matching is."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from pyromosaic.linkage.geometry import N_COMPONENTS, Found, Matching, search
from pyromosaic.linkage.matching import Correspondence
from pyromosaic.linkage.preprocess import group_means
from pyromosaic.linkage.rounds import Pair, Side

SURE = 0.8  # stability from which a matching is trusted; set on simulated data and on sparse chromatin
CHANCE = 1.5  # what is shared must exceed this many times what is shared by chance; set on simulated data
N_ALTERNATIVES = 4
N_FEATURES = 10  # pairs of features that describe a matching


@dataclass(frozen=True)
class Alternative:
    """A matching by shape that is nearly as good.

    Parameters
    ----------
    score
        Score of the matching: the logarithm of how much the modalities share, times how far the matchings by two
        halves of the features agree, divided by the cost, less the disagreement with what is known.
    cost
        Gromov–Wasserstein cost: mean squared difference of distances between cells, which have mean 1.
    weight
        Weight among all matchings that were found, from 0 to 1.
    features
        The features that would have to correspond: the pairs with the strongest correlations over this matching.
    correspondence
        The matching; pass it as `correspondence` to `cca` to use it instead.
    """

    score: float
    cost: float
    weight: float
    features: pd.DataFrame
    correspondence: Correspondence


@dataclass(frozen=True)
class ByShape:
    """How sure a matching by shape is.

    Parameters
    ----------
    stability
        Mean confidence over all cells, from 0 to 1.
    confidence
        For each modality, the confidence in each cell's match: the overlap of its partners' populations over draws of
        metacells and over the matchings that are nearly as good. 0 if the modalities share nothing beyond chance.
    populations
        One row per population of each modality: the number of its cells, and their mean confidence.
    chosen
        The matching that was chosen, before the last rounds.
    alternatives
        Other matchings, the best first.
    changed
        Share of the partners that links, pairs or a population have changed, among the matchings that were found; 0 if
        nothing was known.
    """

    stability: float
    confidence: dict[str, pd.Series]
    populations: pd.DataFrame
    chosen: Alternative
    alternatives: list[Alternative]
    changed: float


def match_by_shape(
    pair: Pair,
    names: pd.Index,
    pairs: pd.DataFrame | None,
    population: Mapping[str, Sequence[str]] | None,
    seed: int,
) -> ByShape:
    """Match two modalities by shape and what is known; sets the first round of `pair`."""
    known = _knowledge(pair, *_positions(pair.sides, names, pairs, population))
    found = search(pair.sides, known, seed)
    pair.by_shape = found.matchings[0].correspondence
    if known[0].shape[1]:
        distance = cdist(*known, "sqeuclidean") / known[0].shape[1]
        pair.by_knowledge = np.maximum(1 - distance, -1).astype(np.float32)
    beyond_chance = found.shared[0] > CHANCE * found.shared[1]
    confidence = {
        side.name: pd.Series(values * beyond_chance, names[side.cells], name="confidence")
        for side, values in zip(pair.sides, found.confidence, strict=True)
    }
    rows = [
        pd.DataFrame({"modality": side.name, "population": groups, "confidence": confidence[side.name].to_numpy()})
        for side, groups in zip(pair.sides, found.populations, strict=True)
    ]
    grouped = pd.concat(rows).groupby(["modality", "population"], sort=False)["confidence"]
    populations = grouped.agg(cells="size", confidence="mean").sort_index().reset_index()
    stability = float(np.mean([values.mean() for values in confidence.values()]))
    first, *others = (_described(pair, matching) for matching in found.matchings[: 1 + N_ALTERNATIVES])
    _warn(found, populations, stability, [side.name for side in pair.sides])
    return ByShape(stability, confidence, populations, first, others, found.changed)


def _warn(found: Found, populations: pd.DataFrame, stability: float, names: list[str]) -> None:
    """Warn if the matching is not to be trusted."""
    both, help_ = " and ".join(map(repr, names)), "give a few links, pairs of cells or one known population"
    if found.shared[0] <= CHANCE * found.shared[1]:
        warnings.warn(
            f"modalities {both} share nothing that could be found: cells matched by one half of the features do not "
            f"correlate in the other half beyond chance. Do not use these scores; {help_}",
            stacklevel=4,
        )
    elif stability < SURE:
        low = int((populations["confidence"] < SURE).sum())
        warnings.warn(
            f"it is not sure that the right cells of {both} are matched: {low} of {len(populations)} populations have "
            f"other partners in matchings that are nearly as good (stability {stability:.2f}; trusted from {SURE}). "
            f"Look at the alternatives of the linkage, or {help_}",
            stacklevel=4,
        )


def _described(pair: Pair, matching: Matching) -> Alternative:
    """A matching with the features that would have to correspond."""
    canonical, n = pair.correlated(matching.correspondence).keep(pair.n_components), N_FEATURES
    first, second = (
        side.loadings @ np.cov(side.components, rowvar=False, bias=True) @ coefficients
        for side, coefficients in zip(pair.sides, canonical.coefficients, strict=True)
    )
    correlation = (first * canonical.correlations) @ second.T
    best = correlation.argmax(axis=1)  # one partner for each feature of the first modality
    rows = np.argsort(-correlation[np.arange(len(best)), best])[:n]
    table = {
        side.name: np.array(side.standardiser.features)[positions]
        for side, positions in zip(pair.sides, (rows, best[rows]), strict=True)
    }
    features = pd.DataFrame({**table, "correlation": correlation[rows, best[rows]]})
    return Alternative(matching.score, matching.cost, matching.weight, features, matching.correspondence)


def _positions(
    sides: tuple[Side, Side],
    names: pd.Index,
    pairs: pd.DataFrame | None,
    population: Mapping[str, Sequence[str]] | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions of the paired cells, and of the cells of the population, among the cells of each modality."""
    paired: list[np.ndarray] = []
    inside: list[np.ndarray] = []
    for what, given in (("pairs", pairs), ("population", population)):
        for side in sides:
            if given is not None and side.name not in given:
                found_names = ", ".join(map(repr, given)) or "none"
                raise ValueError(f"{what} must name cells of modality {side.name!r}; found {found_names}")
    for side in sides:
        own = names[side.cells].astype(str)
        for given, found in ((pairs, paired), (population, inside)):
            cells = pd.Index([] if given is None else list(given[side.name]), dtype=object).astype(str)
            rows = own.get_indexer(cells)
            if (rows < 0).any():
                raise ValueError(f"modality {side.name!r} has no cell {cells[rows < 0][0]!r}")
            if given is not None and not len(rows):
                raise ValueError(f"no cell of modality {side.name!r} is given; name at least one, or leave it out")
            found.append(rows)
    return paired, inside


def _knowledge(pair: Pair, paired: list[np.ndarray], inside: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Values of the metacells of both modalities that correspond, standardised: one column for each known thing.

    A link gives its feature, a pair the distance to its cell, and a population the share of its cells, all smoothed.
    """
    found = []
    for side, features, cells, members in zip(pair.sides, pair.linked, paired, inside, strict=True):
        place = side.smooth(side.means)[:, :N_COMPONENTS]
        columns = [side.smooth(features), cdist(place, place[side.groups[cells]])]
        if len(members):
            columns.append(side.smooth(group_means(side.groups, _one(members, len(side.groups)), len(side.means))))
        values = np.hstack(columns)
        values = values - side.weights @ values
        found.append(values / np.maximum(np.sqrt(side.weights @ values**2), 1e-12))
    return found[0], found[1]


def _one(members: np.ndarray, n: int) -> np.ndarray:
    """A column that is 1 for members."""
    column = np.zeros((n, 1))
    column[members] = 1
    return column
