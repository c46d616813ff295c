"""Simulated cells for the tests of MultiVI, and small models of them."""

import anndata
import mudata
import numpy as np
import pandas as pd

from pyromosaic import Mosaic, MultiVI

QUIET = {"progress_bar": False, "accelerator": "cpu"}


def simulate(n_cells: int = 240, seed: int = 0) -> mudata.MuData:
    """Three modalities from four types in two batches; every pattern of presence occurs."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(4, size=n_cells), rng.integers(2, size=n_cells)
    obs = pd.DataFrame(
        {"batch": np.array(["a", "b"])[batch], "type": kind.astype(str)}, [f"c{i}" for i in range(n_cells)]
    )
    rna = rng.poisson(np.exp(rng.normal(0.3, 1.0, (4, 30)))[kind] * rng.gamma(4, 0.25, (n_cells, 1))) + (
        np.arange(30) == 0
    )
    atac = rng.random((n_cells, 50)) < rng.beta(1, 4, (4, 50))[kind]
    adt = rng.poisson(np.where(rng.random((4, 8)) < 0.5, 3.0, 60.0)[kind]) + 1
    pattern = np.arange(n_cells) % 7 + 1
    blocks = {"rna": rna, "atac": atac * rng.integers(1, 4, atac.shape), "adt": adt}
    return mudata.MuData(
        {
            name: anndata.AnnData(
                counts[pattern >> i & 1 == 1].astype(np.float32),
                obs=obs[pattern >> i & 1 == 1],
                var=pd.DataFrame(index=[f"{name}{j}" for j in range(counts.shape[1])]),
            )
            for i, (name, counts) in enumerate(blocks.items())
        }
    )


def small(mosaic: Mosaic, **options) -> MultiVI:
    return MultiVI(mosaic, **{"n_latent": 4, "n_hidden": 16, "mmd": 5.0, **options})
