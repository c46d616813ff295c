"""Rounds of a linkage: match cells, correlate modalities, smooth, match again."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data import Mosaic
from pyromosaic.linkage.canonical import (
    Canonical,
    canonical_correlation,
    canonical_variables,
    ridged,
)
from pyromosaic.linkage.matching import (
    Correspondence,
    cosine,
    diagonal,
    unit_rows,
)
from pyromosaic.linkage.preprocess import (
    Smoother,
    Standardised,
    Standardiser,
    group_means,
    metacells,
    principal_components,
)
from pyromosaic.links import Links

Match = Callable[[np.ndarray, tuple[np.ndarray, np.ndarray]], Any]
KNOWN_SHARE = 0.2  # weight, in matching by shape, of a handful of links, pairs or a population in the similarity
HANDFUL = 10  # links; more of them weigh as much as in a linkage that starts from them
SURE, LEVEL = 0.01, 0.05  # levels at which one trial, or all trials, show that left-out links agree beyond chance
JUDGE = "check that linked features belong together, add links, or judge the scores by known pairs or labels"
N_JUDGED = 200  # left-out links of a trial that are compared with chance
FEW_RIDGE = 1.0  # least ridge in the first round from known pairs, which may be fewer than the variables
N_EXCHANGES = 999  # exchanges of partners in this comparison


@dataclass
class Side:
    """One of the two modalities of a linkage."""

    name: str
    cells: np.ndarray
    standardiser: Standardiser
    data: Standardised
    loadings: np.ndarray
    components: np.ndarray
    groups: np.ndarray
    means: np.ndarray
    smooth: Smoother

    @classmethod
    def fit(cls, mosaic: Mosaic, name: str, n_pcs: int, n_neighbors: int, n_metacells: int, seed: int) -> "Side":
        """Standardise, reduce and smooth a modality, and divide its cells into metacells."""
        modality = mosaic.modalities[name]
        cells = np.flatnonzero(modality.present)
        if len(cells) <= n_pcs:
            raise ValueError(
                f"modality {name!r} has {len(cells)} cell{'s' * (len(cells) != 1)}; {n_pcs} principal components need "
                f"at least {n_pcs + 1} cells (lower n_pcs, or use more cells)"
            )
        standardiser, data = Standardiser.fit(modality, cells)
        n_varying = int(np.isfinite(data.scale).sum())
        if n_varying < 2:
            raise ValueError(
                f"modality {name!r}: {n_varying} of its {len(data.scale)} features vary within a batch; linkage "
                "needs at least 2"
            )
        loadings = principal_components(data, min(n_pcs, n_varying), seed)
        components = data @ loadings
        groups = metacells(components, n_metacells)
        means = group_means(groups, components, groups.max() + 1)
        return cls(
            name, cells, standardiser, data, loadings, components, groups, means, Smoother.fit(means, n_neighbors)
        )

    @property
    def weights(self) -> np.ndarray:
        """Share of all cells in each metacell."""
        return np.bincount(self.groups) / len(self.groups)


@dataclass
class Pair:
    """Two modalities whose cells are matched.

    Parameters
    ----------
    sides
        The modalities.
    linked
        Standardised linked features of the metacells, each metacells × links.
    match
        Function that matches cells given their similarity.
    link_share
        Weight of the linked features in similarities after the first round.
    ridge, n_components
        Settings of the canonical correlation analysis.
    by_shape
        Correspondence of the first round; if None, it comes from the linked features.
    by_knowledge
        With `by_shape`, the similarity of metacells in what is known, if anything is.
    known
        Row numbers, in the cells of each modality, of the cells that have both; used if the start is ``"pairs"``.
    """

    sides: tuple[Side, Side]
    linked: tuple[np.ndarray, np.ndarray]
    match: Match
    link_share: float
    ridge: float
    n_components: int
    known: tuple[np.ndarray, np.ndarray] = (np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp))
    by_shape: Correspondence | None = None
    by_knowledge: np.ndarray | None = None

    @cached_property
    def pairs(self) -> Correspondence:
        """The known pairs of cells as a correspondence."""
        return Correspondence.from_pairs(*self.known, (len(self.sides[0].cells), len(self.sides[1].cells)))

    def matched(self, similarity: np.ndarray) -> Correspondence:
        """Match metacells by their similarity."""
        return self.correspondence(self.match(similarity, (self.sides[0].weights, self.sides[1].weights)))

    def correspondence(self, plan: Any) -> Correspondence:
        """Correspondence of cells from a transport plan between metacells."""
        return Correspondence(plan, (self.sides[0].groups, self.sides[1].groups))

    def by_links(self, chosen: np.ndarray, start: str) -> np.ndarray | None:
        """Similarity of metacells by the chosen linked features; None if there are no links."""
        if not chosen.any():
            return None
        x, y = (s.smooth(linked[:, chosen]) for s, linked in zip(self.sides, self.linked, strict=True))
        return cosine(*diagonal(x, y, self.n_components)) if start == "diagonal" else cosine(x, y)

    def rounds(self, chosen: np.ndarray, start: str) -> Iterator[tuple[Correspondence, Canonical]]:
        """Match and correlate in rounds, using the chosen links."""
        by_links, share = self.by_links(chosen, start), self.link_share
        if start == "pairs":
            pi = self.pairs
        elif self.by_shape is not None:
            pi = self.by_shape
            if chosen.sum() <= HANDFUL:
                by_links, share = self.by_knowledge, KNOWN_SHARE
        elif by_links is not None:
            pi = self.matched(by_links)
        else:
            raise ValueError("a first matching needs links or a correspondence by shape; found neither")
        while True:
            canonical = self.correlated(pi, start == "pairs")
            yield pi, canonical
            kept = canonical.keep(self.n_components)
            similarity = cosine(*(s.smooth(kept.scores(s.means, k)) for k, s in enumerate(self.sides)))
            if by_links is not None:
                similarity = (1 - share) * similarity + share * by_links
            pi = self.matched(similarity)

    def correlated(self, pi: Correspondence, paired: bool = False) -> Canonical:
        """Canonical variables of a correspondence; if `paired`, known pairs stand for their share of the cells."""
        x, y = (s.components for s in self.sides)
        between = pi.cross_covariance(x, y)
        if not paired:
            return canonical_variables([ridged(values, self.ridge) for values in (x, y)], between)
        if pi is self.pairs:
            return canonical_correlation(x, y, pi, max(self.ridge, FEW_RIDGE))
        share = 2 * len(self.known[0]) / (len(x) + len(y))
        between = share * self.pairs.cross_covariance(x, y) + (1 - share) * between
        return canonical_variables([ridged(values, self.ridge) for values in (x, y)], between)

    def agreement(self, pi: Correspondence, chosen: np.ndarray) -> float:
        """Mean correlation over matched cells of the two features of the chosen links."""
        first, second = pi.marginals
        x, y = (linked[:, chosen] for linked in self.linked)
        x, y = x - first @ x, y - second @ y
        covariance = np.einsum("gl,gl->l", x, pi.plan @ y)
        return float(np.mean(covariance / np.sqrt(np.maximum((first @ x**2) * (second @ y**2), 1e-12))))

    def paired_trial(self, rounds: int, left_out: np.ndarray) -> list[float]:
        """Agreement of known pairs at the positions `left_out`, after each round of a trial without them.

        It is 1 if no cell is more similar to a cell than its partner, and about 0 for partners by chance.
        """
        used = np.setdiff1d(np.arange(len(self.known[0])), left_out)
        trial = replace(self, known=(self.known[0][used], self.known[1][used]))
        agreement = []
        for _, canonical in islice(trial.rounds(np.ones(self.linked[0].shape[1], dtype=bool), "pairs"), rounds):
            kept = canonical.keep(self.n_components)
            scores = [unit_rows(kept.scores(s.components, k)) for k, s in enumerate(self.sides)]
            own = [values[rows[left_out]] for values, rows in zip(scores, self.known, strict=True)]
            partner = (own[0] * own[1]).sum(axis=1, keepdims=True)
            nearer = [(own[k] @ scores[1 - k].T > partner).mean() for k in (0, 1)]
            agreement.append(1 - float(np.sum(nearer)))
        return agreement

    def correlations(self, pi: Correspondence, rows: np.ndarray) -> np.ndarray:
        """Correlations over matched cells of the first features of some links with the second features of all links."""
        first, second = pi.marginals
        x, y = self.linked[0][:, rows], self.linked[1]
        x, y = x - first @ x, y - second @ y
        scale = np.sqrt(np.maximum(np.outer(first @ x**2, second @ y**2), 1e-12))
        return (pi.plan.T @ x).T @ y / scale

    def trial(self, start: str, rounds: int, left_out: np.ndarray) -> list[tuple[float, np.ndarray]]:
        """Agreement of the links at the positions `left_out`, after each round of a trial without them.

        With it come the correlations of their first features (of at most `N_JUDGED` links) with all second features.
        """
        chosen = np.isin(np.arange(self.linked[0].shape[1]), left_out)
        return [
            (self.agreement(pi, chosen), self.correlations(pi, left_out[:N_JUDGED]))
            for pi, _ in islice(self.rounds(~chosen, start), rounds)
        ]


def chance(correlations: np.ndarray, left_out: np.ndarray, seed: int) -> float:
    """Share of exchanges of partners after which left-out links agree at least as well (a permutation test).

    Without links, the share is 1.
    """
    if not len(left_out):
        return 1.0
    rng = np.random.default_rng(seed)
    each, n = np.arange(len(left_out)), correlations.shape[1]
    exchanged = [correlations[each, rng.permutation(n)[: len(each)]].mean() for _ in range(N_EXCHANGES)]
    return float((1 + np.sum(exchanged >= correlations[each, left_out].mean())) / (1 + N_EXCHANGES))


def warn_of_chance(
    pair: Pair, links: Links, start: str, rounds: int, left_out: np.ndarray, correlations: np.ndarray, seed: int
) -> None:
    """Warn if left-out links agree no better than other partners of their features would.

    Judged are links that have no feature in common with those used, because these would make them agree. If the links
    `left_out` of the trial do not settle the question, four more trials leave out a quarter of the first features each.
    """
    first, second = links.pairs[list(links.modalities)].to_numpy().T

    def sharing(some: np.ndarray) -> np.ndarray:
        """Positions of the links that have a feature in common with some links."""
        return np.flatnonzero(np.isin(first, first[some]) | np.isin(second, second[some]))

    judged = left_out[: len(correlations)]
    alone = ~np.isin(judged, sharing(np.setdiff1d(np.arange(len(links)), left_out)))
    p = chance(correlations[alone], judged[alone], seed)
    if p <= SURE:
        return
    judged, correlations = judged[:0], correlations[:0]
    features = np.random.default_rng(seed).permutation(pd.unique(first))
    for part in np.array_split(features, min(4, len(features))):
        own = np.flatnonzero(np.isin(first, part))
        others = np.setdiff1d(sharing(own), own)
        if len(own) + len(others) < len(links):
            found = pair.trial(start, rounds, np.append(own, others))[-1][1][: len(own)]
            judged, correlations = np.append(judged, own[: len(found)]), np.vstack([correlations, found])
    p = chance(correlations, judged, seed)
    if p > LEVEL:
        warnings.warn(
            "it is not clear that the links match the right cells: left out of the matching, linked features "
            f"correlate over matched cells hardly better than other features do (p = {p:.2g}, {len(links)} links); "
            f"{JUDGE}",
            stacklevel=3,
        )
