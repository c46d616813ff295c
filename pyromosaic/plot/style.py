"""Colours and axes for all figures."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

#: Colours of up to 20 categories, each as different as possible from earlier ones, from white and from `UNKNOWN`, for
#: normal vision and under simulated protanopia, deuteranopia and tritanopia. The first six are from Okabe and Ito.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#730d2f", "#480d95", "#0d0dea", "#9df26a"),
    *("#84516a", "#b70d15", "#847bf2", "#8cbf8c", "#1e4062", "#c8159d", "#2f622f", "#ea0dd0", "#730db7", "#ea626a"),
)


UNKNOWN = "#d0d0d0"  # colour of a cell without a value


COUNT_TICKS = np.array([0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000])


def axes_of(ax: Axes | None) -> Axes:
    """The given axes, or new ones."""
    return plt.figure(layout="constrained").add_subplot() if ax is None else ax


def distinct_colours(n: int) -> list[str]:
    """The palette, or evenly spaced hues if there are more categories than colours in it."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    return [to_hex(c) for c in plt.colormaps["turbo"](np.linspace(0.02, 0.98, n))]
