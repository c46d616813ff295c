"""Seconds per epoch and peak memory: MultiVI and a single modality, on real and simulated sizes, beside scvi-tools.

python benchmarks/speed.py --peer
python benchmarks/speed.py --data snare_cortex.h5mu --min-share 0.005 --cells 5000 --cells 20000 --peer
"""

from argparse import Namespace
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
        counts[:, 0] += sparse.csr_matrix(np.ones((counts.shape[0], 1), np.float32))  # no cell is empty
        var = pd.DataFrame(index=[f"{name}{j}" for j in range(width)])
        modalities[name] = anndata.AnnData(counts.tocsr(), obs=obs.iloc[cells], var=var)
    return mudata.MuData(modalities)


def data(options: Namespace, size: int | None, seed: int) -> Any:
    """The data of one setting: simulated of a size, or real."""
    if size is not None:
        return simulated(size, options.genes, options.proteins, seed)
    import mudata
    from multivi_mosaic import open_regions

    from pyromosaic import pbmc_mosaic

    return pbmc_mosaic() if options.data is None else open_regions(mudata.read_h5mu(options.data), options.min_share)


def ours(options: Namespace, size: int | None, rna_only: bool, seed: int) -> Figures:
    """Train this package's MultiVI for a few epochs."""
    quiet()
    from pyromosaic import Mosaic, MultiVI

    mdata = data(options, size, seed)
    modalities = {"rna": mdata["rna"]} if rna_only else dict(mdata.mod.items())
    mosaic = Mosaic.from_anndata(modalities, match_cells=True, batch_key=options.batch_key)
    model = MultiVI(mosaic, seed=seed)
    with measured_cost() as cost:
        model.train(options.epochs, batch_size=options.batch_size, seed=seed, progress_bar=False)
    return {"seconds per epoch": cost.seconds / options.epochs, "peak memory, MB": cost.peak_mb}


def peer(options: Namespace, size: int | None, rna_only: bool, seed: int) -> Figures:
    """Train scvi-tools' MULTIVI, or SCVI for RNA alone, for as many epochs."""
    quiet()
    import peers

    mdata = data(options, size, seed)
    if rna_only:
        result = peers.scvi_rna(mdata["rna"], options.batch_key, options.epochs, seed)
    else:
        result = peers.multivi(mdata, options.batch_key, options.epochs, seed)
    return {"seconds per epoch": result.seconds_per_epoch, "peak memory, MB": result.peak_memory_mb}


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, action="append", help="a simulated size (may be repeated)")
    parser.add_argument("--genes", type=int, default=2000, help="simulated genes")
    parser.add_argument("--proteins", type=int, default=100, help="simulated proteins")
    parser.add_argument("--min-share", type=float, default=0.0, help="use regions open in more than this share")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--batch-size", type=int, default=256, help="ours; scvi-tools keeps its default of 128")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {"pyromosaic": []}
    if options.peer:
        runs["scvi-tools"] = []
    systems = {"pyromosaic": ours, "scvi-tools": peer}
    for seed in range(options.seeds):
        for system, figures in runs.items():
            whole: Figures = {}
            for size in (None, *(options.cells or ())):
                for rna_only in (False, True):
                    name = ("real data" if size is None else f"{size} cells") + (", RNA alone" if rna_only else "")
                    result = isolated(systems[system], options, size, rna_only, seed)
                    whole |= {f"{name}: {key}": value for key, value in result.items()}
            figures.append(whole)
    report("Speed of MultiVI", runs, vars(options), options.json)


if __name__ == "__main__":
    main()
