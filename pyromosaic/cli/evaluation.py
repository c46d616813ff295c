"""What the command line says of a result: metrics, a table, a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from rich.console import Console

    from pyromosaic.data import Mosaic
    from pyromosaic.models import MosaicModel

    #: Of a modality that was hidden in some cells: the measurements, and what was imputed.
    Compared = Mapping[str, tuple[Any, "np.ndarray"]]

NEIGHBORS = 15


class Measures:
    """Metrics by key, each with a description, a value, and what to compare it with."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, float, str]] = {}

    def add(self, key: str, text: str, value: float, reading: str) -> None:
        """One more."""
        self.rows[key] = (text, float(value), reading)

    def groups(self, latent: "pd.DataFrame", groups: "pd.Series", key: str, text: str) -> None:
        """How much the neighbours of cells are of their own group."""
        from pyromosaic import metrics

        known = groups.notna()
        shares = groups[known].value_counts(normalize=True)
        shares = shares[shares > 0]
        n = min(NEIGHBORS, int(known.sum()) - 1)
        if len(shares) > 1 and n > 0:
            value = metrics.modality_enrichment(latent[known], groups[known], n)
            self.add(key, text, value, f"mixed 1, apart {1 / (shares**2).sum():.2f}")

    def labels(self, latent: "pd.DataFrame", patterns: "pd.Series", labels: "pd.Series", names: Sequence[str]) -> None:
        """How well labels agree among neighbours, and from one modality to another."""
        from itertools import permutations

        from pyromosaic import metrics

        known, n = labels.notna(), min(NEIGHBORS, len(latent) - 1)
        if known.sum() > n:
            value = metrics.label_purity(latent[known], labels[known], n)
            chance = (labels[known].value_counts(normalize=True) ** 2).sum()
            self.add("label_purity", "Label purity of neighbours", value, f"best 1, chance {chance:.2f}")
        groups = {name: known & (patterns == name) for name in names}
        for x, y in permutations([name for name, cells in groups.items() if cells.any()], 2):
            value = metrics.label_transfer_accuracy(
                latent[groups[x]], labels[groups[x]], latent[groups[y]], labels[groups[y]]
            )
            reading = f"best 1, majority {labels[groups[y]].value_counts(normalize=True).max():.2f}"
            self.add(f"label_transfer_{x}_to_{y}", f"Label transfer, {x} to {y}", value, reading)

    def pairs(self, latent: "pd.DataFrame", mosaic: "Mosaic") -> None:
        """How near the measurements of the same cell are, where column "cell" says which are."""
        from itertools import combinations

        import pandas as pd

        from pyromosaic import metrics

        if not mosaic.has_column("cell"):
            return
        cells = mosaic.column("cell").astype(str)
        for x, y in combinations(mosaic.modalities, 2):
            rows = {name: pd.Series(cells.index, cells)[mosaic.patterns.to_numpy() == name] for name in (x, y)}
            both = rows[x].index.intersection(rows[y].index)
            if len(both) > 1:
                value = metrics.foscttm(*(latent.loc[rows[name].loc[both]].to_numpy() for name in (x, y)))
                assert isinstance(value, float)
                self.add(
                    f"foscttm_{x}_{y}", f"Cells nearer than the true one, {x} and {y}", value, "best 0, chance 0.5"
                )

    def imputed(self, mosaic: "Mosaic", compared: "Compared") -> None:
        """How well hidden measurements are imputed."""
        import pandas as pd

        from pyromosaic import metrics

        for name, (truth, values) in compared.items():
            value = float(metrics.imputation_spearman(truth, values))
            self.add(f"spearman_{name}", f"Spearman of {name}, all entries", value, "best 1, chance 0")
            median = pd.Series(metrics.imputation_spearman(truth, values, per="feature")).median()
            self.add(f"spearman_per_feature_{name}", f"Spearman of {name}, median feature", median, "best 1, chance 0")
            detected = (truth > 0).mean()
            if mosaic.modalities[name].spec.traits.binary and detected > 0:
                value = metrics.imputation_auprc(truth, values)
                self.add(f"auprc_{name}", f"AUPRC of {name}, all entries", value, f"best 1, chance {detected:.2f}")

    @property
    def values(self) -> dict[str, float]:
        """The values alone."""
        return {key: value for key, (_, value, _) in self.rows.items()}

    def report(self, console: "Console") -> None:
        """Print them as a table."""
        from rich.table import Table

        table = Table("measure", "value", "to compare with")
        table.columns[1].justify = "right"
        for text, value, reading in self.rows.values():
            table.add_row(text, f"{value:.3f}", reading)
        if self.rows:
            console.print(table)


def draw(
    spaces: "Mapping[str, pd.DataFrame]",
    colours: "Sequence[pd.Series]",
    seed: int,
    path: Path,
    model: "MosaicModel | None" = None,
    compared: "Compared | None" = None,
) -> "dict[str, pd.DataFrame]":
    """Draw the figure and return the UMAP of each latent space in it.

    Parameters
    ----------
    spaces
        Latent spaces by name; each is a row of panels.
    colours
        What the cells are coloured by, a column of panels each.
    seed
        Seed of the layout.
    path
        Where to.
    model
        A model whose training is shown too.
    compared
        Hidden and imputed measurements, to be shown too.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from pyromosaic import plot

    coordinates = {name: plot.umap(latent, seed) for name, latent in spaces.items()}
    if model is not None and len(spaces) == 1:
        panels: dict[str, tuple[Any, np.ndarray, str]] = {}
        for name, (truth, values) in (compared or {}).items():
            spec, title = model.schema[name].spec, f"{name}, {len(values)} hidden cells"
            if spec.traits.binary:
                open_share, expected = (np.atleast_2d(np.asarray(part.mean(axis=0))) for part in (truth > 0, values))
                panels[title] = (open_share, expected, "share of cells, by region")
            else:
                panels[title] = (truth, values, "counts" if spec.data_kind == "count" else "values")
        (umap,) = coordinates.values()
        figure = plot.overview(umap, colours, panels, model.history)
    else:
        shape = (len(spaces), max(1, len(colours)))
        figure, axes = plt.subplots(*shape, figsize=(4.8 * shape[1], 4 * shape[0]), squeeze=False, layout="constrained")
        for row, (name, umap) in zip(axes, coordinates.items(), strict=True):
            for ax, colour in zip(row, colours, strict=True):
                plot.embedding(umap, colour, ax, f"{name.split('_')[-1]}: {colour.name}" if len(spaces) > 1 else None)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return coordinates


def draw_differences(table: "pd.DataFrame", path: Path) -> None:
    """Draw the most certain features of each comparison in a table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pyromosaic import plot

    comparisons = list(table.groupby("comparison", sort=False))
    n_columns = min(4, len(comparisons))
    n_rows = -(-len(comparisons) // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=(4.5 * n_columns, 4.5 * n_rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(comparisons) :]:
        ax.set_axis_off()
    for ax, (name, rows) in zip(axes.flat, comparisons, strict=False):
        plot.differential(rows, ax, str(name))
    figure.savefig(path, dpi=150)
    plt.close(figure)
