"""Figures of cells and of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from pyromosaic.metrics import imputation_spearman
from pyromosaic.metrics._checks import aligned
from pyromosaic.plot.style import COUNT_TICKS, PALETTE, UNKNOWN, axes_of, distinct_colours


def umap(latent: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Two-dimensional UMAP of a latent representation, with Euclidean distance and 15 neighbours.

    Parameters
    ----------
    latent
        Cells × latent dimensions; at least four cells.
    seed
        Seed of the layout.

    Returns
    -------
    pandas.DataFrame
        Columns ``UMAP 1`` and ``UMAP 2``, with the names of cells as in `latent`.

    References
    ----------
    McInnes et al., UMAP: uniform manifold approximation and projection, 2018. It is computed by the package
    `umap-learn`.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from pyromosaic.plot import umap
    >>> latent = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 5)))
    >>> umap(latent).shape  # doctest: +SKIP
    (30, 2)
    """
    from umap import UMAP

    # With a seed, UMAP uses one thread.
    layout = UMAP(n_neighbors=min(15, len(latent) - 1), random_state=seed, n_jobs=1)
    return pd.DataFrame(layout.fit_transform(latent.to_numpy()), latent.index, ["UMAP 1", "UMAP 2"])


def embedding(coordinates: pd.DataFrame, colour: pd.Series, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Cells in two dimensions, coloured by a category or a number.

    Cells are drawn in random order, so that no group hides another. Cells without a value are drawn first, in light
    grey.

    Parameters
    ----------
    coordinates
        Cells × 2, e.g. from `umap`; the names of the columns label the axes.
    colour
        Value of each cell, matched by name. Numbers get a colour bar. All other values, including categorical numbers
        and booleans, get a legend in the order of the categories.
    ax
        Axes to draw on.
    title
        Title of the panel; by default the name of `colour`.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Raises
    ------
    ValueError
        If `colour` has values, but none for a cell of `coordinates`.

    Examples
    --------
    >>> import pandas as pd
    >>> from pyromosaic.plot import embedding
    >>> cells = pd.DataFrame({"UMAP 1": [0.0, 1.0, 2.0], "UMAP 2": [0.0, 1.0, 0.5]}, index=["a", "b", "c"])
    >>> ax = embedding(cells, pd.Series({"a": "B", "b": "NK"}, name="cell type"))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['B', 'NK', 'unknown']
    """
    if len(colour) and not colour.index.isin(coordinates.index).any():
        raise ValueError(
            f"`colour` and `coordinates` have no cell in common: found {colour.index[0]!r} and "
            f"{coordinates.index[0]!r}; give both the same names"
        )
    ax = axes_of(ax)
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
        colours = [*distinct_colours(len(categories.categories)), UNKNOWN]
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
        Axes to draw on.
    title
        Title of the panel.
    unit
        Unit of both axes.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    Both axes have the scale log(1 + value), or are linear if a value is negative or none is above 1. On the line,
    imputed and measured values are equal. Colour shows the number of entries on a logarithmic scale.

    Examples
    --------
    >>> truth = np.random.default_rng(0).poisson(3.0, (50, 4))
    >>> ax = imputation(truth, truth + 0.5, title="antibodies")
    >>> ax.get_title(), ax.texts[0].get_text()
    ('antibodies', 'Spearman 1.00')
    """
    ax = axes_of(ax)
    truth, imputed = aligned(("truth", "imputed"), truth, imputed)
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
    """Evidence lower bound per cell by epoch, for training cells and, if there are any, validation cells.

    Parameters
    ----------
    history
        The ``history`` of a model: one row per epoch, with ``train_elbo`` and optionally ``validation_elbo``.
    ax
        Axes to draw on.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Notes
    -----
    The vertical range covers the curves after the first tenth of the epochs, where they rise steeply.

    Examples
    --------
    >>> course = pd.DataFrame({"train_elbo": [-90.0, -80.0, -75.0], "validation_elbo": [-91.0, -82.0, -78.0]})
    >>> [line.get_label() for line in history(course).lines]
    ['train', 'validation']
    """
    ax = axes_of(ax)
    names = [name for name in ("train_elbo", "validation_elbo") if name in history]
    for name, colour in zip(names, PALETTE, strict=False):
        curve = history[name].dropna()  # validation cells are not evaluated in every epoch
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
    """One figure of an integration: the cells, the imputed values, and the training curves.

    Parameters
    ----------
    coordinates
        As in `embedding`.
    colours
        Values by which to colour the cells, one panel each; the names are the titles.
    imputed
        Held-out values, imputed values and their unit for each title, one panel each; see `imputation`.
    training
        The ``history`` of a model.

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
    # Outside the context, which on leaving would undo a notebook's choice to show figures.
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
