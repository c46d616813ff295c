"""Soft correspondences between the cells of two modalities, and ways to match cells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist, squareform

from pyromosaic.accepted import Count, Length, Positive, Share, checked
from pyromosaic.linkage.preprocess import group_means


@dataclass(frozen=True)
class Correspondence:
    r"""Soft correspondence of the cells of two modalities: a nonnegative matrix :math:`\Pi` with sum one.

    Cells of a group (a metacell) share their correspondence equally. Therefore a data set of any size needs only the
    matrix between groups: :math:`\Pi_{ij}` is ``plan[g, h] / (size of g · size of h)`` for i in g and j in h.

    Parameters
    ----------
    plan
        Correspondence of groups, array or sparse, shape (groups of the first modality, groups of the second).
    groups
        Group of each cell, for each modality.
    """

    plan: Any
    groups: tuple[np.ndarray, np.ndarray]

    def __post_init__(self) -> None:
        total = float(self.plan.sum())
        if not np.isfinite(total) or total <= 0:
            raise ValueError("a correspondence needs at least one pair of cells with positive weight; found none")
        object.__setattr__(self, "plan", self.plan / total)

    @classmethod
    def from_pairs(cls, first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> "Correspondence":
        """Known pairs of cells with equal weights; only for upper bounds in evaluations.

        Parameters
        ----------
        first, second
            Row numbers of the two cells of each pair.
        shape
            Number of cells of each modality.
        """
        plan = sparse.csr_array((np.ones(len(first)), (first, second)), shape=shape)
        return cls(plan, (np.arange(shape[0]), np.arange(shape[1])))

    @classmethod
    def from_labels(cls, first: Sequence[Any], second: Sequence[Any]) -> "Correspondence":
        """All cells with the same label correspond; this is supervised, and must be reported as such.

        Parameters
        ----------
        first, second
            Label of each cell; cells without a label, or whose label the other modality lacks, are left out.
        """
        labels = pd.Index(pd.Series(first).dropna().unique()).intersection(pd.Index(pd.Series(second).dropna()))
        groups = tuple(labels.get_indexer(pd.Index(cells)) % (len(labels) + 1) for cells in (first, second))
        size = [np.bincount(g, minlength=len(labels) + 1)[:-1] for g in groups]
        plan = np.zeros((len(labels) + 1,) * 2)
        np.fill_diagonal(plan[:-1, :-1], np.minimum(*(s / s.sum() for s in size)))
        return cls(plan, groups)

    @property
    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight of each group in both modalities."""
        return np.asarray(self.plan.sum(axis=1)).ravel(), np.asarray(self.plan.sum(axis=0)).ravel()

    def means(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the cells' values over each group, for both modalities."""
        n, m = self.plan.shape
        return group_means(self.groups[0], x, n), group_means(self.groups[1], y, m)

    def cross_covariance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        r""":math:`X^T \Pi Y - (X^T \Pi 1) (1^T \Pi Y)`, shape (columns of x, columns of y)."""
        x, y = self.means(x, y)
        first, second = self.marginals
        return (self.plan.T @ x).T @ y - np.outer(first @ x, second @ y)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw n pairs of cells with probabilities from the correspondence: row numbers in both modalities."""
        plan = sparse.csr_array(self.plan)
        cumulative = np.cumsum(plan.data, dtype=np.float64)
        chosen = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right")
        first = np.searchsorted(plan.indptr, chosen, side="right") - 1
        rows, columns = (
            _members(groups, of, rng) for groups, of in zip(self.groups, (first, plan.indices[chosen]), strict=True)
        )
        return rows, columns


def _members(groups: np.ndarray, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one cell from each chosen group."""
    size = np.bincount(groups)
    first = np.cumsum(size) - size
    return np.argsort(groups, kind="stable")[first[chosen] + (rng.random(len(chosen)) * size[chosen]).astype(np.intp)]


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cosine similarity of all pairs of rows, shape (rows of x, rows of y), in single precision to save memory."""
    x, y = unit_rows(x).astype(np.float32), unit_rows(y).astype(np.float32)
    return x @ y.T


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; a row of zeros stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@checked
def transport(
    similarity: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    *,
    epsilon: Positive = 0.02,
    reach: Length = 2.0,
    n_iterations: Count = 100,
) -> np.ndarray:
    """Entropic optimal transport with cost 1 - similarity: a soft matching of similar cells.

    The entropy is relative to the product of the weights, so that splitting a cell into two has no effect.

    Parameters
    ----------
    similarity
        Similarity of all pairs of cells, at most 1.
    weights
        Weight of each cell, for both modalities.
    epsilon
        Weight of the entropy, on the scale of the similarity; smaller values give a harder matching.
    reach
        Cost (times the divergence) of deviating from the weights, on the scale of the similarity: cells unlike all
        cells of the other modality get less weight. Infinity gives balanced transport, in which every cell keeps its
        full weight.
    n_iterations
        Number of Sinkhorn steps.

    Returns
    -------
    numpy.ndarray
        The transport plan, with the shape of `similarity`; if balanced, its row and column sums are the weights.
    """
    balanced = np.isinf(reach)
    # Balanced transport rescales rows anyway: set each row's largest kernel to 1, so that no row underflows.
    best = similarity.max(axis=1, keepdims=True) if balanced else 1.0
    kernel = np.exp((similarity - best) / epsilon)
    power = 1.0 if balanced else reach / (reach + epsilon)
    first, second = (w.astype(kernel.dtype) for w in weights)
    tiny = np.finfo(kernel.dtype).tiny
    v = np.ones_like(second)
    for _ in range(n_iterations):
        u = np.maximum(kernel @ (second * v), tiny) ** -power
        v = np.maximum((first * u) @ kernel, tiny) ** -power
    return (first * u)[:, None] * kernel * (second * v)


@checked
def mutual_nearest(
    similarity: np.ndarray, weights: tuple[np.ndarray, np.ndarray], *, k: Count = 30
) -> sparse.csr_array:
    """Pairs of cells that are among each other's k most similar cells, with equal weights.

    Parameters
    ----------
    similarity
        Similarity of all pairs of cells, shape (n, m).
    weights
        Weight of each cell, for both modalities; not used, because all pairs have equal weights.
    k
        Two cells are a pair if each is among the k cells most similar to the other.

    Returns
    -------
    scipy.sparse.csr_array
        1 for pairs, shape (n, m).

    Examples
    --------
    >>> weights = np.full(3, 1 / 3), np.full(3, 1 / 3)
    >>> mutual_nearest(np.eye(3), weights, k=1).toarray()
    array([[1., 0., 0.],
           [0., 1., 0.],
           [0., 0., 1.]])
    """
    n, m = similarity.shape
    k = min(k, n, m)
    best = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    chosen: sparse.csr_array = sparse.csr_array(
        (np.ones(n * k), (np.repeat(np.arange(n), k), best.ravel())), shape=(n, m)
    )
    best = np.argpartition(-similarity, k - 1, axis=0)[:k]
    back: sparse.csr_array = sparse.csr_array((np.ones(m * k), (best.ravel(), np.tile(np.arange(m), k))), shape=(n, m))
    return chosen.multiply(back).tocsr()


@checked
def assignment(
    similarity: np.ndarray, weights: tuple[np.ndarray, np.ndarray], *, keep: Share = 0.8
) -> sparse.csr_array:
    """One-to-one matching with the largest total similarity; only the most similar pairs are kept.

    Parameters
    ----------
    similarity
        Similarity of all pairs of cells, shape (n, m).
    weights
        Weight of each cell, for both modalities; not used, because all matched cells have equal weights.
    keep
        Share of the matched pairs to keep, the most similar first.

    Returns
    -------
    scipy.sparse.csr_array
        1 for matched cells, shape (n, m).
    """
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    value = similarity[rows, columns]
    kept = value >= np.quantile(value, 1 - keep)
    return sparse.csr_array((np.ones(kept.sum()), (rows[kept], columns[kept])), shape=similarity.shape)


@checked
def diagonal(x: np.ndarray, y: np.ndarray, n_components: Count = 15) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of cells on the singular vectors of ``x @ y.T``, computed without forming that product.

    This is canonical correlation analysis with diagonal covariances (Butler et al., Nature Biotechnology 2018).

    Parameters
    ----------
    x, y
        Standardised linked features, cells × links.
    n_components
        Number of singular vectors, at most the number of links.

    Returns
    -------
    tuple of numpy.ndarray
        Left and right singular vectors; each row is scaled to length one.
    """
    n_links = x.shape[1]
    basis = x @ np.random.default_rng(0).standard_normal((n_links, min(n_components + 10, n_links)))
    for _ in range(6):
        basis = x @ (y.T @ (y @ (x.T @ np.linalg.qr(basis)[0])))
    basis = np.linalg.qr(basis)[0]
    u, _, vt = np.linalg.svd((basis.T @ x) @ y.T, full_matrices=False)
    return unit_rows(basis @ u[:, :n_components]), unit_rows(vt.T[:, :n_components])


@checked
def gromov_wasserstein(
    x: np.ndarray,
    y: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    similarity: np.ndarray | None = None,
    *,
    geometry: Share | None = None,
) -> np.ndarray:
    """Match cells with similar distances to all other cells: fused Gromov–Wasserstein transport.

    Without links, cells are matched only by the geometry of the data, up to its symmetries: two cell types that are
    equally far from the others cannot be distinguished.

    Parameters
    ----------
    x, y
        Principal components of a few hundred metacells of each modality.
    weights
        Weight of each metacell, for both modalities.
    similarity
        Similarity of the metacells in their linked features; None if there are no links.
    geometry
        Weight of the distances in the cost, relative to `similarity`; 0.5 by default. Without `similarity`, distances
        are the only cost.

    Returns
    -------
    numpy.ndarray
        The transport plan, shape (rows of x, rows of y); its row and column sums are the weights.

    Raises
    ------
    ModuleNotFoundError
        If the package POT is not installed.
    ValueError
        If `geometry` is given without `similarity`.
    """
    if similarity is None and geometry is not None:
        raise ValueError(f"geometry weighs distances against similarity; found geometry={geometry} without similarity")
    try:
        import ot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matching by geometry needs POT, which is not installed; run pip install 'pyromosaic[linkage]'"
        ) from error
    distances = [squareform(pdist(values)) for values in (x, y)]
    first, second = (d / d.mean() for d in distances)
    if similarity is None:
        return ot.gromov.gromov_wasserstein(first, second, *weights)
    cost = 1 - similarity.astype(np.float64)
    return ot.gromov.fused_gromov_wasserstein(
        cost, first, second, *weights, alpha=0.5 if geometry is None else geometry
    )
