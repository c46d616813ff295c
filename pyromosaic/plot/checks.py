"""Figures of checks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

if TYPE_CHECKING:
    from pyromosaic.checks import CalibrationReport, PredictiveCheck, Ranks
from pyromosaic.plot.style import PALETTE, UNKNOWN, axes_of, distinct_colours

#: Axes of the statistics of a `PredictiveCheck`: label, and whether the axis is logarithmic.
STATISTICS: Mapping[str, tuple[str, bool]] = {
    "mean": ("mean of a feature (counts)", True),
    "variance": ("variance of a feature (counts²)", True),
    "zeros": ("share of zeros of a feature", False),
    "size": ("size of cells (counts), quantiles", False),
    "background": ("share of cells within background", False),
    "correlation": ("correlation of a pair of features", False),
}


def predictive(check: "PredictiveCheck", modality: str, statistic: str, ax: Axes | None = None) -> Axes:
    """One statistic of a modality: observed data against data drawn from the model.

    Parameters
    ----------
    check
        From `pyromosaic.checks.predictive_check`.
    modality, statistic
        Statistic to show, as in the index of ``check.overall``.
    ax
        Axes to draw on.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    Each dot is a feature (or pair, or quantile): its observed value, and the mean over the draws with their 90 %
    interval. Triangles are observed values outside their intervals; a correct model has about one in ten. On the line,
    observed and drawn values are equal.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(100, {"rna": 50})[0]), n_latent=3)
    >>> predictive(checks.predictive_check(model, n_samples=9), "rna", "zeros").get_title()
    'rna: share of zeros of a feature'
    """
    ax = axes_of(ax)
    table: Any = check.table.loc[(modality, statistic)]
    overall: Any = check.overall.loc[(modality, statistic)]
    label, logarithmic = STATISTICS[statistic]
    x, y, low, high = (table[column].to_numpy() for column in ("observed", "mean", "lower", "upper"))
    shown = (x > 0) & (y > 0) if logarithmic and min(x.min(), y.min()) >= 0 else np.ones(len(x), dtype=bool)
    outside = (x < low) | (x > high)
    ax.vlines(x[shown], np.maximum(low, y * 1e-2)[shown] if logarithmic else low, high[shown], color=UNKNOWN, zorder=1)
    for chosen, colour, marker, name in (
        (shown & ~outside, PALETTE[0], "o", "inside"),
        (shown & outside, PALETTE[3], "^", "outside"),
    ):
        size = float(np.clip(4000 / len(x), 5, 40))
        ax.scatter(x[chosen], y[chosen], s=size, color=colour, marker=marker, linewidths=0, zorder=2, label=name)
    if logarithmic and shown.any() and min(x[shown].min(), y[shown].min()) > 0:
        ax.set(xscale="log", yscale="log")
        ends = min(x[shown].min(), y[shown].min()), max(x[shown].max(), y[shown].max())
        ax.plot(ends, ends, color="black", linewidth=1, linestyle="--", zorder=1.5)
    else:
        ax.axline((x.mean(), x.mean()), slope=1, color="black", linewidth=1, linestyle="--", zorder=1.5)
    least = "≤ " if overall["p_value"] * (check.n_samples + 1) < 1.5 else "= "
    note = f"{overall['outside']:.0%} of {int(overall['n'])} outside\np {least}{overall['p_value']:.2g}"
    ax.text(0.04, 0.96, note, transform=ax.transAxes, verticalalignment="top", fontsize="small")
    ax.set(xlabel="observed", ylabel=f"drawn from the {'prior' if check.prior else 'posterior'}")
    ax.set_title(f"{modality}: {label}", fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def mean_variance(check: "PredictiveCheck", modality: str, ax: Axes | None = None) -> Axes:
    """Variance against mean of every feature, in the data and in data drawn from the model.

    Parameters
    ----------
    check
        From `pyromosaic.checks.predictive_check`.
    modality
        Modality to show.
    ax
        Axes to draw on.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    The thin line is variance = mean, as for Poisson counts.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(100, {"rna": 50})[0]), n_latent=3)
    >>> mean_variance(checks.predictive_check(model, n_samples=9), "rna").get_title()
    'rna: variance and mean'
    """
    ax = axes_of(ax)
    mean: Any = check.table.loc[(modality, "mean")]
    variance: Any = check.table.loc[(modality, "variance")]
    size = float(np.clip(4000 / len(mean), 5, 40))
    for column, colour, marker, label in (("observed", PALETTE[0], "o", "data"), ("mean", PALETTE[1], "^", "drawn")):
        x, y = mean[column].to_numpy(), variance[column].to_numpy()
        ax.scatter(x, y, s=size, color=colour, marker=marker, linewidths=0, alpha=0.7, label=label)
    if min(mean[["observed", "mean"]].min().min(), variance[["observed", "mean"]].min().min()) >= 0:
        ax.set(xscale="log", yscale="log")
        positive = mean["observed"][mean["observed"] > 0]
        ax.plot([positive.min(), positive.max()], [positive.min(), positive.max()], color="black", linewidth=0.8)
    ax.set(xlabel="mean of a feature (counts)", ylabel="variance (counts²)")
    ax.set_title(f"{modality}: variance and mean", fontsize="medium")
    ax.legend(frameon=False, loc="lower right", fontsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def predictive_checks(check: "PredictiveCheck") -> Figure:
    """One figure of a predictive check: a panel for each statistic of each modality.

    Parameters
    ----------
    check
        From `pyromosaic.checks.predictive_check`.

    Returns
    -------
    matplotlib.figure.Figure
        Panels in rows of at most four.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, plot, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> figure = plot.predictive_checks(checks.predictive_check(model, n_samples=9))
    >>> len(figure.axes)
    12
    """
    panels: list[tuple[str, str | None]] = []
    for modality in check.overall.index.unique("modality"):
        found = check.overall.loc[modality].index
        panels += [(modality, None)] if "variance" in found else []
        panels += [(modality, statistic) for statistic in STATISTICS if statistic in found]
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = plt.figure(figsize=(3.2 * n_columns, 3.0 * n_rows), layout="constrained")  # see `overview`
    with plt.rc_context({"font.size": 9}):
        for i, (modality, statistic) in enumerate(panels):
            ax = figure.add_subplot(n_rows, n_columns, i + 1)
            if statistic is None:
                mean_variance(check, modality, ax)
            else:
                predictive(check, modality, statistic, ax)
    return figure


def ranks(ranks: "Ranks", variable: str | None = None, ax: Axes | None = None, n_bins: int = 20) -> Axes:
    """Histogram of the ranks of true values: flat if posteriors (or predictive distributions) are right.

    A U shape means that they are too narrow, a hill that they are too wide, and a slope that they are shifted to one
    side.

    Parameters
    ----------
    ranks
        From `pyromosaic.checks.simulation_based_calibration` or `pyromosaic.checks.imputation_ranks`.
    variable
        Variable to show; by default the first.
    ax
        Axes to draw on.
    n_bins
        Number of bins.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    The thick line shows all quantities of the variable together. If there are at most 30, thin lines show each of them,
    and the band contains 95 % of their bins if ranks are uniform.

    Examples
    --------
    >>> import pandas as pd
    >>> from pyromosaic.checks import Ranks
    >>> columns = pd.MultiIndex.from_tuples([("z", "z_0")], names=["variable", "name"])
    >>> below = pd.DataFrame(np.arange(1000)[:, None] % 100, columns=columns)  # of 99 draws
    >>> ranks(Ranks(below, 0 * below, n_samples=99)).get_xlabel()
    'rank of the truth among 99 draws (share)'
    """
    ax = axes_of(ax)
    name = ranks.below.columns[0][0] if variable is None else variable
    values = ranks.uniform()[name]
    edges = np.linspace(0, 1, n_bins + 1)
    known = [values[column].dropna().to_numpy() for column in values]
    n = max(map(len, known))
    ax.axhline(1, color="black", linewidth=1, linestyle="--")
    counts = np.histogram(np.concatenate(known), edges)[0]
    ax.stairs(counts * n_bins / counts.sum(), edges, color=PALETTE[0], linewidth=2)
    if len(known) <= 30:
        low, high = (binom.ppf(q, n, 1 / n_bins) * n_bins / n for q in (0.025, 0.975))
        ax.axhspan(low, high, color=UNKNOWN, alpha=0.6, linewidth=0, zorder=0)
        for own in known:
            ax.stairs(np.histogram(own, edges)[0] * n_bins / len(own), edges, color=PALETTE[5], linewidth=0.6)
    ax.set(xlim=(0, 1), xlabel=f"rank of the truth among {ranks.n_samples} draws (share)", ylabel="density of ranks")
    ax.set_ylim(0, max(2.0, ax.get_ylim()[1]))
    ax.set_title(name)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def coverage(ranks: "Ranks", ax: Axes | None = None) -> Axes:
    """Share of true values inside central intervals, against the level of the intervals.

    Parameters
    ----------
    ranks
        From `pyromosaic.checks.simulation_based_calibration` or `pyromosaic.checks.imputation_ranks`.
    ax
        Axes to draw on.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    Each line is a variable, by the randomised share (`pyromosaic.checks.Ranks.coverage`). Intervals are too narrow
    below the diagonal, and too wide above it.

    Examples
    --------
    >>> import pandas as pd
    >>> from pyromosaic.checks import Ranks
    >>> columns = pd.MultiIndex.from_tuples([("z", "z_0")], names=["variable", "name"])
    >>> below = pd.DataFrame(np.arange(1000)[:, None] % 100, columns=columns)  # of 99 draws
    >>> len(coverage(Ranks(below, 0 * below, n_samples=99)).lines)  # the diagonal and z
    2
    """
    ax = axes_of(ax)
    levels = np.linspace(0.05, 0.95, 19)
    table = ranks.coverage(levels.tolist())
    ax.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    names = list(table.index.unique("variable"))
    for i, (name, colour) in enumerate(zip(names, distinct_colours(len(names)), strict=True)):
        ax.plot(levels, table.loc[name, "randomised"], "os^Dv"[i % 5] + "-", color=colour, markersize=4, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of true values inside")
    ax.set_box_aspect(1)
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def calibration_report(report: "CalibrationReport") -> Figure:
    """One figure of a calibration report: whether intervals hold what they say, and whether the model fits the data.

    Parameters
    ----------
    report
        From `pyromosaic.checks.calibration_report`.

    Returns
    -------
    matplotlib.figure.Figure
        Three panels: shares in 90 % intervals by question, the ranks of latent variables, and the coverage at all
        levels.

    Notes
    -----
    Dots should be on the dashed line, the histogram flat, and the curves on the diagonal. Dots on the left of the line
    mean intervals that are too narrow.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, plot, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> figure = plot.calibration_report(checks.calibration_report(model, n_samples=9))
    >>> len(figure.axes)
    3
    """
    table, questions = report.table, list(report.table.index.unique("question"))
    figure = plt.figure(figsize=(13, max(4.0, 0.24 * len(table) + 1)), layout="constrained")  # see `overview`
    with plt.rc_context({"font.size": 9}):
        ax = figure.add_subplot(1, 3, 1)
        for i, (question, colour) in enumerate(zip(questions, distinct_colours(len(questions)), strict=True)):
            at = np.flatnonzero(table.index.get_level_values("question") == question)
            ax.plot(table["inside_90"].iloc[at], at, "os^D"[i % 4], color=colour, label=question)
        ax.axvline(0.9, color="black", linewidth=1, linestyle="--")
        words = [f"{variable}: {cells}" if cells != "all" else variable for _, variable, cells in table.index]
        ax.set_yticks(range(len(table)), words)
        ax.set(xlim=(-0.02, 1.02), xlabel="share of values in 90 % intervals")
        ax.invert_yaxis()
        ax.legend(frameon=False, loc="upper left")
        ax.spines[["top", "right"]].set_visible(False)
        ranks(report.latent, ax=figure.add_subplot(1, 3, 2))
        both = report.latent, report.mean
        below, equal = (pd.concat([getattr(part, name) for part in both], axis=1) for name in ("below", "equal"))
        coverage(replace(report.latent, below=below, equal=equal), figure.add_subplot(1, 3, 3))
    return figure
