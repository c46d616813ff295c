"""Small data that users could have, for the tests of what registration and questions take."""

import warnings

import anndata
import numpy as np
import pandas as pd

from pyromosaic import Mosaic
from pyromosaic.links import links_by_overlap


def make(cells, n_features=3, prefix="f", **obs):
    counts = 1 + np.random.default_rng(0).poisson(5, (len(cells), n_features)).astype(np.float32)
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_features)])
    return anndata.AnnData(counts, pd.DataFrame(obs, index=pd.Index(cells, dtype=object)), var)


def warned(call):
    """What a call returns, and the texts of the warnings that are for users."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        returned = call()
    return returned, [str(w.message) for w in caught if w.category is UserWarning]


def names(n, prefix="c"):
    return [f"{prefix}{i}" for i in range(n)]


def matched(rna, adt, **shared):
    return Mosaic.from_anndata({"rna": rna, "adt": adt}, match_cells=True, **shared)


def with_zeros(store=np.array):
    x = 1 + np.random.default_rng(0).poisson(3, (60, 20)).astype(np.float32)
    x[::4] = 0
    return anndata.AnnData(store(x), pd.DataFrame(index=names(60)), pd.DataFrame(index=names(20, "x")))


def overlap(genes=("g0",), **columns):
    cells = names(10)
    rna, atac = make(cells, 2, "g"), make(cells, 4, "r")
    atac.var_names = ["chr1:800-900", "chr1:1000-2000", "chr1:2100-2200", "chr2:1000-2000"]
    mosaic = Mosaic.from_anndata({"rna": rna, "atac": atac}, match_cells=True)
    place = {"chromosome": "chr1", "start": 1200, "end": 1800, "strand": "+"} | columns
    pairs = links_by_overlap(mosaic, ("rna", "atac"), pd.DataFrame(place, index=list(genes)), promoter=500).pairs
    return set(pairs["atac"])


CELLS = names(40)
RNG = np.random.default_rng(0)
GROUP = pd.Series(RNG.choice(["a", "b"], 40), CELLS)
LATENT = pd.DataFrame(RNG.normal(size=(40, 2)) + 4 * (GROUP == "a").to_numpy()[:, None], CELLS, ["z_0", "z_1"])
