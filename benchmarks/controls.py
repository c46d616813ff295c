"""Isotype controls, hashtags and empty droplets: what they change in denoised antibodies.

Cells of four types differ in the amounts of protein that they have, in total as well, and in how well they were
captured. Every antibody also binds unspecifically, in proportion to capture and to how much of it floats around, which
empty droplets show. Six isotype controls bind only unspecifically; two hashtags mark two samples. The same model gets
these data in five ways:

* ``as antibodies``: controls and hashtags among the antibodies;
* ``left out``: without them;
* ``isotypes``: set apart by `separate_controls`, with the sizes that it estimates;
* ``droplets``: left out, and empty droplets inform the prior of the background;
* ``both``.

With ``--dsb``, the same ways are compared on blood cells with four isotype controls and their empty droplets, the
example data of the R package dsb (Mulè et al. 2022; CC0). One isotype control stays among the proteins: no cell has it.
Proteins of one lineage are what other lineages do not have.

    python benchmarks/controls.py
    git clone https://github.com/niaid/dsb && pip install rdata && python benchmarks/controls.py --dsb dsb/data
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from common import Figures, arguments, isolated, quiet, report
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

WAYS = ("as antibodies", "left out", "isotypes", "droplets", "both")
N_ISOTYPES, EVERYWHERE = 6, 5  # proteins that all types have: no cell shows their background


def draw(n_cells: int, n_proteins: int, seed: int) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Cells, empty droplets, and the truth."""
    import anndata

    rng = np.random.default_rng(seed)
    kind, sample = rng.integers(4, size=n_cells), rng.integers(2, size=n_cells)
    capture = rng.lognormal(0, 0.5, (n_cells, 1))
    share = np.array([0.6, 0.35, 0.2, 0.1])  # of the proteins that a type has
    has = rng.random((4, n_proteins)) < share[:, None]
    has[:, :EVERYWHERE] = True
    typical = rng.lognormal(3.5, 0.8, n_proteins)
    amount = has[kind] * typical * rng.lognormal(0, 0.4, (n_cells, n_proteins))
    ambient = rng.lognormal(1.0, 0.8, n_proteins + N_ISOTYPES)
    rate = capture * ambient * rng.lognormal(0, 0.2, (n_cells, n_proteins + N_ISOTYPES))
    rate[:, :n_proteins] += capture * amount
    tags = np.where(sample[:, None] == np.arange(2), 150.0, 3.0) * capture
    counts = rng.poisson(np.hstack([rate, tags]) * rng.gamma(20, 1 / 20, (n_cells, n_proteins + N_ISOTYPES + 2)))
    names = [f"CD{i}" for i in range(n_proteins)] + [f"Rat-IgG1-{i}" for i in range(N_ISOTYPES)] + ["HTO1", "HTO2"]
    obs = pd.DataFrame({"celltype": kind.astype(str)}, [f"cell{i}" for i in range(n_cells)])
    cells = anndata.AnnData(counts.astype(np.float32), obs, pd.DataFrame(index=names))
    floating = rng.poisson(rng.lognormal(-1.5, 0.5, (3000, 1)) * ambient)
    droplets = pd.DataFrame(floating[floating.any(axis=1)], columns=names[: n_proteins + N_ISOTYPES])
    truth = {"amount": amount, "capture": capture[:, 0], "kind": kind, "ambient": ambient[:n_proteins]}
    return cells, droplets, truth


def trained(way: str, cells: Any, droplets: pd.DataFrame, epochs: int, seed: int) -> tuple[Any, list[str]]:
    """A model of one form of the data, and the names of the proteins."""
    from pyromosaic import ModalitySpec, Mosaic, MultiVI
    from pyromosaic.data import control_roles, separate_controls

    spec: dict[str, Any] = {}
    proteins = (control_roles(cells.var_names) == "").to_numpy()
    adt = cells if way == "as antibodies" else cells[:, proteins].copy()
    if way in ("isotypes", "both"):
        adt, spec["size_factor_key"] = separate_controls(cells), "control_size"
    if way in ("droplets", "both"):
        spec["empty_droplets"] = droplets
    mosaic = Mosaic.from_anndata({"adt": adt}, {"adt": ModalitySpec("nb_mixture", **spec)})
    model = MultiVI(mosaic, seed=seed)
    model.train(epochs, seed=seed, progress_bar=False)
    return model, list(cells.var_names[proteins])


