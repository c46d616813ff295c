"""Canonical correlation analysis with a soft correspondence instead of pairs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyromosaic.accepted import Count, Seed, Share, Weight, checked
from pyromosaic.linkage.matching import Correspondence

FEW_PAIRS = 10


@dataclass(frozen=True)
class Canonical:
    """Canonical variables of two modalities.

    Parameters
    ----------
    coefficients
        Matrices that map centred variables to canonical variables, one per modality, shape (variables, components).
    correlations
        Canonical correlations in decreasing order, shape (components,).
    """

    coefficients: tuple[np.ndarray, np.ndarray]
    correlations: np.ndarray

    def keep(self, n_components: int) -> "Canonical":
        """The first components only."""
        first, second = self.coefficients
        return Canonical((first[:, :n_components], second[:, :n_components]), self.correlations[:n_components])

    def rotated(self, covariances: np.ndarray) -> np.ndarray:
        """Cross-covariances of variables, transformed to those of the canonical variables."""
        first, second = self.coefficients
        return first.T @ covariances @ second

    def scores(self, values: np.ndarray, side: int, power: float = 1.0) -> np.ndarray:
        """Canonical variables of the first (0) or second (1) modality, weighted by ``correlations ** power``."""
        return values @ self.coefficients[side] * self.correlations**power


@checked
def canonical_correlation(x: np.ndarray, y: np.ndarray, pi: Correspondence, ridge: Weight = 0.2) -> Canonical:
    r"""Fit canonical variables of two modalities whose cells have a soft correspondence.

    With :math:`C_{xx}, C_{yy}` the covariances of all cells and :math:`C_{xy} = X^T \Pi Y - (X^T \Pi 1)(1^T \Pi Y)`,
    the singular value decomposition :math:`C_{xx}^{-1/2} C_{xy} C_{yy}^{-1/2} = U \,\mathrm{diag}(\rho) V^T` gives the
    coefficients :math:`C_{xx}^{-1/2} U` and :math:`C_{yy}^{-1/2} V`. With true pairs this is ordinary canonical
    correlation analysis; an uninformative correspondence, the product of its marginals, gives :math:`\rho = 0`.

    Parameters
    ----------
    x, y
        Variables (e.g. principal components), cells × variables.
    pi
        The correspondence.
    ridge
        Added to the diagonal of both covariances, as a share of their mean variance.

    Returns
    -------
    Canonical
        As many components as the smaller number of variables, with correlations in decreasing order.
    """
    return canonical_variables([ridged(values, ridge) for values in (x, y)], pi.cross_covariance(x, y))


def ridged(values: np.ndarray, ridge: float) -> np.ndarray:
    """Covariance of the columns, with `ridge` times their mean variance added to the diagonal."""
    covariance = np.atleast_2d(np.cov(values, rowvar=False, bias=True))
    return covariance + ridge * np.diag(covariance).mean() * np.eye(len(covariance))


def canonical_variables(within: Sequence[np.ndarray], between: np.ndarray) -> Canonical:
    """Canonical variables from the covariances within two modalities and between them."""
    first, second = map(inverse_root, within)
    u, correlations, vt = np.linalg.svd(first @ between @ second, full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    return Canonical((first @ u * sign, second @ vt.T * sign), correlations)


@checked
def shuffled_covariances(
    x: np.ndarray, y: np.ndarray, pi: Correspondence, n_shuffles: Count = 20, seed: Seed = 0
) -> np.ndarray:
    """Cross-covariances under shuffled correspondences, shape (n_shuffles, columns of x, columns of y).

    Parameters
    ----------
    x, y, pi
        As in `canonical_correlation`.
    n_shuffles
        Number of shuffles of the second modality's groups.
    seed
        Seed of the shuffles.

    Returns
    -------
    numpy.ndarray
        `Correspondence.cross_covariance` for each shuffle.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.standard_normal((300, 1))
    >>> x, y = (np.hstack([shared, rng.standard_normal((300, 2))]) for _ in range(2))  # one variable in common
    >>> pairs = Correspondence.from_pairs(np.arange(300), np.arange(300), (300, 300))
    >>> shuffled_covariances(x, y, pairs, n_shuffles=50).shape
    (50, 3, 3)
    """
    x, y = pi.means(x, y)
    first, second = pi.marginals
    carried, middle = pi.plan.T @ x, first @ x
    rng, order = np.random.default_rng(seed), _by_content(y)
    null = []
    for _ in range(n_shuffles):
        shuffled = np.empty_like(y)
        shuffled[order] = y[order[rng.permutation(len(y))]]
        null.append(carried.T @ shuffled - np.outer(middle, second @ shuffled))
    return np.array(null)


@checked
def count_components(canonical: Canonical, null: np.ndarray, level: Share = 0.05) -> int:
    """Number of leading components whose correlation is higher than by chance.

    Component k is compared with the largest correlation in shuffled data after components 1 to k - 1 are removed
    (Winkler et al., "Permutation inference for canonical correlation analysis", NeuroImage 2020).

    Parameters
    ----------
    canonical
        All canonical variables.
    null
        Cross-covariances under shuffled correspondences.
    level
        Share of the shuffles that may exceed the correlation.

    Returns
    -------
    int
        Number of components, from 0 to the number of all.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> shared = rng.standard_normal((300, 1))
    >>> x, y = (np.hstack([shared, rng.standard_normal((300, 2))]) for _ in range(2))  # one variable in common
    >>> pairs = Correspondence.from_pairs(np.arange(300), np.arange(300), (300, 300))
    >>> count_components(canonical_correlation(x, y, pairs), shuffled_covariances(x, y, pairs))
    1
    """
    for k, correlation in enumerate(canonical.correlations):
        left = [np.linalg.norm(rotated[k:, k:], 2) for rotated in canonical.rotated(null)]
        if correlation <= np.quantile(left, 1 - level):
            return k
    return len(canonical.correlations)


@checked
def crossfit_correlations(
    x: np.ndarray, y: np.ndarray, pi: Correspondence, ridge: Weight = 0.2, seed: Seed = 0
) -> np.ndarray:
    """Canonical correlations in cells that were not used to estimate the coefficients.

    Both modalities are split into halves. Coefficients from the correspondence within one half are evaluated with the
    correspondence within the other half, and vice versa.

    Parameters
    ----------
    x, y, pi, ridge
        As in `canonical_correlation`.
    seed
        Seed of the split.

    Returns
    -------
    numpy.ndarray
        Mean over both halves, shape (components,); not sorted, and about 0 for an overfitted component; 0
        where the other half does not vary.

    Raises
    ------
    ValueError
        If no cells correspond within a half.

    Warns
    -----
    UserWarning
        If only few pairs of cells do; the spread is that of all cells, therefore values can then exceed 1.
    """
    rng = np.random.default_rng(seed)
    halves = []
    for values in (x, y):
        half = np.empty(len(values), dtype=bool)
        half[_by_content(values)] = rng.permutation(len(values)) % 2 == 0
        halves.append(half)

    @checked
    def part(side: bool) -> tuple[np.ndarray, np.ndarray, Correspondence]:
        cells = [half == side for half in halves]
        (rows, first), (columns, second) = (
            np.unique(groups[c], return_inverse=True) for groups, c in zip(pi.groups, cells, strict=True)
        )
        plan = pi.plan[rows][:, columns]
        if not plan.sum() > 0:
            raise ValueError(
                "crossfit_correlations needs cells that correspond within each half of the cells, drawn separately for "
                "each modality; found none in one half. Use more cells, or another seed"
            )
        n_pairs.append(int(np.bincount(first) @ (plan > 0) @ np.bincount(second)))
        return x[cells[0]], y[cells[1]], Correspondence(plan, (first, second))

    n_pairs: list[int] = []
    held_out = []
    for side in (False, True):
        fit = canonical_correlation(*part(side), ridge)
        x_other, y_other, pi_other = part(not side)
        u, v = (fit.scores(values, k, power=0) for k, values in enumerate((x_other, y_other)))
        spread = u.std(axis=0) * v.std(axis=0)
        covariance = np.diag(pi_other.cross_covariance(u, v))
        held_out.append(np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0))
    if min(n_pairs) < FEW_PAIRS:
        warnings.warn(
            f"the held-out correlations come from few pairs of cells ({min(n_pairs)} within one half) and are rough; "
            "they can even exceed 1",
            stacklevel=3,
        )
    return np.mean(held_out, axis=0)


def inverse_root(covariance: np.ndarray) -> np.ndarray:
    """Inverse square root of a covariance; of none at all, zeros, so that what never varies has no coefficient."""
    variance, directions = np.linalg.eigh(covariance)
    if variance.max() <= 0:
        return np.zeros_like(covariance)
    variance = np.maximum(variance, 1e-12 * variance.max())
    return directions / np.sqrt(variance) @ directions.T


def _by_content(values: np.ndarray) -> np.ndarray:
    """Order of cells by their measurements, so that draws do not depend on the order of the rows."""
    return np.lexsort(values.T)
