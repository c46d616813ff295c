"""Imputation: how close imputed values are to held-out measurements."""

from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.stats import rankdata
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.metrics import average_precision_score

from pyromosaic.accepted import Count, Positive, checked
from pyromosaic.metrics._checks import aligned, as_counts, as_finite, as_sparse, check_number, check_same_shape, named
from pyromosaic.metrics.neighbors import nearest_neighbors


@checked
def imputation_spearman(
    truth: Any, imputed: ArrayLike, per: Literal["all", "cell", "feature"] = "all"
) -> float | NDArray[np.float64]:
    """Spearman correlation of imputed and held-out values.

    Parameters
    ----------
    truth
        Held-out values, cells by features, dense or scipy sparse (which stays sparse). Pass expression on the scale of
        the imputed values: from :func:`scale_by_library` if these do not depend on library size, or smoothed by
        :func:`smooth_by_neighbors`.
    imputed
        Imputed values of the same cells and features.
    per
        ``"all"``: one correlation over all entries, which mostly reflects which features are abundant. ``"feature"``:
        one per feature, over cells, which is harder. ``"cell"``: one per cell, over features.

    Returns
    -------
    float or numpy.ndarray
        One number, or one per feature or cell; NaN where either side is constant.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite or `per` is unknown.

    Notes
    -----
    Ties share their mean rank. Only the nonzero entries of the truth are ranked individually: its zeros are one tie,
    and the correlation uses each rank's excess over theirs.

    Examples
    --------
    >>> import numpy as np
    >>> truth = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    >>> imputed = np.array([[0.1, 1.5], [0.2, 9.0], [0.3, 2.5]])
    >>> imputation_spearman(truth, imputed, per="feature")
    array([nan,  1.])

    """
    if per not in ("all", "cell", "feature"):
        raise ValueError(f"`per` must be 'all', 'cell' or 'feature'; found {per!r}.")
    truth, imputed = aligned(("truth", "imputed"), truth, imputed)
    truth, imputed = as_sparse(truth, "truth"), as_finite(imputed, "imputed")
    check_same_shape(truth, imputed, ("truth", "imputed"))
    if per == "all":
        truth, imputed = truth.reshape((-1, 1)), imputed.reshape((-1, 1))
    elif per == "cell":
        truth, imputed = truth.T, imputed.T
    columns = sparse.csc_array(truth)
    nonzero = [slice(*bounds) for bounds in zip(columns.indptr[:-1], columns.indptr[1:], strict=True)]
    correlation = np.array(
        [
            _spearman(columns.data[entries], columns.indices[entries], imputed[:, column])
            for column, entries in enumerate(nonzero)
        ]
    )
    return float(correlation[0]) if per == "all" else correlation


def _spearman(values: NDArray[np.floating], rows: NDArray[np.integer], other: NDArray[np.floating]) -> float:
    """Correlate the ranks of `other` with those of a vector that has `values` at `rows` and zeros elsewhere."""
    n_zeros = other.size - values.size
    mean = (other.size + 1) / 2
    ranks = rankdata(values)
    ranks[values > 0] += n_zeros
    rank_of_zero = np.count_nonzero(values < 0) + (n_zeros + 1) / 2
    other_ranks = rankdata(other)
    other_ranks -= mean
    squares = np.sum((ranks - mean) ** 2) + n_zeros * (rank_of_zero - mean) ** 2
    scale = np.sqrt(squares) * np.sqrt(other_ranks @ other_ranks)
    return float((ranks - rank_of_zero) @ other_ranks[rows] / scale) if scale > 0 else np.nan


def imputation_auprc(truth: Any, probability: ArrayLike) -> float:
    """Area under the precision-recall curve of imputed detection, over all entries.

    Parameters
    ----------
    truth
        Held-out counts, cells by features, dense or scipy sparse; an entry above 0 is a detection.
    probability
        Imputed probability (or any score that increases with it) of the same cells and features.

    Returns
    -------
    float
        Average precision: the mean of the precisions at each score, weighted by the increase in recall. Uninformative
        scores give the share of detections.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite, counts are negative, or nothing was detected.

    Examples
    --------
    >>> imputation_auprc([[0, 1], [2, 0]], [[0.1, 0.8], [0.3, 0.4]])
    0.8333333333333333

    """
    truth, probability = aligned(("truth", "probability"), truth, probability)
    detected, probability = (as_counts(truth, "truth") > 0).toarray(), as_finite(probability, "probability")
    check_same_shape(detected, probability, ("truth", "probability"))
    if not detected.any():
        raise ValueError("`truth` has no entry above 0; precision and recall need at least one detection.")
    return float(average_precision_score(detected.ravel(), probability.ravel()))


