"""An epoch of DiagVI on data that stay on disk: two modalities in different cells, with a given number of cells each.

python benchmarks/on_disk.py --cells 1000000 --folder million
"""

import argparse
from pathlib import Path

import numpy as np
from common import Figures, isolated, measured_cost, quiet, report

BLOCK = 20_000  # cells written at once


def write(path: Path, prefix: str, n_cells: int, profiles: np.ndarray, seed: int) -> None:
    """Counts of cells, each of one type, written block by block as CSR."""
    import anndata
    import h5py
    import pandas as pd
    from scipy import sparse

    def names(what: str, n: int) -> pd.DataFrame:
        return pd.DataFrame(index=[f"{prefix}{what}{i}" for i in range(n)])

    rng = np.random.default_rng(seed)
    for start in range(0, n_cells, BLOCK):
        size = min(BLOCK, n_cells - start)
        mean = profiles[rng.integers(len(profiles), size=size)] * rng.gamma(4, 0.25, (size, 1))
        drawn = rng.poisson(mean).astype(np.float32)
        drawn[:, 0] = np.maximum(drawn[:, 0], 1)  # so that no cell is empty
        counts = sparse.csr_matrix(drawn)
        if start == 0:
            anndata.AnnData(counts, names("_cell", size), names("", profiles.shape[1])).write_h5ad(path)
        else:
            with h5py.File(path, "r+") as file:
                anndata.io.sparse_dataset(file["X"]).append(counts)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        anndata.io.write_elem(file, "obs", names("_cell", n_cells))


def train(folder: Path, n_links: int, batch_size: int, linkage: str | None) -> Figures:
    """One epoch from the files."""
    quiet()
    import anndata
    import pandas as pd

    from pyromosaic import DiagVI, Mosaic

    with measured_cost() as registration:
        adatas = {name: anndata.read_h5ad(folder / f"{name}.h5ad", backed="r") for name in ("rna", "adt")}
        mosaic = Mosaic.from_anndata(adatas)
        links = pd.DataFrame({name: adata.var_names[:n_links] for name, adata in adatas.items()})
        model = DiagVI(mosaic, links, linkage=linkage)
    with measured_cost() as cost:
        model.train(1, batch_size=batch_size, progress_bar=False)
    return {
        "cells": mosaic.n_cells,
        "size of the files, MB": sum((folder / f"{name}.h5ad").stat().st_size for name in adatas) / 2**20,
        "seconds to register": registration.seconds,
        "seconds for an epoch": cost.seconds,
        "peak memory, MB": cost.peak_mb,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000, help="of each modality")
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--proteins", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--linkage", action="store_true", help="include canonical correlation before training")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the files")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(10, max(options.genes, options.proteins)))  # ten types, equal in linked features
    for seed, (name, width, depth) in enumerate((("rna", options.genes, 0.15), ("adt", options.proteins, 1.0))):
        profiles = depth * np.exp(signal[:, :width] + rng.normal(size=width))
        write(options.folder / f"{name}.h5ad", name, options.cells, profiles, seed)
    linkage = "cca" if options.linkage else None
    figures = isolated(train, options.folder, options.proteins, options.batch_size, linkage)
    report("DiagVI from disk", {"pyromosaic": [figures]}, vars(options), options.json)


if __name__ == "__main__":
    main()
