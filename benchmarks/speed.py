"""Processor time of a training epoch on one thread, compared with scvi-tools on the same data; without validation.

The first epoch, and everything before (e.g. linkage) and after training, are left out. Both systems alternate, in
separate processes, and the median epoch is reported. ``--batch-size`` is for ours; scvi-tools keeps its defaults.

    python benchmarks/speed.py multivi --cells 10000 --rna-only
    python benchmarks/speed.py diagvi --data snare_cortex.h5mu --min-share 0.005 --label-key cell_class --drop Mis
    python benchmarks/speed.py contrastivevi --genes 500
"""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Figures, arguments, isolated, measured_cost, quiet, report


def simulated(n_cells: int, n_genes: int, n_proteins: int, seed: int) -> Any:
    """Counts of ten types in two batches, a third of the cells in each pattern of RNA and antibodies."""
    import anndata
    import mudata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(seed)
    kind = rng.integers(10, size=n_cells)
    obs = pd.DataFrame(
        {"batch": rng.choice(["a", "b"], n_cells), "celltype": kind.astype(str)}, [f"cell{i}" for i in range(n_cells)]
    )
    pattern = np.arange(n_cells) % 3
    modalities = {}
    for name, width, depth, absent in (("rna", n_genes, 1500, 1), ("adt", n_proteins, 3000, 0)):
        cells = np.flatnonzero(pattern != absent)
        profiles = rng.dirichlet(np.full(width, 0.3), size=10)
        blocks = [
            sparse.csr_matrix(
                rng.poisson(profiles[kind[part]] * depth * rng.gamma(4, 0.25, (len(part), 1))).astype(np.float32)
            )
            for part in np.array_split(cells, -(-len(cells) // 2000))
        ]
        counts = sparse.vstack(blocks, format="csr")
        counts[:, 0] += sparse.csr_matrix(np.ones((counts.shape[0], 1), np.float32))  # so that no cell is empty
        var = pd.DataFrame(index=[f"{name}{j}" for j in range(width)])
        modalities[name] = anndata.AnnData(counts.tocsr(), obs=obs.iloc[cells], var=var)
    return mudata.MuData(modalities)


def mosaic_data(options: Namespace, seed: int) -> Any:
    """Simulated data of a given size, or real data."""
    if options.cells is not None:
        return simulated(options.cells, options.genes, options.proteins, seed)
    import mudata
    from multivi_mosaic import open_regions

    from pyromosaic import pbmc_mosaic

    return pbmc_mosaic() if options.data is None else open_regions(mudata.read_h5mu(options.data), options.min_share)


def multivi(options: Namespace, seed: int, **train: Any) -> None:
    """MultiVI on a mosaic, or on its RNA alone."""
    from pyromosaic import Mosaic, MultiVI

    mdata = mosaic_data(options, seed)
    modalities = {"rna": mdata["rna"]} if options.rna_only else dict(mdata.mod.items())
    model = MultiVI(Mosaic.from_anndata(modalities, match_cells=True, batch_key=options.batch_key), seed=seed)
    model.train(options.epochs, **train)


def scvi_multivi(options: Namespace, seed: int, **train: Any) -> None:
    """MULTIVI on the same mosaic, or SCVI on its RNA."""
    import scvi_tools

    mdata = mosaic_data(options, seed)
    if options.rna_only:
        scvi_tools.scvi_rna(mdata["rna"], options.batch_key, options.epochs, seed, **train)
    else:
        scvi_tools.multivi(mdata, options.batch_key, options.epochs, seed, **train)


def diagvi(options: Namespace, seed: int, **train: Any) -> None:
    """DiagVI on modalities whose pairing is hidden."""
    from diagvi_unpaired import as_mosaic, load

    from pyromosaic import DiagVI
    from pyromosaic.guidance import GuidanceGraph

    adatas, _, table = load(options, seed)
    mosaic = as_mosaic(options, adatas)
    DiagVI(mosaic, GuidanceGraph.from_table(mosaic, table, drop_absent=True), seed=seed).train(options.epochs, **train)


def scvi_diagvi(options: Namespace, seed: int, **train: Any) -> None:
    """DIAGVI on the same data."""
    import scvi_tools
    from diagvi_unpaired import load

    adatas, _, table = load(options, seed)
    likelihoods = {name: "nbmixture" if name == "adt" else "nb" for name in adatas}
    scvi_tools.diagvi(adatas, table, likelihoods, options.batch_key, options.epochs, seed, **train)


def cohorts(options: Namespace, seed: int) -> Any:
    """Planted treated and control cells."""
    from pyromosaic import simulate

    n = options.cells or 2000
    return simulate(n, {"rna": options.genes}, types=4, n_batches=1, treated=0.5, n_responses=2, seed=seed)[0]["rna"]


def contrastivevi(options: Namespace, seed: int, **train: Any) -> None:
    """ContrastiveVI on planted data."""
    from pyromosaic import ContrastiveVI, Mosaic

    mosaic = Mosaic.from_anndata({"rna": cohorts(options, seed)}, {"rna": "nb"})
    ContrastiveVI(mosaic.with_cohorts("condition", background="control"), seed=seed).train(options.epochs, **train)


def scvi_contrastivevi(options: Namespace, seed: int, **train: Any) -> None:
    """scvi-tools' ContrastiveVI on the same data."""
    import scvi_tools

    adata = cohorts(options, seed)
    background = np.asarray(adata.obs["condition"].astype(str) == "control")
    scvi_tools.contrastivevi(adata, background, None, options.epochs, seed, **train)


MODELS: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "multivi": (multivi, scvi_multivi),
    "diagvi": (diagvi, scvi_diagvi),
    "contrastivevi": (contrastivevi, scvi_contrastivevi),
}


def timed(options: Namespace, system: int, seed: int) -> Figures:
    """Train one system with a clock as callback."""
    quiet()
    import torch
    from lightning.pytorch.callbacks import Callback

    torch.set_num_threads(1)
    ends: list[float] = []

    class Clock(Callback):
        def on_train_epoch_end(self, trainer: Any, plan: Any) -> None:
            ends.append(time.process_time())

    own = {"progress_bar": False} | ({"batch_size": options.batch_size} if options.batch_size else {})
    with measured_cost() as cost:
        MODELS[options.model][system](
            options,
            seed,
            callbacks=[Clock()],
            check_val_every_n_epoch=2 * options.epochs,
            **(own if system == 0 else {"early_stopping": False}),
        )
    return {
        "processor seconds per epoch": float(np.median(np.diff(ends))),
        "seconds in total": cost.seconds,
        "peak memory, MB": cost.peak_mb,
    }


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--cells", type=int, help="simulated cells; by default real data (contrastivevi: 2,000)")
    parser.add_argument("--genes", type=int, default=2000, help="simulated genes")
    parser.add_argument("--proteins", type=int, default=100, help="simulated proteins")
    parser.add_argument("--min-share", type=float, default=0.0, help="use regions open in more than this share")
    parser.add_argument("--rna-only", action="store_true", help="multivi: the RNA alone, compared with SCVI")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default="celltype")
    parser.add_argument("--drop", nargs="*", default=[], help="labels of cells to leave out")
    parser.add_argument("--batch-size", type=int, help="for ours; by default that of the model")
    parser.add_argument("--epochs", type=int, default=20)
    parser.set_defaults(activity=False, control=False, peer=True)
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {"pyromosaic": []} | ({"scvi-tools": []} if options.peer else {})
    for seed in range(options.seeds):
        for system, figures in enumerate(runs.values()):
            figures.append(isolated(timed, options, system, seed))
    report(f"Speed of {options.model}", runs, vars(options), options.json)


if __name__ == "__main__":
    main()
