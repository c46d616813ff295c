"""Alignment without links: shapes of two modalities are matched from many starts, and the results are judged.

Each modality is described by metacells, several times, from different cells (draws). In each draw, Gromov–Wasserstein
transport between geodesic distances gives a matching from each of many starts. Each is refined by matching and
correlating in turn. Then two populations of the best exchange their partners, until no exchange is better. The score
of a matching is high if one half of the features, used for matching, makes the other half correlate, if both halves
match the same cells, and if distances agree. All draws, and more that do not search, judge the best matchings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import minimum_spanning_tree, shortest_path
from scipy.spatial.distance import cdist

from pyromosaic.linkage.canonical import inverse_root, ridged
from pyromosaic.linkage.matching import Correspondence, cosine, transport
from pyromosaic.linkage.preprocess import Standardised, group_means, metacells, principal_components
from pyromosaic.linkage.rounds import KNOWN_SHARE, Side

N_DRAWS, N_JUDGES = 8, 24  # draws that search, and all draws, which judge
N_STARTS, N_METACELLS, N_POPULATIONS = 16, 128, 8
N_FITTED = 5000  # cells that place the metacells of a draw
N_COMPONENTS = 15  # principal components in distances
N_CANONICAL = 10  # canonical variables in the refinement
N_KEPT = 4  # matchings of a draw that all draws judge
RIDGE = 0.2
SAME = 0.7  # overlap above which two matchings count as one
EQUAL = 0.95  # overlap above which a search takes two matchings for equal; small populations may differ
TEMPERATURE = 0.05  # difference of scores at which a matching has 1/e of the weight of the best
N_SHUFFLES = 20  # exchanges of cells that show what is shared by chance
N_REGIONS = 16  # regions of equal size, over which the partners of a cell are compared


@dataclass(frozen=True)
class Shape:
    """One draw of the metacells of a modality.

    Parameters
    ----------
    groups
        Metacell of each cell.
    weights
        Share of the cells in each metacell.
    geodesic, straight
        Distances between metacells along the graph of neighbours and in principal components, with mean 1.
    smooth
        Matrix that averages over neighbours.
    values
        White principal components of all features, and of two halves of the features.
    axes
        Leading principal components, for starts.
    known
        What is known of the metacells: values that correspond to those of the other modality, shape (metacells, any).
    populations
        Population of each metacell.
    """

    groups: np.ndarray
    weights: np.ndarray
    geodesic: np.ndarray
    straight: np.ndarray
    smooth: np.ndarray
    values: tuple[np.ndarray, ...]
    axes: np.ndarray
    known: np.ndarray
    populations: np.ndarray

    @classmethod
    def draw(cls, components: np.ndarray, white: Sequence[np.ndarray], known: np.ndarray, seed: int) -> "Shape":
        """Place metacells by k-means on four fifths of the cells, at most `N_FITTED`."""
        from sklearn.cluster import KMeans

        x, n_cells = components[:, :N_COMPONENTS], len(components)
        rng = np.random.default_rng(seed)
        fitted = rng.permutation(n_cells)[: min(max(n_cells * 4 // 5, 2), N_FITTED)]
        n = int(np.clip(len(fitted) // 5, 2, N_METACELLS))
        means = KMeans(n, n_init=1, max_iter=10, random_state=seed).fit(x[fitted]).cluster_centers_
        nearest = np.concatenate([cdist(part, means).argmin(axis=1) for part in np.array_split(x, 1 + n_cells // 4096)])
        groups = np.unique(nearest, return_inverse=True)[1]
        n = int(np.max(groups)) + 1
        means = group_means(groups, x, n)
        straight = cdist(means, means)
        k = min(8, n - 1)
        order = np.argsort(straight, axis=1)[:, 1 : k + 1]
        rows = np.repeat(np.arange(n), k)
        near = sparse.csr_array((straight[rows, order.ravel()], (rows, order.ravel())), shape=(n, n))
        near = near.maximum(sparse.csr_array(minimum_spanning_tree(straight)))  # connected
        geodesic = shortest_path(near, directed=False)
        k = min(5, n - 1)
        smooth = 0.3 * np.eye(n)
        smooth[np.repeat(np.arange(n), k), order[:, :k].ravel()] = 0.7 / k
        return cls(
            groups,
            np.bincount(groups) / n_cells,
            geodesic / geodesic.mean(),
            straight / straight.mean(),
            smooth,
            tuple(group_means(groups, v, n) for v in white),
            means[:, :4],
            group_means(groups, known, n),
            fcluster(linkage(means, "ward"), N_POPULATIONS, "maxclust") - 1,
        )

    def carried(self, other: "Shape") -> np.ndarray:
        """Share of each metacell of another draw that lies in each metacell of this one, shape (this, the other)."""
        shares = sparse.coo_array(
            (1 / np.bincount(other.groups)[other.groups], (self.groups, other.groups)),
            shape=(len(self.weights), len(other.weights)),
        )
        return np.asarray(shares.toarray())


@dataclass(frozen=True)
class Draw:
    """Metacells of both modalities, and what is done with them."""

    first: Shape
    second: Shape

    def refined(self, plan: np.ndarray, part: int = 0, rounds: int = 4) -> np.ndarray:
        """Correlate and match in turn, by all features (part 0) or one half of them (1 or 2)."""
        x, y = self.first.values[part], self.second.values[part]
        weights, by_known = (self.first.weights, self.second.weights), self.dissimilarity
        for _ in range(rounds):
            u, r, vt = _correlated(plan, x, y)
            u, r, v = u[:, :N_CANONICAL], r[:N_CANONICAL], vt.T[:, :N_CANONICAL]
            similarity = cosine(self.first.smooth @ (x @ u * r), self.second.smooth @ (y @ v * r))
            if by_known is not None:
                similarity = (1 - KNOWN_SHARE) * similarity + KNOWN_SHARE * np.maximum(1 - by_known, -1).astype(
                    np.float32
                )
            plan = transport(similarity, weights, n_iterations=30).astype(np.float64)
        return plan / plan.sum()

    @cached_property
    def dissimilarity(self) -> np.ndarray | None:
        """Mean squared difference of the known values; None if nothing is known."""
        x, y = self.first.known, self.second.known
        return cdist(x, y, "sqeuclidean") / x.shape[1] if x.shape[1] else None

    def between(self, plan: np.ndarray, part: int) -> float:
        """Sum of squared canonical correlations of all features or a half of them over a matching."""
        r = _correlated(plan, self.first.values[part], self.second.values[part])[1]
        return float((r[:N_CANONICAL] ** 2).sum())

    def distortion(self, plan: np.ndarray) -> float:
        """Gromov–Wasserstein cost of a matching: mean squared difference of distances.

        Mass that a matching of unequal populations leaves over is matched with all that is left, at its high cost.
        """
        a, b, plan = self.first.straight, self.second.straight, self.balanced(plan)
        p, q = self.first.weights, self.second.weights
        return float(p @ a**2 @ p + q @ b**2 @ q - 2 * np.sum((a @ plan @ b) * plan))

    def score(self, plan: np.ndarray) -> float:
        """Logarithm of shared correlation times agreement over `distortion`, less the disagreement with what is known.

        Cells are matched by each half of the features. Shared is what the other half correlates; agreement is the
        overlap of the two matchings. A matching that bends masses to correlate more has less of it.
        """
        first, second = self.refined(plan, 1, 3), self.refined(plan, 2, 3)
        shared = (self.between(first, 2) + self.between(second, 1)) / 2
        agreement = float(np.minimum(first, second).sum())
        return float(np.log(max(shared * agreement, 1e-12) / max(self.distortion(plan), 1e-12))) - self.against(plan)

    def against(self, plan: np.ndarray) -> float:
        """Disagreement of a matching with what is known; 0 if nothing is."""
        return 0.0 if self.dissimilarity is None else float((plan * self.dissimilarity).sum())

    def starts(self, seed: int) -> Iterator[np.ndarray]:
        """Plans to start from: uniform, eccentricities, distances to single metacells, principal components."""
        rng, a, b = np.random.default_rng(seed), self.first, self.second
        yield np.outer(a.weights, b.weights)
        yield self.ordered(a.geodesic @ a.weights, b.geodesic @ b.weights)
        for s in range(N_STARTS - 2):
            if s % 4 == 0:
                column, sign = rng.integers(b.axes.shape[1]), rng.choice([-1, 1])
                yield self.ordered(a.axes[:, s // 4 % a.axes.shape[1]], sign * b.axes[:, column])
            else:
                yield self.ordered(a.geodesic[rng.integers(len(a.weights))], b.geodesic[rng.integers(len(b.weights))])

    def ordered(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Plan that matches metacells of similar rank."""
        x, y = _ranks(x, self.first.weights), _ranks(y, self.second.weights)
        plan = transport(1 - (x[:, None] - y) ** 2, (self.first.weights, self.second.weights), epsilon=0.01)
        return self.balanced(plan)

    def balanced(self, plan: np.ndarray) -> np.ndarray:
        """The nearest plan, roughly, with exactly the weights of the metacells, as Gromov–Wasserstein needs it."""
        p, q = self.first.weights, self.second.weights
        plan = plan * np.minimum(p / np.maximum(plan.sum(axis=1), 1e-300), 1)[:, None]
        plan = plan * np.minimum(q / np.maximum(plan.sum(axis=0), 1e-300), 1)
        missing = p - plan.sum(axis=1), q - plan.sum(axis=0)
        return plan + np.outer(*missing) / max(missing[0].sum(), 1e-300)

    def by_distances(self, start: np.ndarray) -> np.ndarray:
        """Gromov–Wasserstein transport from a start, fused with what is known."""
        ot = pot()
        shapes = self.first.geodesic, self.second.geodesic, self.first.weights, self.second.weights
        options = {"G0": start, "max_iter": 30, "tol_rel": 1e-4}
        if self.dissimilarity is None:
            return ot.gromov.gromov_wasserstein(*shapes, **options)
        return ot.gromov.fused_gromov_wasserstein(self.dissimilarity, *shapes, alpha=0.5, **options)

    def search(self, seed: int) -> list[np.ndarray]:
        """Different refined matchings, the best first: from all starts, then by exchanges of two populations.

        Exchanges start from the best matching, until none is better.
        """
        found: list[tuple[float, np.ndarray]] = []

        def add(plans: Iterator[np.ndarray]) -> None:
            for plan in plans:
                plan = self.refined(plan)
                if all(np.minimum(plan, other).sum() < EQUAL for _, other in found):
                    found.append((self.score(plan), plan))
            found.sort(key=lambda each: -each[0])

        add(self.by_distances(start) for start in self.starts(seed))
        best: np.ndarray | None = None
        while found[0][1] is not best:
            best = found[0][1]
            add(_exchanged(best, self.first.populations))
            add(each.T for each in _exchanged(best.T, self.second.populations))
        kept: list[np.ndarray] = []
        for _, plan in found:
            if len(kept) < N_KEPT and all(np.minimum(plan, other).sum() < SAME for other in kept):
                kept.append(plan)
        return kept


