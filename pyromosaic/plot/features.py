"""Figures of features."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from pyromosaic.accepted import Count, checked
from pyromosaic.plot.style import PALETTE, UNKNOWN, axes_of


@checked
def differential(table: pd.DataFrame, ax: Axes | None = None, title: str | None = None, n_features: Count = 15) -> Axes:
    """Effects of the features that differ most certainly between two groups, with their 90 % intervals.

    Parameters
    ----------
    table
        One comparison, as `MosaicModel.differential` or `ContrastiveVI.salient_effect` returns it: an index of features
        and the columns ``lfc_median``, ``lfc_low``, ``lfc_high`` (or ``difference_...``) and ``is_significant``.
    ax
        Axes to draw on.
    title
        Title of the panel.
    n_features
        Number of features, from the top of the table.

    Returns
    -------
    matplotlib.axes.Axes
        The given axes, or new ones.

    Raises
    ------
    ValueError
        If the table has several comparisons, or no effects.

    Examples
    --------
    >>> import pandas as pd
    >>> from pyromosaic.plot import differential
    >>> columns = {"lfc_median": [2.0, -0.1], "lfc_low": [1.0, -1.0], "lfc_high": [3.0, 1.0]}
    >>> table = pd.DataFrame(columns | {"is_significant": [True, False]}, index=["CD19", "CD3"])
    >>> [label.get_text() for label in differential(table).get_yticklabels()]
    ['CD19', 'CD3']
    """
    prefix = next((prefix for prefix in ("lfc", "difference") if f"{prefix}_median" in table), None)
    if prefix is None:
        raise ValueError(f"the table has no effects; it has the columns {', '.join(map(repr, table.columns))}")
    if table.index.has_duplicates:
        raise ValueError(
            f"the table has feature {table.index[table.index.duplicated()][0]!r} more than once; give one comparison, "
            "e.g. table[table['comparison'] == 'B vs rest']"
        )
    ax, top = axes_of(ax), table.head(n_features)
    places = np.arange(len(top))
    effects = {what: top[f"{prefix}_{what}"].to_numpy() for what in ("low", "median", "high")}
    colours = [PALETTE[0] if sure else UNKNOWN for sure in top["is_significant"]]
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.hlines(places, effects["low"], effects["high"], colors=colours)
    ax.scatter(effects["median"], places, c=colours, zorder=3)
    ax.set_yticks(places, [str(name) for name in top.index])
    ax.invert_yaxis()
    ax.set_xlabel("log2 fold change" if prefix == "lfc" else "difference")
    keys = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in (PALETTE[0], UNKNOWN)]
    ax.legend(keys, ["significant", "not significant"], frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    ax.set_title(title or "")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