@checked
def scale_by_library(counts: Any, total: Positive = 1e4) -> sparse.csr_array | pd.DataFrame:
    """Scale every cell's counts to the same library size.

    Parameters
    ----------
    counts
        Counts, cells by features: a table, dense or scipy sparse.
    total
        Library size of every cell afterwards.

    Returns
    -------
    scipy.sparse.csr_array
        The scaled counts as a CSR array, or as a table with the same names if `counts` is a table; a cell without
        counts keeps zeros.

    Raises
    ------
    ValueError
        If counts are negative or not finite, or `total` is not positive and finite.

    Examples
    --------
    >>> scale_by_library([[1, 3], [0, 0]], total=100).toarray()
    array([[25., 75.],
           [ 0.,  0.]])

    """
    if not 0 < total < np.inf:
        raise ValueError(f"`total` must be a number of counts above 0; found {total!r}.")
    matrix = as_counts(counts, "counts").astype(np.float64)
    library = matrix.sum(axis=1)
    factor = np.divide(total, library, out=np.zeros_like(library), where=library > 0)
    scaled = sparse.diags_array(factor, format="csr") @ matrix
    return named(scaled.toarray(), counts) if isinstance(counts, pd.DataFrame) else scaled


@checked
def smooth_by_neighbors(
    counts: Any,
    method: Literal["pca", "lsi"] = "pca",
    *,
    n_components: Count = 30,
    n_neighbors: Count = 50,
) -> NDArray[np.float32] | pd.DataFrame:
    """Average held-out measurements over similar cells, as a less noisy truth that does not depend on a model.

    Parameters
    ----------
    counts
        Counts, cells by features, dense or scipy sparse.
    method
        ``"pca"`` for expression: average library-scaled counts (10,000 per cell) over cells with similar principal
        components of their log1p. ``"lsi"`` for accessibility: average binarised counts over cells similar in latent
        semantic indexing (TF-IDF of the binarised counts, then a truncated singular value decomposition); the values
        are shares of neighbours in which the region is open.
    n_components
        Number of components in which distances are computed.
    n_neighbors
        Number of neighbours to average, by Euclidean distance. The cell itself is left out, and with it its noise.

    Returns
    -------
    numpy.ndarray
        Smoothed values, cells by features, dense; a table with the same names if `counts` is a table.

    Raises
    ------
    ValueError
        If counts are negative or not finite, there are too few cells or features for `n_components` or too few cells
        for `n_neighbors`, or `method` is unknown.

    Notes
    -----
    From the MultiVI paper (Ashuach et al., Nature Methods 2023), Methods, "Expression smoothing" and "KNN-based
    estimate of accessibility". Term frequencies are weighted by the smoothed inverse document frequency, and each
    cell's vector is scaled to length one to remove sequencing depth; the paper does not specify the variant.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.random.default_rng(0).poisson(1.0, (40, 20))
    >>> smooth_by_neighbors(counts, n_components=5, n_neighbors=10).shape
    (40, 20)
    """
    if method not in ("pca", "lsi"):
        raise ValueError(f"`method` must be 'pca' (expression) or 'lsi' (accessibility); found {method!r}.")
    given, counts = counts, as_counts(counts, "counts")
    check_number(n_components, "n_components", min(counts.shape) - 1, "fewer than cells and features")
    check_number(n_neighbors, "n_neighbors", counts.shape[0] - 1, "the number of other cells")
    # ARPACK finds the leading components without making sparse counts dense; its fixed seed only sets the start.
    if method == "pca":
        profiles = sparse.csr_array(scale_by_library(counts))
        space = PCA(n_components, svd_solver="arpack", random_state=0).fit_transform(profiles.log1p())
    else:
        profiles = (counts > 0).astype(np.float64)
        weighted = TfidfTransformer().fit_transform(profiles)
        space = TruncatedSVD(n_components, algorithm="arpack", random_state=0).fit_transform(weighted)
    neighbors = nearest_neighbors(space, n_neighbors)
    weights = np.full(neighbors.size, 1 / n_neighbors, dtype=np.float32)
    average: sparse.csr_array = sparse.csr_array(
        (weights, neighbors.ravel(), np.arange(0, neighbors.size + 1, n_neighbors)), shape=(len(space), len(space))
    )
    return named((average @ profiles.astype(np.float32)).toarray(), given)
