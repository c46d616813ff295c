"""An epoch on data that stay on disk: RNA and antibodies, in the same cells for MultiVI, in different ones for DiagVI.

python benchmarks/on_disk.py --cells 1000000 --folder million
python benchmarks/on_disk.py --model multivi --genes 2000 --depth 0.025 --proteins 100 --folder million
python benchmarks/on_disk.py --model multivi --genes 2000 --depth 0.025 --proteins 100 --folder few --cells 40000 \
    --memory
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Figures, isolated, measured_cost, quiet, report

BLOCK = 20_000  # cells written at once


def write(path: Path, cell: str, prefix: str, kinds: np.ndarray, profiles: np.ndarray, seed: int) -> None:
    """Counts of cells of given types, written block by block as CSR."""
    import anndata
    import h5py
    import pandas as pd
    from scipy import sparse

    def names(what: str, n: int) -> pd.DataFrame:
        return pd.DataFrame(index=[f"{what}{i}" for i in range(n)])

    rng, n_cells = np.random.default_rng(seed), len(kinds)
    for start in range(0, n_cells, BLOCK):
        size = min(BLOCK, n_cells - start)
        mean = profiles[kinds[start : start + size]] * rng.gamma(4, 0.25, (size, 1))
        drawn = rng.poisson(mean).astype(np.float32)
        drawn[:, 0] = np.maximum(drawn[:, 0], 1)  # so that no cell is empty
        counts = sparse.csr_matrix(drawn)
        if start == 0:
            anndata.AnnData(counts, names(cell, size), names(prefix, profiles.shape[1])).write_h5ad(path)
        else:
            with h5py.File(path, "r+") as file:
                anndata.io.sparse_dataset(file["X"]).append(counts)
    with h5py.File(path, "r+") as file:
        del file["obs"]
        anndata.io.write_elem(file, "obs", names(cell, n_cells))


def train(options: argparse.Namespace) -> Figures:
    """One epoch from the files, and the latent variables of all cells."""
    quiet()
    import anndata
    import pandas as pd
    from lightning.pytorch.callbacks import Callback

    from pyromosaic import DiagVI, Mosaic, MultiVI

    files = {name: options.folder / f"{name}.h5ad" for name in ("rna", "adt")}
    with measured_cost() as registration:
        adatas = {name: anndata.read_h5ad(file, backed=None if options.memory else "r") for name, file in files.items()}
        mosaic = Mosaic.from_anndata(adatas, match_cells=options.model == "multivi")
        if options.model == "multivi":
            model: Any = MultiVI(mosaic)
        else:
            links = pd.DataFrame({name: adata.var_names[: options.proteins] for name, adata in adatas.items()})
            model = DiagVI(mosaic, links, linkage="cca" if options.linkage else None)
    times: list[float] = []
    sizes: list[int] = []

    class Clock(Callback):
        """Processor time from the first minibatch to the last, without what comes before and after an epoch."""

        def on_train_epoch_start(self, trainer: Any, plan: Any) -> None:
            times.append(time.process_time())

        def on_train_batch_end(self, trainer: Any, plan: Any, outputs: Any, minibatch: Any, step: int) -> None:
            times.append(time.process_time())
            sizes.append(len(minibatch))

    with measured_cost() as cost:
        quick: dict[str, Any] = {
            "validation": 0.01,
            "sleep_steps": 0,
            "progress_bar": False,
            "limit_train_batches": options.share,
        }
        quick["callbacks"] = [Clock()]
        model.train(1, batch_size=options.batch_size, **quick)
    with measured_cost() as latent:
        model.get_latent_representation()
    return {
        "cells": mosaic.n_cells,
        "size of the files, MB": sum(file.stat().st_size for file in files.values()) / 2**20,
        "seconds to register": registration.seconds,
        "seconds of training": cost.seconds,
        "processor time of minibatches per cell, µs": (times[-1] - times[0]) / sum(sizes) * 1e6,
        "seconds for latent variables": latent.seconds,
        "peak memory, MB": latent.peak_mb,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("multivi", "diagvi"), default="diagvi")
    parser.add_argument("--memory", action="store_true", help="read the files into memory")
    parser.add_argument("--cells", type=int, default=1_000_000, help="of each modality")
    parser.add_argument("--genes", type=int, default=500)
    parser.add_argument("--proteins", type=int, default=50)
    parser.add_argument("--depth", type=float, default=0.15, help="of RNA; 0.025 gives 6 %% of non-zero counts")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--share", type=float, default=1.0, help="of the minibatches of the epoch to train on")
    parser.add_argument("--linkage", action="store_true", help="diagvi: include canonical correlation before training")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the files")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(10, max(options.genes, options.proteins)))  # ten types, equal in linked features
    for seed, (name, width, depth) in enumerate(
        (("rna", options.genes, options.depth), ("adt", options.proteins, 1.0))
    ):
        profiles = depth * np.exp(signal[:, :width] + rng.normal(size=width))
        same = options.model == "multivi"
        kinds = np.random.default_rng(100 if same else 100 + seed).integers(len(profiles), size=options.cells)
        if not (file := options.folder / f"{name}.h5ad").exists():  # those of an earlier call are used again
            write(file, "cell" if same else f"{name}_cell", name, kinds, profiles, seed)
    report(f"{options.model} from disk", {"pyromosaic": [isolated(train, options)]}, vars(options), options.json)


if __name__ == "__main__":
    main()