def run(way: str, options: argparse.Namespace, seed: int) -> Figures:
    """Train on one form of the simulated data, and compare with the truth."""
    quiet()
    cells, droplets, truth = draw(options.cells, options.proteins, seed)
    model, features = trained(way, cells, droplets, options.epochs, seed)
    denoised = model.get_normalized_expression("adt", features=features).to_numpy()
    background = model.get_protein_background_mean("adt", features=features).to_numpy()
    foreground = model.get_protein_foreground_probability("adt", features=features).to_numpy()
    amount, ambient = truth["amount"], np.log(truth["ambient"])
    some = [p for p in range(amount.shape[1]) if 0 < (amount[:, p] > 0).mean() < 1]
    within = [truth["kind"] == kind for kind in range(4)]
    follows = [
        spearmanr(denoised[cells_, p], truth["capture"][cells_])[0]
        for p in range(amount.shape[1])
        for cells_ in within
        if (amount[cells_, p] > 0).all()
    ]
    logs = np.log(denoised)  # types that have a protein have the same amount of it
    means = [
        [logs[cells_, p].mean() for cells_ in within if (amount[cells_, p] > 0).all()] for p in range(amount.shape[1])
    ]
    level = np.log(background).mean(axis=0) - ambient
    of_some, of_all = level[some] - np.median(level[some]), level[:EVERYWHERE] - np.median(level[some])
    return {
        "denoised and true amount, Spearman": float(
            np.mean([spearmanr(denoised[:, p], amount[:, p])[0] for p in some])
        ),
        "log ratio of types that have a protein alike, RMSE": float(
            np.sqrt(np.mean([np.var(of_types) for of_types in means if len(of_types) > 1]))
        ),
        "denoised and capture within types, Spearman": float(np.mean(follows)),
        "has the protein or not, AUC": float(
            np.mean([roc_auc_score(amount[:, p] > 0, foreground[:, p]) for p in some])
        ),
        "log background, RMSE": float(np.sqrt((of_some**2).mean())),
        "  of proteins that all cells have": float(np.sqrt((of_all**2).mean())),
    }


#: Proteins of one lineage of blood cells.
LINEAGES = {"T": ("CD3", "CD5", "CD28"), "B": ("CD19", "CD20", "IgD"), "monocytes": ("CD14", "CD33", "CD64")}
HIDDEN = "hidden_protein"  # name of the isotype control that stays among the proteins


def of_dsb(folder: Path) -> tuple[Any, pd.DataFrame]:
    """Cells and empty droplets of the example data of dsb; one isotype control gets the name of a protein."""
    import anndata
    import rdata

    tables = []
    for name in ("raw_pbmc", "raw_emptydrop"):
        (array,) = rdata.read_rda(folder / f"{name}_mtx_example_87ab_citeseq_Tsang.rda").values()
        table = array.to_pandas().T.astype(np.float32)
        table.columns = table.columns.astype(str).str.removesuffix("_PROT").str.strip()
        tables.append(table.rename(columns={"RatIgG2bkIsotype": HIDDEN}))
    cells, droplets = tables
    return anndata.AnnData(cells.rename_axis(None).rename_axis(None, axis=1)), droplets


def lineages(cells: Any) -> dict[str, np.ndarray]:
    """Cells of each lineage: those in which the mean of its proteins is highest, by more than a standard deviation.

    Values are standardised centred log ratios.
    """
    logs = np.log1p(cells.to_df())
    logs = logs.sub(logs.mean(axis=1), axis=0)
    scores = pd.DataFrame(
        {name: ((logs - logs.mean()) / logs.std())[list(own)].mean(axis=1) for name, own in LINEAGES.items()}
    )
    clear = np.diff(np.sort(scores.to_numpy(), axis=1))[:, -1] > 1
    return {name: clear & (scores.idxmax(axis=1) == name).to_numpy() for name in LINEAGES}


def run_dsb(way: str, options: argparse.Namespace, seed: int) -> Figures:
    """Train on one form of the real data, and compare with what is known of isotype controls and lineages."""
    quiet()
    from pyromosaic.data import control_roles

    cells, droplets = of_dsb(options.dsb)
    model, features = trained(way, cells, droplets, options.epochs, seed)
    modality = model.mosaic.modalities["adt"]
    denoised = model.get_normalized_expression("adt", features=features)
    background = model.get_protein_background_mean("adt", features=features)
    raw = cells.to_df()[features].div(modality.library / modality.schema.library, axis=0)
    isotypes = cells.to_df().loc[:, (control_roles(cells.var_names) == "isotype").to_numpy()].sum(axis=1)
    within = lineages(cells)

    def foreign(values: pd.DataFrame) -> float:
        """Mean in other lineages relative to that in the own."""
        ratios = []
        for name, own in LINEAGES.items():
            others = np.any([mask for other, mask in within.items() if other != name], axis=0)
            ratios += list(values.loc[others, list(own)].mean() / values.loc[within[name], list(own)].mean())
        return float(np.exp(np.mean(np.log(ratios))))

    follows = [
        spearmanr(denoised.loc[within[name], p], isotypes[within[name]])[0]
        for name, own in LINEAGES.items()
        for p in own
    ]
    ambient = np.log(droplets[features].mean())
    level = np.log(background).mean() - ambient
    return {
        "cells of the three lineages": float(sum(mask.sum() for mask in within.values())),
        "hidden isotype: share of its counts that is denoised protein": float(
            denoised[HIDDEN].mean() / raw[HIDDEN].mean()
        ),
        "proteins of a lineage, in others / in it: counts": foreign(raw),
        "  denoised": foreign(denoised),
        "denoised and isotype controls within lineages, Spearman": float(np.mean(follows)),
        "log background and log mean of droplets, Spearman": float(spearmanr(np.log(background).mean(), ambient)[0]),
        "  spread of their difference": float(level.std()),
    }


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--proteins", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--dsb", type=Path, help="folder with the example data of the R package dsb")
    options = parser.parse_args()
    one = partial(isolated, run_dsb if options.dsb else run)
    runs = {way: [one(way, options, seed) for seed in range(options.seeds)] for way in WAYS}
    report(f"controls among {'real' if options.dsb else 'simulated'} antibodies", runs, vars(options), options.json)


if __name__ == "__main__":
    main()
