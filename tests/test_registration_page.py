"""Each row of the page "What the package does with ..." is run."""

import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small import GROUP, LATENT, make, matched, names, overlap, with_zeros

from pyromosaic import ModalitySpec, Mosaic, MultiVI, checks, linkage, metrics, simulate

PAGE = Path(__file__).parents[1] / "docs/user_guide/registration.md"
LINES = PAGE.read_text().splitlines() if PAGE.exists() else []  # the sources alone are without the page
ROWS = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in LINES if "| `" in line]


@pytest.fixture
def examples():
    """The names that the examples of the page use."""
    mdata, _ = simulate(60, {"rna": 50, "adt": 8}, patterns=["rna+adt"], n_batches=2)
    rna, adt = mdata["rna"], mdata["adt"]
    rna.obs["number"] = rna.obs["5"] = [0, 1] * 30
    mosaic = matched(rna, adt, batch_key="batch")

    def register(match_cells=True, **shared):
        adatas = {"rna": rna.copy(), "adt": adt.copy()}
        for name, adata in adatas.items():
            for key in [key for key in shared if key.startswith(f"{name}_")]:
                adata.obs[key.removeprefix(f"{name}_")] = shared.pop(key)
        return Mosaic.from_anndata(adatas, match_cells=match_cells, **shared)

    def unmeasured():
        adata = rna.copy()
        x = sparse.csr_matrix(adata.X).toarray()
        x[np.ix_(adata.obs["batch"] == "batch0", np.arange(25))] = 0
        x[np.ix_(adata.obs["batch"] != "batch0", np.arange(25))] += 1
        adata.X = x
        return Mosaic.from_anndata({"rna": adata}, batch_key="batch")

    def changed():
        adata = make(names(30))
        registered = Mosaic.from_anndata({"rna": adata})
        adata.X[:] = np.log1p(adata.X)
        return registered.modalities["rna"].read(np.arange(3))

    def zeros(likelihood, **spec):
        whole = {"rna": make(names(60)), "x": with_zeros()}
        return Mosaic.from_anndata(whole, {"rna": "nb", "x": ModalitySpec(likelihood, **spec)}, match_cells=True)

    def values(x, likelihood):
        adata = anndata.AnnData(x, pd.DataFrame(index=names(x.shape[0])))
        return Mosaic.from_anndata({"x": adata}, {"x": likelihood})

    def block(proteins):
        whole = rna.copy()
        whole.obsm["protein"] = proteins
        return Mosaic.from_obsm(whole, {"rna": None, "adt": "protein"})

    def damaged(x):
        matrix = sparse.csr_matrix(x)
        matrix.indices[-1] = x.shape[1]
        return matrix

    return {
        **{"values": values, "damaged": damaged},
        "counts": np.random.default_rng(0).poisson(2.0, (30, 40)).astype(np.float32),
        **{"rna": rna, "adt": adt, "mosaic": mosaic, "model": MultiVI(mosaic, n_latent=3, n_hidden=8)},
        **{"register": register, "apart": lambda **shared: register(match_cells=False, **shared)},
        **{"zeros": zeros, "block": block, "unmeasured": unmeasured, "changed": changed, "overlap": overlap},
        **{"mask": adt.obs["celltype"] == "type0", "latent": LATENT, "labels": GROUP, "metrics": metrics},
        **{"table": adt.to_df(), "points": LATENT.to_numpy(), "weights": np.full(len(LATENT), 1 / len(LATENT))},
        **{
            "Mosaic": Mosaic,
            "ModalitySpec": ModalitySpec,
            "MultiVI": MultiVI,
            "checks": checks,
            "linkage": linkage,
            "np": np,
            "pd": pd,
        },
    }


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_the_page_says_holds(row, examples):
    _, example, outcome = row
    (code,) = re.findall(r"^`(.*)`$", example)
    how, _, message = outcome.partition(":")
    assert how in ("taken", "warned", "refused")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "refused":
            with pytest.raises((ValueError, TypeError), match=re.escape(message.strip())):
                eval(code, examples)
        else:
            eval(code, examples)
    assert bool([w for w in caught if w.category is UserWarning]) == (how == "warned")