def pot() -> Any:
    """The package POT.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed.
    """
    try:
        import ot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matching by geometry needs POT, which is not installed; run pip install 'pyromosaic[linkage]'"
        ) from error
    return ot


@dataclass(frozen=True)
class Matching:
    """A matching that the draws judged.

    Parameters
    ----------
    score
        Mean score over the draws; higher is better.
    cost
        Mean Gromov–Wasserstein cost over the draws.
    weight
        Weight among all matchings.
    correspondence
        The correspondence of the cells, in the first draw.
    """

    score: float
    cost: float
    weight: float
    correspondence: Correspondence


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Parameters
    ----------
    matchings
        Different matchings, the best first.
    confidence
        For each modality, the confidence in each cell's match, from 0 to 1.
    populations
        For each modality, the population of each cell.
    shared
        Shared correlation of the best matching, and the largest by chance.
    changed
        Share of the partners that what is known has changed, among the matchings that were found.
    """

    matchings: list[Matching]
    confidence: tuple[np.ndarray, np.ndarray]
    populations: tuple[np.ndarray, np.ndarray]
    shared: tuple[float, float]
    changed: float


def search(sides: tuple[Side, Side], known: tuple[np.ndarray, np.ndarray], seed: int) -> Found:
    """Match two modalities by their shapes.

    Parameters
    ----------
    sides
        The modalities.
    known
        Values of the metacells of the sides that correspond, standardised, each metacells × values.
    seed
        Seed of draws and starts.
    """
    draws = [
        Draw(
            *(
                Shape.draw(
                    side.components,
                    [_white(x) for x in (side.components, *_halves(side, seed + i))],
                    values[side.groups],
                    seed + 1000 * i,
                )
                for side, values in zip(sides, known, strict=True)
            )
        )
        for i in range(N_JUDGES)
    ]
    pool: list[list[np.ndarray]] = []  # each matching in each draw
    scores: list[float] = []
    against: list[float] = []
    for i, origin in enumerate(draws[:N_DRAWS]):
        for plan in origin.search(seed + i):
            plans = [
                d.refined(d.first.carried(origin.first) @ plan @ d.second.carried(origin.second).T, rounds=2)
                for d in draws
            ]
            pool.append(plans)
            scores.append(float(np.mean([d.score(p) for d, p in zip(draws, plans, strict=True)])))
            against.append(float(np.mean([d.against(p) for d, p in zip(draws, plans, strict=True)])))
    order = np.argsort(scores)[::-1]
    weight = np.exp((np.array(scores)[order] - max(scores)) / TEMPERATURE)
    pool = [pool[i] for i in order]
    first = draws[0]
    populations = first.first.populations[first.first.groups], first.second.populations[first.second.groups]
    regions = [metacells(side.components[:, :N_COMPONENTS], N_REGIONS) for side in sides]
    profiles = [_profiles(draws, plans, regions) for plans in pool]
    kept: list[int] = []
    merged = np.zeros(len(pool))
    for i, profile in enumerate(profiles):
        same = [j for j in kept if _overlap(profile, profiles[j]).mean() > SAME]
        if not same:
            kept.append(i)
        j = same[0] if same else i
        merged[j] = max(merged[j], weight[i])
    confidence = []
    for k in (0, 1):
        agreeing = [np.minimum(profiles[i][k], profiles[0][k]).sum(axis=1) for i in kept]
        confidence.append(np.average(agreeing, axis=0, weights=merged[kept]))
    unaided = int(np.argmax((np.array(scores) + against)[order]))
    groups = first.first.groups, first.second.groups
    matchings = [
        Matching(
            float(scores[order[i]]),
            float(np.mean([d.distortion(p) for d, p in zip(draws, pool[i], strict=True)])),
            float(merged[i] / merged.sum()),
            Correspondence(pool[i][0], groups),
        )
        for i in kept
    ]
    return Found(
        matchings,
        (confidence[0], confidence[1]),
        populations,
        _evidence(first, pool[0][0], [_halves(side, seed, common=False) for side in sides], seed),
        1 - float(_overlap(profiles[unaided], profiles[0]).mean()),
    )


def _halves(side: Side, seed: int, common: bool = True) -> list[np.ndarray]:
    """Principal components of two random halves of the features, with or without their mean feature.

    Totals and the centring of log ratios add the same number to all features of a cell. Both halves have it, although
    no two features are related.
    """
    data, found = side.data, []
    varying = np.flatnonzero(np.isfinite(data.scale))
    half = np.zeros(len(data.scale), dtype=np.intp)
    half[varying] = 1 + np.random.default_rng(seed).permutation(len(varying)) % 2
    for h in (1, 2):
        part = Standardised(data.values, data.batch, data.mean, np.where(half == h, data.scale, np.inf))
        n = min(side.components.shape[1], int((half == h).sum()))
        loadings = principal_components(part, n, seed)
        if not common:
            mean = 1 / part.scale
            loadings = loadings - np.outer(mean, mean @ loadings) / (mean @ mean)
        found.append(part @ loadings)
    return found


def _white(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0)) @ inverse_root(ridged(x, RIDGE))


def _evidence(draw: Draw, plan: np.ndarray, halves: list[list[np.ndarray]], seed: int) -> tuple[float, float]:
    """How much the modalities share, and the largest value by chance.

    Metacells and matching use one half of the features only, therefore nothing is shared by unrelated features. Chance
    exchanges the cells of the other half, in one modality.
    """
    rng, total = np.random.default_rng(seed), np.zeros(1 + N_SHUFFLES)
    white = [[_white(x) for x in parts] for parts in halves]
    for half in (0, 1):
        shapes = [
            Shape.draw(parts[half], [values[half]], np.zeros((len(values[half]), 0)), seed)
            for parts, values in zip(halves, white, strict=True)
        ]
        start = shapes[0].carried(draw.first) @ plan @ shapes[1].carried(draw.second).T
        matched = Draw(shapes[0], shapes[1]).refined(start, 0, 3)
        for i in range(1 + N_SHUFFLES):
            judged = [values[1 - half] for values in white]
            if i:
                judged[i % 2] = judged[i % 2][rng.permutation(len(judged[i % 2]))]
            means = [group_means(s.groups, v, len(s.weights)) for s, v in zip(shapes, judged, strict=True)]
            total[i] += float((_correlated(matched, *means)[1][:N_CANONICAL] ** 2).sum()) / 2
    return float(total[0]), float(np.max(total[1:]))


def _correlated(plan: np.ndarray, x: np.ndarray, y: np.ndarray) -> Any:
    """Singular value decomposition of the covariance of white values over a matching."""
    plan = plan / plan.sum()
    covariance = (plan.T @ x).T @ y - np.outer(plan.sum(axis=1) @ x, plan.sum(axis=0) @ y)
    return np.linalg.svd(covariance, full_matrices=False)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rank of each metacell as a share of the cells, from 0 to 1."""
    order, ranks = np.argsort(values), np.empty(len(values))
    ranks[order] = np.cumsum(weights[order]) - weights[order] / 2
    return ranks


