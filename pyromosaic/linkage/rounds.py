"""Rounds of a linkage: match cells, correlate modalities, smooth, match again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from scipy import sparse

from pyromosaic.data import Mosaic
from pyromosaic.linkage.canonical import (
    Canonical,
    canonical_correlation,
)
from pyromosaic.linkage.matching import (
    Correspondence,
    cosine,
    diagonal,
    gromov_wasserstein,
)
from pyromosaic.linkage.preprocess import (
    Smoother,
    Standardised,
    Standardiser,
    group_means,
    metacells,
    principal_components,
)

Match = Callable[[np.ndarray, tuple[np.ndarray, np.ndarray]], Any]
N_COARSE = 256  # metacells for matching by geometry
N_JUDGED = 200  # left-out links of a trial that are compared with chance
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
    """

    sides: tuple[Side, Side]
    linked: tuple[np.ndarray, np.ndarray]
    match: Match
    link_share: float
    ridge: float
    n_components: int

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

    def by_geometry(self, similarity: np.ndarray | None) -> Correspondence:
        """Match coarse metacells by geometry, and by the similarity of metacells if it is given."""
        coarse = [metacells(s.means, N_COARSE) for s in self.sides]
        share = []  # weight of each metacell within its coarse metacell
        for groups, side in zip(coarse, self.sides, strict=True):
            total = np.bincount(groups, side.weights)
            share.append(sparse.csr_array((side.weights / total[groups], (groups, np.arange(len(groups))))))
        if similarity is not None:
            similarity = share[0] @ similarity @ share[1].T
        means = [a @ s.means for a, s in zip(share, self.sides, strict=True)]
        weights = [np.bincount(g, s.weights) for g, s in zip(coarse, self.sides, strict=True)]
        plan = gromov_wasserstein(means[0], means[1], (weights[0], weights[1]), similarity)
        return self.correspondence(share[0].T @ plan @ share[1])

    def rounds(self, chosen: np.ndarray, start: str) -> Iterator[tuple[Correspondence, Canonical]]:
        """Match and correlate in rounds, using the chosen links."""
        by_links = self.by_links(chosen, start)
        if by_links is None or start == "geometry":
            pi = self.by_geometry(by_links)
        else:
            pi = self.matched(by_links)
        while True:
            canonical = self.correlated(pi)
            yield pi, canonical
            kept = canonical.keep(self.n_components)
            similarity = cosine(*(s.smooth(kept.scores(s.means, k)) for k, s in enumerate(self.sides)))
            if by_links is not None:
                similarity = (1 - self.link_share) * similarity + self.link_share * by_links
            pi = self.matched(similarity)

    def correlated(self, pi: Correspondence) -> Canonical:
        """Canonical variables of a correspondence."""
        first, second = (s.components for s in self.sides)
        return canonical_correlation(first, second, pi, self.ridge)

    def agreement(self, pi: Correspondence, chosen: np.ndarray) -> float:
        """Mean correlation over matched cells of the two features of the chosen links."""
        first, second = pi.marginals
        x, y = (linked[:, chosen] for linked in self.linked)
        x, y = x - first @ x, y - second @ y
        covariance = np.einsum("gl,gl->l", x, pi.plan @ y)
        return float(np.mean(covariance / np.sqrt(np.maximum((first @ x**2) * (second @ y**2), 1e-12))))

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
