"""What the command line says of an integration: metrics, a table, a figure."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from rich.console import Console

    from pyromosaic.data import Mosaic
    from pyromosaic.models import MultiVI


def measure(mosaic: "Mosaic", latent: "pd.DataFrame", compared: "dict[str, tuple[Any, np.ndarray]]") -> "pd.DataFrame":
    """Metrics of the integration, by key: description, value, and reference values."""
    from itertools import permutations

    import pandas as pd

    from pyromosaic import metrics

    rows: dict[str, tuple[str, float, str]] = {}
    patterns, labels = mosaic.patterns, mosaic.labels()
    n_neighbors = min(15, len(latent) - 1)
    shares = patterns.value_counts(normalize=True)
    if len(shares) > 1:
        value = metrics.modality_enrichment(latent, patterns, n_neighbors)
        reading = f"mixed 1, apart {1 / (shares**2).sum():.2f}"
        rows["modality_enrichment"] = ("Modality enrichment of neighbours", value, reading)
    known = labels.notna()
    if known.sum() > n_neighbors:
        value = metrics.label_purity(latent[known], labels[known], n_neighbors)
        chance = (labels[known].value_counts(normalize=True) ** 2).sum()
        rows["label_purity"] = ("Label purity of neighbours", value, f"best 1, chance {chance:.2f}")
    groups = {name: known & (patterns == name) for name in mosaic.modalities}
    for x, y in permutations([name for name, cells in groups.items() if cells.any()], 2):
        value = metrics.label_transfer_accuracy(
            latent[groups[x]], labels[groups[x]], latent[groups[y]], labels[groups[y]]
        )
        reading = f"best 1, majority {labels[groups[y]].value_counts(normalize=True).max():.2f}"
        rows[f"label_transfer_{x}_to_{y}"] = (f"Label transfer, {x} to {y}", value, reading)
    for name, (truth, values) in compared.items():
        value = float(metrics.imputation_spearman(truth, values))
        rows[f"spearman_{name}"] = (f"Spearman of {name}, all entries", value, "best 1, chance 0")
        median = pd.Series(metrics.imputation_spearman(truth, values, per="feature")).median()
        rows[f"spearman_per_feature_{name}"] = (f"Spearman of {name}, median feature", median, "best 1, chance 0")
        detected = (truth > 0).mean()
        if mosaic.modalities[name].spec.traits.binary and detected > 0:
            value = metrics.imputation_auprc(truth, values)
            reading = f"best 1, chance {detected:.2f}"
            rows[f"auprc_{name}"] = (f"AUPRC of {name}, all entries", value, reading)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["measure", "value", "reading"])


def draw(
    multivi: "MultiVI",
    latent: "pd.DataFrame",
    compared: "dict[str, tuple[Any, np.ndarray]]",
    label_key: str | None,
    seed: int,
    path: Path,
) -> "pd.DataFrame":
    """Draw the figure and return the UMAP in it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from pyromosaic import plot

    mosaic = multivi.mosaic
    assert mosaic is not None
    colours = [mosaic.patterns.rename("modalities in training")]
    if label_key is not None:
        colours.append(mosaic.labels().rename(label_key))
    panels: dict[str, tuple[Any, np.ndarray, str]] = {}
    for name, (truth, values) in compared.items():
        spec, title = mosaic.modalities[name].spec, f"{name}, {len(values)} hidden cells"
        if spec.traits.binary:
            open_share, expected = (np.atleast_2d(np.asarray(part.mean(axis=0))) for part in (truth > 0, values))
            panels[title] = (open_share, expected, "share of cells, by region")
        else:
            panels[title] = (truth, values, "counts" if spec.data_kind == "count" else "values")
    coordinates = plot.umap(latent, seed)
    figure = plot.overview(coordinates, colours, panels, multivi.history)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return coordinates


def report(console: "Console", metrics: "pd.DataFrame") -> None:
    """Print the metrics as a table."""
    from rich.table import Table

    table = Table("measure", "value", "to compare with")
    table.columns[1].justify = "right"
    for measure, value, reading in metrics.itertuples(index=False):
        table.add_row(measure, f"{value:.3f}", reading)
    if len(metrics):
        console.print(table)