def _exchanged(plan: np.ndarray, populations: np.ndarray) -> Iterator[np.ndarray]:
    """Plans in which two populations of the first modality have exchanged their partners."""
    for i in range(populations.max() + 1):
        for j in range(i):
            a, b = populations == i, populations == j
            exchanged, (own, other) = plan.copy(), (plan[a], plan[b])
            exchanged[a] = np.outer(own.sum(axis=1), other.sum(axis=0) / other.sum())
            exchanged[b] = np.outer(other.sum(axis=1), own.sum(axis=0) / own.sum())
            yield exchanged


def _profiles(draws: list[Draw], plans: list[np.ndarray], regions: list[np.ndarray]) -> list[np.ndarray]:
    """For each modality, the share of each cell's partners in each region of the other, averaged over draws."""
    total: list[Any] = [0.0, 0.0]
    for draw, plan in zip(draws, plans, strict=True):
        shapes = draw.first, draw.second
        for k, each in enumerate((plan, plan.T)):
            members = group_means(shapes[1 - k].groups, np.eye(N_REGIONS)[regions[1 - k]], each.shape[1])
            rows = each @ members / np.maximum(each.sum(axis=1, keepdims=True), 1e-300)
            total[k] = total[k] + rows[shapes[k].groups] / len(draws)
    return total


def _overlap(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    return np.array([np.minimum(x, y).sum(axis=1).mean() for x, y in zip(a, b, strict=True)])
