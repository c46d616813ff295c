"""Figures that people look at: embeddings, imputed against measured values, the course of training, and checks.

Every function draws on the axes it is given, or on new ones, and returns them; nothing it is given is changed.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.stats import binom

from pyromosaic.metrics import imputation_spearman

if TYPE_CHECKING:
    from pyromosaic.checks import PredictiveCheck, Ranks

#: Colours of up to 20 categories, each as far as can be from those before it, from white and from `UNKNOWN`, for
#: normal sight and under simulated protanopia, deuteranopia and tritanopia. The first six are those of Okabe and Ito.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#730d2f", "#480d95", "#0d0dea", "#9df26a"),
    *("#84516a", "#b70d15", "#847bf2", "#8cbf8c", "#1e4062", "#c8159d", "#2f622f", "#ea0dd0", "#730db7", "#ea626a"),
)
UNKNOWN = "#d0d0d0"  # colour of a cell without a value
COUNT_TICKS = np.array([0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000])


def umap(latent: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Two-dimensional UMAP of a latent representation, by Euclidean distance among 15 neighbours.

    Parameters
    ----------
    latent
        Cells × latent dimensions; at least four cells.
    seed
        Seed of the layout.

    Returns
    -------
    pandas.DataFrame
        Columns ``UMAP 1`` and ``UMAP 2``, the cells' names as in `latent`.

    References
    ----------
    McInnes et al., UMAP: uniform manifold approximation and projection, 2018; computed by the package `umap-learn`.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from pyromosaic.plot import umap
    >>> latent = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 5)))
    >>> umap(latent).shape  # doctest: +SKIP
    (30, 2)
    """
    from umap import UMAP

    # One thread, as a seed asks for.
    layout = UMAP(n_neighbors=min(15, len(latent) - 1), random_state=seed, n_jobs=1)
    return pd.DataFrame(layout.fit_transform(latent.to_numpy()), latent.index, ["UMAP 1", "UMAP 2"])


