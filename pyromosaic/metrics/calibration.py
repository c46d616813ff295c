"""Calibration: whether the stated uncertainty of a model matches its errors."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyromosaic.accepted import Count, checked
from pyromosaic.metrics._checks import aligned, as_finite, check_number, check_same_shape


def interval_coverage(truth: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Share of held-out values inside their predicted intervals, including the ends.

    Parameters
    ----------
    truth
        Held-out values, any shape.
    lower, upper
        Ends of the interval of each value, such as the 5 % and 95 % quantiles of posterior predictive draws; same shape
        as `truth`.

    Returns
    -------
    float
        Coverage from 0 to 1. Intervals of level 90 % are calibrated if it is 0.9; for counts, whose quantiles are whole
        numbers, it is 0.9 or more.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite, or a lower end is above its upper end.

    Examples
    --------
    >>> interval_coverage([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0])
    0.75

    """
    truth, lower, upper = aligned(("truth", "lower", "upper"), truth, lower, upper)
    truth, lower, upper = as_finite(truth, "truth"), as_finite(lower, "lower"), as_finite(upper, "upper")
    check_same_shape(truth, lower, ("truth", "lower"))
    check_same_shape(truth, upper, ("truth", "upper"))
    n_reversed = np.count_nonzero(lower > upper)
    if n_reversed:
        raise ValueError(f"`lower` must not be above `upper`; found this in {n_reversed} of {truth.size} intervals.")
    return float(np.mean((lower <= truth) & (truth <= upper)))


@checked
def reliability_curve(confidence: ArrayLike, correct: ArrayLike, n_bins: Count = 15) -> pd.DataFrame:
    """How often predictions are right, by their stated confidence.

    Parameters
    ----------
    confidence
        Stated probabilities in [0, 1], any shape: of the predicted label, or of an imputed detection.
    correct
        Whether each prediction was right (boolean, or 0 and 1); same shape as `confidence`.
    n_bins
        Number of bins of equal width over (0, 1]. A confidence on an edge belongs to the bin below, 0 to the first bin.

    Returns
    -------
    pandas.DataFrame
        One row per bin: ``lower`` and ``upper`` edge, mean ``confidence``, ``accuracy`` and number ``n`` of
        predictions; the means of an empty bin are NaN. For a calibrated model, accuracy equals confidence in every row.

    Raises
    ------
    ValueError
        If the shapes differ, a confidence is outside [0, 1], or `correct` has values other than 0 and 1.

    Examples
    --------
    >>> reliability_curve([0.1, 0.3, 0.9, 0.9], [0, 1, 1, 1], n_bins=2)
       lower  upper  confidence  accuracy  n
    0    0.0    0.5         0.2       0.5  2
    1    0.5    1.0         0.9       1.0  2

    """
    confidence, correct = aligned(("confidence", "correct"), confidence, correct)
    confidence, correct = as_finite(confidence, "confidence"), as_finite(correct, "correct")
    check_same_shape(confidence, correct, ("confidence", "correct"))
    low, high = np.min(confidence), np.max(confidence)
    if low < 0 or high > 1:
        raise ValueError(f"`confidence` must be probabilities, from 0 to 1; found {low:g} to {high:g}.")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("`correct` must be 0 or 1 for each prediction; found other values.")
    check_number(n_bins, "n_bins", np.iinfo(np.int32).max, "bins of equal width")
    edges = np.linspace(0, 1, n_bins + 1)
    means = _means_by_bin(confidence, edges, {"confidence": confidence, "accuracy": correct}).reindex(range(n_bins))
    means.insert(0, "lower", edges[:-1])
    means.insert(1, "upper", edges[1:])
    return means.assign(n=means["n"].fillna(0).astype(int))


@checked
def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, n_bins: Count = 15) -> float:
    r"""Mean absolute difference between confidence and accuracy.

    .. math::

        \sum_b \frac{n_b}{n} \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert

    over the bins of :func:`reliability_curve`.

    Parameters
    ----------
    confidence, correct, n_bins
        As in :func:`reliability_curve`.

    Returns
    -------
    float
        The error from 0 (calibrated) to 1.

    Raises
    ------
    ValueError
        As :func:`reliability_curve`.

    Notes
    -----
    Guo et al., "On calibration of modern neural networks", ICML 2017, with 15 bins.

    Examples
    --------
    >>> round(expected_calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0]), 6)
    0.0

    """
    bins = reliability_curve(confidence, correct, n_bins).query("n > 0")
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["n"]))


@checked
def error_by_uncertainty(error: ArrayLike, uncertainty: ArrayLike, n_bins: Count = 10) -> pd.DataFrame:
    """Mean squared error of predictions, from the most to the least certain.

    Parameters
    ----------
    error
        Imputed minus held-out values, any shape; they are squared here.
    uncertainty
        Uncertainty of each prediction, such as the standard deviation over posterior draws; same shape as `error`.
    n_bins
        Number of bins, cut at quantiles of the uncertainty, with about the same number of predictions each. Equal
        uncertainties stay in one bin, so that many ties leave fewer bins.

    Returns
    -------
    pandas.DataFrame
        One row per bin, most certain first: mean ``uncertainty``, mean ``squared_error`` and number ``n`` of
        predictions. If the uncertainty is informative, the error increases from row to row; if it is the standard
        deviation of an unbiased prediction, ``squared_error`` is the mean squared uncertainty.

    Raises
    ------
    ValueError
        If the shapes differ, an entry is not finite, an uncertainty is negative, or there are more bins than
        predictions.

    Notes
    -----
    This is the curve in the MultiVI paper's figure of error against uncertainty (Ashuach et al., Nature Methods 2023,
    Fig. 4c).

    Examples
    --------
    >>> error_by_uncertainty([1.0, -1.0, 2.0, -4.0], [0.1, 0.3, 0.5, 0.7], n_bins=2)
       uncertainty  squared_error  n
    0          0.2            1.0  2
    1          0.6           10.0  2

    """
    error, uncertainty = aligned(("error", "uncertainty"), error, uncertainty)
    error, uncertainty = as_finite(error, "error"), as_finite(uncertainty, "uncertainty")
    check_same_shape(error, uncertainty, ("error", "uncertainty"))
    if np.min(uncertainty) < 0:
        raise ValueError(f"`uncertainty` must not be negative; found {np.min(uncertainty):g}.")
    check_number(n_bins, "n_bins", error.size, "the number of predictions")
    edges = np.quantile(uncertainty, np.linspace(0, 1, n_bins + 1), method="inverted_cdf")
    means = _means_by_bin(uncertainty, edges, {"uncertainty": uncertainty, "squared_error": error**2})
    return means.reset_index(drop=True)


def _means_by_bin(
    values: NDArray[np.floating], edges: NDArray[np.floating], columns: dict[str, NDArray[np.floating]]
) -> pd.DataFrame:
    """Average the columns in the non-empty bins (lower, upper] of `values`; the first bin includes its lower edge."""
    bins = np.searchsorted(edges[1:-1], values.ravel(), side="left")
    groups = pd.DataFrame({name: column.ravel().astype(np.float64) for name, column in columns.items()}).groupby(bins)
    return groups.mean().assign(n=groups.size())
