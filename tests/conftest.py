import gzip
import os
from collections.abc import Callable
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from filelock import FileLock
from mudata import MuData
from scipy import sparse
from scipy.io import mmwrite

from pyromosaic.data.tables import kept_apart
from pyromosaic.models import MosaicModel

# Tests run in several processes: threads beside them, in a notebook's kernel too, would only get in each other's way.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "1"  # numba, which draws UMAP, would set torch's threads to its own number


def pytest_collection_modifyitems(items):
    """Files with slow tests go first, so that at the end no process is left alone with one of them."""
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(autouse=True)
def own_parameters():
    """Each test begins without parameters of another in Pyro's global store."""
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Callable[[MosaicModel, Callable[[MosaicModel], None]], MosaicModel]:
    """``trained_once(model, train)``: a copy of the trained model of its class.

    The first process of a run that asks trains the model and saves it, all others load it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # common to the workers

    def trained(model: MosaicModel, train: Callable[[MosaicModel], None]) -> MosaicModel:
        saved = folder / type(model).__name__
        with FileLock(saved.with_suffix(".lock")):
            if not (saved / "model.json").exists():
                train(model)
                model.save(saved)
        return type(model).load(saved, model.mosaic)

    return trained


@pytest.fixture
def quick_umap(monkeypatch):
    """Two latent variables instead of a layout, which takes long to compile."""
    from pyromosaic import plot

    monkeypatch.setattr(
        plot, "umap", lambda latent, seed=0: latent.iloc[:, :2].set_axis(["UMAP 1", "UMAP 2"], axis=1) + seed
    )


@pytest.fixture
def shared_data():
    """The folder of development data beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.exists():
        pytest.skip("the development data are not here")
    return path


@pytest.fixture
def geo_files(shared_data, tmp_path, monkeypatch):
    """SNARE-seq as GEO has it, a quarter of the nuclei, where pooch looks before it downloads."""
    pytest.importorskip("pooch", reason="it comes with the extra 'test'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "pyromosaic"
    folder.mkdir()
    with kept_apart():
        nuclei = mudata.read_h5mu(shared_data / "snare_cortex.h5mu")[::4]
    for assay, features, name in (("cDNA", "genes", "rna"), ("chromatin", "peaks", "atac")):
        names = {features: nuclei[name].var_names, "barcodes": nuclei[name].obs_names}
        for part, index in names.items():
            pd.Series(index).to_csv(folder / f"snare_{assay}.{part}.tsv.gz", header=False, index=False)
        with gzip.open(folder / f"snare_{assay}.counts.mtx.gz", "wb", compresslevel=1) as file:
            mmwrite(file, nuclei[name].X.T.tocoo().astype(int))


@pytest.fixture
def mdata():
    """A small mosaic: 24 cells with RNA (12 genes) and 24 with antibodies (5 proteins), 16 cells in common."""

    age = np.random.default_rng(0).normal(40, 10, 32)

    def modality(first, n_features, prefix):
        generator = np.random.default_rng(n_features)
        counts = generator.poisson(0.4, (24, n_features)).astype(np.float32)
        counts[:, 0] += 1  # no empty cell
        here = slice(first, first + 24)
        obs = pd.DataFrame(
            {
                "batch": pd.Categorical(np.repeat(["a", "b", "c"], [8, 16, 8])[here]),
                "sex": np.resize(["f", "m", "m"], 32)[here],
                "age": age[here],
                "celltype": np.resize(["B", "T", "unknown", "NK"], 32)[here],
                "size": generator.uniform(10, 16, 24),
            },
            index=[f"cell{i}" for i in range(first, first + 24)],
        )
        var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_features)])
        return anndata.AnnData(sparse.csr_matrix(counts), obs, var, uns={"origin": "simulated"})

    return MuData({"rna": modality(0, 12, "gene"), "adt": modality(8, 5, "protein")})