def embedding(coordinates: pd.DataFrame, colour: pd.Series, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Cells in two dimensions, coloured by a category or a number.

    Cells are drawn in random order, so that no group hides another, and those without a value first, in light grey.

    Parameters
    ----------
    coordinates
        Cells × 2, from `umap` say; the columns' names label the axes.
    colour
        Value of each cell, matched by name. Numbers get a colour bar; all else, categorical numbers and booleans
        included, a legend in the order of the categories.
    ax
        Where to draw.
    title
        Title of the panel; by default the name of `colour`.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Examples
    --------
    >>> import pandas as pd
    >>> from pyromosaic.plot import embedding
    >>> cells = pd.DataFrame({"UMAP 1": [0.0, 1.0, 2.0], "UMAP 2": [0.0, 1.0, 0.5]}, index=["a", "b", "c"])
    >>> ax = embedding(cells, pd.Series({"a": "B", "b": "NK"}, name="cell type"))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['B', 'NK', 'unknown']
    """
    ax = _axes(ax)
    values = colour.reindex(coordinates.index)
    order = np.random.default_rng(0).permutation(len(values))
    order = order[np.argsort(values.notna().to_numpy()[order], kind="stable")]
    known = order[values.isna().sum() :]
    xy = coordinates.to_numpy()
    style: Any = {"s": float(np.clip(12_000 / len(xy), 1, 25)), "linewidths": 0, "rasterized": True}
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(colour):
        ax.scatter(xy[order, 0], xy[order, 1], color=UNKNOWN, **style)
        dots = ax.scatter(xy[known, 0], xy[known, 1], c=values.to_numpy()[known], cmap="viridis", **style)
        bar = ax.figure.colorbar(dots, ax=ax, shrink=0.6, aspect=15)
        bar.outline.set_visible(False)
    else:
        categories = pd.Categorical(values).remove_unused_categories()
        colours = [*_colours(len(categories.categories)), UNKNOWN]
        ax.scatter(
            xy[order, 0], xy[order, 1], c=np.array(colours)[categories.codes[order]], **style
        )  # code -1: the last
        names = [*map(str, categories.categories), *(["unknown"] if values.isna().any() else [])]
        keys = [Line2D([], [], marker="o", linestyle="", markersize=6, color=c) for c in colours]
        ax.legend(
            keys[: len(names)],
            names,
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            handletextpad=0.2,
            ncols=1 + (len(names) - 1) // 14,
        )
    ax.set(xticks=[], yticks=[], xlabel=coordinates.columns[0], ylabel=coordinates.columns[1])
    ax.set_box_aspect(1)
    ax.set_title(str(colour.name or "") if title is None else title)
    return ax


def imputation(
    truth: Any, imputed: ArrayLike, ax: Axes | None = None, title: str | None = None, unit: str = "counts"
) -> Axes:
    """Imputed against held-out values, all cells and features together, with their Spearman correlation.

    Parameters
    ----------
    truth
        Held-out values, cells × features, dense or scipy sparse.
    imputed
        Imputed values of the same cells and features.
    ax
        Where to draw.
    title
        Title of the panel.
    unit
        Unit of both.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    Both axes are spaced by log(1 + value), or linearly if a value is negative or none is above 1. The line is where
    imputed and measured are equal. Colour is the number of entries, on a logarithmic scale.

    Examples
    --------
    >>> truth = np.random.default_rng(0).poisson(3.0, (50, 4))
    >>> ax = imputation(truth, truth + 0.5, title="antibodies")
    >>> ax.get_title(), ax.texts[0].get_text()
    ('antibodies', 'Spearman 1.00')
    """
    ax = _axes(ax)
    spearman = imputation_spearman(truth, imputed)
    x, y = np.ravel(truth.toarray() if hasattr(truth, "toarray") else truth), np.ravel(imputed)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    if low >= 0 and high > 1:
        x, y, low, high = (np.log1p(v) for v in (x, y, low, high))
        shown = COUNT_TICKS[np.log1p(COUNT_TICKS) <= high]
        shown = shown if len(shown) <= 7 else shown[(len(shown) - 1) % 2 :: 2]
        ax.set_xticks(np.log1p(shown), [f"{v:,}" for v in shown])
        ax.set_yticks(np.log1p(shown), [f"{v:,}" for v in shown])
    extent = (low, high, low, high)
    cells = ax.hexbin(x, y, gridsize=36, extent=extent, norm=LogNorm(), mincnt=1, cmap="viridis_r", linewidths=0.1)
    ax.axline((low, low), slope=1, color=PALETTE[3], linewidth=1.5, linestyle="--")
    ax.text(
        *(0.04, 0.96, f"Spearman {spearman:.2f}"),
        transform=ax.transAxes,
        verticalalignment="top",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2},
    )
    margin = 0.03 * (high - low)
    limits = (low - margin, high + margin)
    ax.set(xlim=limits, ylim=limits, xlabel=f"measured ({unit})", ylabel=f"imputed ({unit})")
    ax.set_box_aspect(1)
    ax.set_title(title or "")
    bar = ax.figure.colorbar(cells, ax=ax, shrink=0.6, aspect=15, label="number of entries")
    bar.outline.set_visible(False)
    return ax


def history(history: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Evidence lower bound per cell over the epochs, of training and (if there are any) validation cells.

    Parameters
    ----------
    history
        A model's ``history``: a row an epoch, with ``train_elbo`` and perhaps ``validation_elbo``.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    The vertical range is that of the curves after the first tenth of the epochs, in which they rise steeply.

    Examples
    --------
    >>> course = pd.DataFrame({"train_elbo": [-90.0, -80.0, -75.0], "validation_elbo": [-91.0, -82.0, -78.0]})
    >>> [line.get_label() for line in history(course).lines]
    ['train', 'validation']
    """
    ax = _axes(ax)
    names = [name for name in ("train_elbo", "validation_elbo") if name in history]
    for name, colour in zip(names, PALETTE, strict=False):
        curve = history[name].dropna()  # validation cells are not looked at in every epoch
        ax.plot(curve.index, curve, "." if len(curve) == 1 else "-", color=colour, label=name.removesuffix("_elbo"))
    tail = history[names].to_numpy()[len(history) // 10 :]
    low, high = np.nanmin(tail), np.nanmax(tail)
    if low < high:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.set(xlabel="epoch", ylabel="ELBO (nats per cell)")
    ax.set_title("training")
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def overview(
    coordinates: pd.DataFrame,
    colours: Sequence[pd.Series],
    imputed: Mapping[str, tuple[Any, ArrayLike, str]],
    training: pd.DataFrame,
) -> Figure:
    """One figure of an integration: the cells, what was imputed, and the course of training.

    Parameters
    ----------
    coordinates
        As in `embedding`.
    colours
        What to colour the cells by, a panel each; the names are the titles.
    imputed
        Held-out values, imputed values and their unit, a panel each by its title; see `imputation`.
    training
        A model's ``history``.

    Returns
    -------
    matplotlib.figure.Figure
        The cells above, imputation and training below.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> coordinates = pd.DataFrame(rng.normal(size=(50, 2)), columns=["UMAP 1", "UMAP 2"])
    >>> truth = rng.poisson(3.0, (50, 4))
    >>> course = pd.DataFrame({"train_elbo": [-90.0, -80.0, -75.0]})
    >>> batch = pd.Series(["a", "b"] * 25, name="batch")
    >>> figure = overview(coordinates, [batch], {"antibodies": (truth, truth + 0.5, "counts")}, course)
    >>> [ax.get_title() for ax in figure.axes if ax.get_title()]
    ['batch', 'antibodies', 'training']
    """
    n_columns = max(len(colours), len(imputed) + 1, 2)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    # Inside the context a notebook's choice to show figures would be made, and forgotten with the context.
    figure = plt.figure(figsize=(4.4 * n_columns, 8), layout=layout)
    with plt.rc_context({"font.size": 10, "axes.titlesize": 12, "legend.fontsize": 10}):
        above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
        for ax, colour in zip(np.ravel(above.subplots(1, len(colours))), colours, strict=True):
            embedding(coordinates, colour, ax)
        *panels, last = np.ravel(below.subplots(1, len(imputed) + 1))
        for ax, (title, (truth, values, unit)) in zip(panels, imputed.items(), strict=True):
            imputation(truth, values, ax, title, unit)
        history(training, last).set_box_aspect(1)
    return figure


#: Axes of the statistics of a `PredictiveCheck`: what is shown, and whether it is spaced by its logarithm.
STATISTICS: Mapping[str, tuple[str, bool]] = {
    "mean": ("mean of a feature (counts)", True),
    "variance": ("variance of a feature (counts²)", True),
    "zeros": ("share of zeros of a feature", False),
    "size": ("size of cells (counts), quantiles", False),
    "background": ("share of cells within background", False),
    "correlation": ("correlation of a pair of features", False),
}


def predictive(check: "PredictiveCheck", modality: str, statistic: str, ax: Axes | None = None) -> Axes:
    """One statistic of a modality: the data against data drawn from the model.

    Parameters
    ----------
    check
        From `pyromosaic.checks.predictive_check`.
    modality, statistic
        Which of its statistics, as in the index of ``check.overall``.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    A dot a feature (or pair, or quantile): the observed value, and the mean over the draws with their 90 % interval.
    Triangles are observed values outside their intervals, of which a right model has about one in ten. On the line
    both are equal.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(100, {"rna": 50})[0]), n_latent=3)
    >>> predictive(checks.predictive_check(model, n_samples=9), "rna", "zeros").get_title()
    'rna: share of zeros of a feature'
    """
    ax = _axes(ax)
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
        Which modality.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    The thin line is variance = mean, as of Poisson counts.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(100, {"rna": 50})[0]), n_latent=3)
    >>> mean_variance(checks.predictive_check(model, n_samples=9), "rna").get_title()
    'rna: variance and mean'
    """
    ax = _axes(ax)
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
        Panels in rows of four at most.

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

    A U says that they are too narrow, a hill that they are too wide, a slope that they lie to one side.

    Parameters
    ----------
    ranks
        From `pyromosaic.checks.simulation_based_calibration` or `pyromosaic.checks.imputation_ranks`.
    variable
        Which variable; by default the first.
    ax
        Where to draw.
    n_bins
        Number of bins.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    The thick line is of all quantities of the variable together. If there are at most 30, thin lines are of each of
    them, and the band is where 95 % of their bins lie if ranks are uniform.

    Examples
    --------
    >>> from pyromosaic.checks import Ranks
    >>> columns = pd.MultiIndex.from_tuples([("z", "z_0")], names=["variable", "name"])
    >>> below = pd.DataFrame(np.arange(1000)[:, None] % 100, columns=columns)  # of 99 draws
    >>> ranks(Ranks(below, 0 * below, n_samples=99)).get_xlabel()
    'rank of the truth among 99 draws (share)'
    """
    ax = _axes(ax)
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
    """Share of true values inside central intervals, against what the intervals are to hold.

    Parameters
    ----------
    ranks
        From `pyromosaic.checks.simulation_based_calibration` or `pyromosaic.checks.imputation_ranks`.
    ax
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        The axes given, or new ones.

    Notes
    -----
    A line a variable, by the randomised share (`pyromosaic.checks.Ranks.coverage`). Below the diagonal intervals are
    too narrow, above it too wide.

    Examples
    --------
    >>> from pyromosaic.checks import Ranks
    >>> columns = pd.MultiIndex.from_tuples([("z", "z_0")], names=["variable", "name"])
    >>> below = pd.DataFrame(np.arange(1000)[:, None] % 100, columns=columns)  # of 99 draws
    >>> len(coverage(Ranks(below, 0 * below, n_samples=99)).lines)  # the diagonal and z
    2
    """
    ax = _axes(ax)
    levels = np.linspace(0.05, 0.95, 19)
    table = ranks.coverage(levels.tolist())
    ax.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    names = list(table.index.unique("variable"))
    for i, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        ax.plot(levels, table.loc[name, "randomised"], "os^Dv"[i % 5] + "-", color=colour, markersize=4, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of true values inside")
    ax.set_box_aspect(1)
    ax.legend(frameon=False, loc="lower right")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _axes(ax: Axes | None) -> Axes:
    return plt.figure(layout="constrained").add_subplot() if ax is None else ax


def _colours(n: int) -> list[str]:
    """The palette, or evenly spaced hues where there are more categories than it has."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [to_hex(c) for c in plt.colormaps["turbo"](np.linspace(0.02, 0.98, n))]
