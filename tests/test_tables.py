"""What registration takes from the user's obs tables, whatever MuData, pandas and anndata made of them."""

import warnings
from contextlib import nullcontext

import anndata
import dask.array
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from numpy.testing import assert_array_equal
from scipy import sparse

from pyromosaic import ModalitySpec, Mosaic, MultiVI
from pyromosaic.data import measured
from pyromosaic.data.tables import kept_apart

CELLS = [f"c{i}" for i in range(6)]
BATCH = dict(zip(CELLS, ["a", "a", "b", "b", "c", "c"], strict=True))


def make(cells, prefix, n_features, **columns):
    counts = 1 + np.arange(len(cells) * n_features, dtype=np.float32).reshape(len(cells), n_features)
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_features)])
    return AnnData(sparse.csr_matrix(counts), pd.DataFrame(columns, index=list(cells)), var)


def batches(cells):
    return {"batch": [BATCH[c] for c in cells]}


@pytest.fixture(params=["kept apart", "as the installed mudata does"])
def muon(request):
    """Makes a MuData in which columns were or were not copied into the whole."""

    def make_mudata(adatas):
        with kept_apart() if request.param == "kept apart" else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mdata = mudata.MuData(adatas)
            if request.param != "kept apart" and hasattr(mdata, "pull_obs"):
                mdata.pull_obs()  # what users of 0.4 do who are used to 0.3
        return mdata

    return make_mudata


def found(mosaic, name):
    """The batch of each cell of a modality, in words."""
    modality = mosaic.modalities[name]
    names = np.array([*modality.schema.categories["batch"], None], dtype=object)
    return dict(zip(mosaic.obs_names, names[modality.codes[:, 0]], strict=True))


def test_a_batch_of_one_modality_is_known_to_the_other_cells_that_share_it(muon):
    mdata = muon({"rna": make(CELLS, "g", 3, **batches(CELLS)), "adt": make(CELLS[2:], "p", 2)})
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    assert found(mosaic, "rna") == BATCH
    assert {c: found(mosaic, "adt")[c] for c in CELLS[2:]} == {c: BATCH[c] for c in CELLS[2:]}
    assert mosaic.modalities["adt"].schema.categories["batch"] == ("b", "c")


def test_a_cell_whose_batch_no_table_knows_is_refused(muon):
    mdata = muon({"rna": make(CELLS[:4], "g", 3, **batches(CELLS[:4])), "adt": make(CELLS[2:], "p", 2)})
    with pytest.raises(ValueError, match="modality 'adt': column 'batch' has no value for cell 'c4'"):
        Mosaic.from_mudata(mdata, batch_key="batch")


def test_a_batch_of_the_whole(muon):
    mdata = muon({"rna": make(CELLS[:4], "g", 3), "adt": make(CELLS[2:], "p", 2)})
    mdata.obs["batch"] = [BATCH[c] for c in mdata.obs_names]
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    assert {c: found(mosaic, "rna")[c] for c in CELLS[:4]} == {c: BATCH[c] for c in CELLS[:4]}
    assert {c: found(mosaic, "adt")[c] for c in CELLS[2:]} == {c: BATCH[c] for c in CELLS[2:]}


def test_a_batch_of_both_modalities(muon):
    mdata = muon(
        {"rna": make(CELLS[:4], "g", 3, **batches(CELLS[:4])), "adt": make(CELLS[2:], "p", 2, **batches(CELLS[2:]))}
    )
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    assert mosaic.modalities["rna"].schema.categories["batch"] == ("a", "b")
    assert mosaic.modalities["adt"].schema.categories["batch"] == ("b", "c")
    assert mosaic.column("batch").to_dict() == BATCH


def test_a_column_named_with_its_modality(muon):
    mdata = muon({"rna": make(CELLS, "g", 3, lane=list("xxyyzz")), "adt": make(CELLS[2:], "p", 2)})
    mosaic = Mosaic.from_mudata(mdata, batch_key="rna:lane")
    assert mosaic.modalities["rna"].schema.categories == {"rna:lane": ("x", "y", "z")}
    assert mosaic.modalities["adt"].schema.categories == {"rna:lane": ("y", "z")}
    assert mosaic.column("rna:lane").tolist() == list("xxyyzz")
    with pytest.raises(ValueError, match="'rna': no obs has a column 'adt:lane'; there are 'lane'$"):
        Mosaic.from_mudata(mdata, batch_key="adt:lane")


def test_the_modality_knows_better_than_a_copy_made_earlier(muon):
    mdata = muon({"rna": make(CELLS, "g", 3, lane=list("xxyyzz")), "adt": make(CELLS[2:], "p", 2)})
    mdata["rna"].obs["lane"] = list("xxyyyy")
    mosaic = Mosaic.from_mudata(mdata, batch_key="rna:lane")
    assert mosaic.column("rna:lane").tolist() == list("xxyyyy")
    assert mosaic.modalities["rna"].schema.categories == {"rna:lane": ("x", "y")}


def test_sizes_are_never_those_of_another_modality(muon):
    mdata = muon({"rna": make(CELLS, "g", 3, size=np.arange(1.0, 7.0)), "adt": make(CELLS, "p", 2)})
    with pytest.raises(ValueError, match="modality 'adt': no obs has a column 'size'; there are none"):
        Mosaic.from_mudata(mdata, size_factor_key="size")


def test_features_of_one_name_in_two_modalities_stay_apart(muon):
    mdata = muon({"rna": make(CELLS, "CD", 3), "adt": make(CELLS, "CD", 2)})
    mosaic = Mosaic.from_mudata(mdata)
    model = MultiVI(mosaic, n_latent=2, n_hidden=8)
    assert model.get_imputed_values("adt", features=["CD1"], n_samples=None).mean.columns.tolist() == ["CD1"]
    batch = measured(mosaic, np.arange(6))
    for name in ("rna", "adt"):
        assert_array_equal(batch.observed[name].dense_counts(), mdata[name].X.toarray())


def test_views_and_selections(muon):
    mdata = muon(
        {"rna": make(CELLS[:4], "g", 3, **batches(CELLS[:4])), "adt": make(CELLS[2:], "p", 2, **batches(CELLS[2:]))}
    )
    whole = Mosaic.from_mudata(mdata, batch_key="batch")
    view = mdata[["c5", "c2", "c0"]]
    mosaic = Mosaic.from_mudata(view, batch_key="batch")
    assert sorted(mosaic.obs_names) == ["c0", "c2", "c5"]
    assert mosaic.patterns.astype(str).to_dict() == {"c0": "rna", "c2": "rna+adt", "c5": "adt"}
    # Cells that all have RNA only leave the other modality empty: for a model that is no obstacle.
    alone = mdata[CELLS[:2]]
    with pytest.raises(ValueError, match="modality 'adt' has no cell; leave it out, or give it cells"):
        Mosaic.from_mudata(alone, batch_key="batch")
    query = Mosaic.from_mudata(alone, schema=whole.schema)
    assert query.patterns.astype(str).tolist() == ["rna", "rna"]
    nothing = mdata[mdata.obs_names[:0]]
    with pytest.raises(ValueError, match="the data have no cell"):
        Mosaic.from_mudata(nothing, schema=whole.schema)


DTYPES = {
    "objects": lambda values: np.array(values, dtype=object),
    "str": lambda values: pd.Series(values).astype(str).to_numpy(),
    "string": lambda values: pd.array(values, dtype="string"),
    "category": pd.Categorical,
    "ordered": lambda values: pd.Categorical(values, categories=["c", "b", "a"], ordered=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_of_every_type_are_the_same_batches(dtype):
    adata = make(CELLS, "g", 3)
    adata.obs["batch"] = DTYPES[dtype]([BATCH[c] for c in CELLS])
    adata.obs.index = pd.Index(DTYPES["string" if dtype == "string" else "objects"](CELLS))
    mosaic = Mosaic.from_anndata({"rna": adata}, batch_key="batch", label_key="batch")
    assert mosaic.modalities["rna"].schema.categories == {"batch": ("a", "b", "c")}
    assert mosaic.modalities["rna"].codes[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert mosaic.labels().tolist() == list(BATCH.values())
    assert mosaic.find(np.array(["c3"])).tolist() == [3]
    assert mosaic.find(pd.Index(["c3"])).tolist() == [3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pd.array([1, 1, 2, 2, 3, 3], dtype="Int64"), ("1", "2", "3")),
        (pd.array([True, True, False, False, True, True], dtype="boolean"), ("False", "True")),
    ],
    ids=["Int64", "boolean"],
)
def test_nullable_categories(values, words):
    adata = make(CELLS, "g", 3, batch=values)
    assert Mosaic.from_anndata({"rna": adata}, batch_key="batch").modalities["rna"].schema.categories["batch"] == words
    adata.obs.loc["c2", "batch"] = pd.NA
    with pytest.raises(ValueError, match="column 'batch' has no value for cell 'c2'"):
        Mosaic.from_anndata({"rna": adata}, batch_key="batch")


def test_nullable_numbers_as_covariates_and_missing_labels():
    adata = make(CELLS, "g", 3, age=pd.array([20, 30, 40, 50, 60, 70], dtype="Int64"))
    adata.obs["type"] = pd.array(["B", None, "T", "T", None, "B"], dtype="string")
    spec = ModalitySpec("nb", continuous_covariates=["age"], label_key="type")
    mosaic = Mosaic.from_anndata({"rna": adata}, {"rna": spec})
    assert mosaic.modalities["rna"].schema.continuous["age"] == pytest.approx(
        (45, np.std(adata.obs["age"].astype(float)))
    )
    assert mosaic.modalities["rna"].labels.tolist() == [0, -1, 1, 1, -1, 0]
    adata.obs.loc["c2", "age"] = pd.NA
    with pytest.raises(ValueError, match="covariate 'age' must be finite in every cell; found <NA> in cell 'c2'"):
        Mosaic.from_anndata({"rna": adata}, {"rna": spec})


def test_tables_are_left_as_they_are_under_copy_on_write(muon):
    mdata = muon({"rna": make(CELLS, "g", 3, **batches(CELLS)), "adt": make(CELLS[2:], "p", 2)})
    before = mdata.obs.copy(), mdata["rna"].obs.copy(), mdata["adt"].obs.copy()
    Mosaic.from_mudata(mdata, batch_key="batch")
    for table, kept in zip((mdata.obs, mdata["rna"].obs, mdata["adt"].obs), before, strict=True):
        pd.testing.assert_frame_equal(table, kept)


@pytest.mark.parametrize("kind", ["csr_array", "csc_array", "zarr", "zarr, read by rows", "h5ad, read by rows"])
def test_stores_and_arrays(kind, tmp_path):
    adata = make(CELLS, "g", 3, **batches(CELLS))
    expected = adata.X.toarray()
    if kind.endswith("array"):
        adata.X = getattr(sparse, kind)(adata.X)
    elif kind == "h5ad, read by rows":
        adata.write_h5ad(tmp_path / "data.h5ad")
        adata = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats and of consolidated metadata
            adata.write_zarr(tmp_path / "data.zarr")
            adata = anndata.read_zarr(tmp_path / "data.zarr")
            if kind != "zarr":
                store = zarr.open(tmp_path / "data.zarr", mode="r")
                adata = AnnData(anndata.io.sparse_dataset(store["X"]), adata.obs, adata.var)
    mosaic = Mosaic.from_anndata({"rna": adata}, batch_key="batch")
    index = np.array([4, 0, 3])
    assert_array_equal(measured(mosaic, index).observed["rna"].dense_counts(), expected[index])


def test_lazy_data_are_refused(tmp_path):
    if not hasattr(anndata.experimental, "read_lazy"):
        pytest.skip("the installed anndata has no read_lazy")
    make(CELLS, "g", 3, **batches(CELLS)).write_h5ad(tmp_path / "data.h5ad")
    lazy = anndata.experimental.read_lazy(tmp_path / "data.h5ad")
    with pytest.raises(ValueError, match="modality 'rna' was opened by read_lazy; accepted: anndata.read_h5ad"):
        Mosaic.from_anndata({"rna": lazy})


def test_arrays_of_dask_are_refused():
    adata = make(CELLS, "g", 3)
    adata.X = dask.array.from_array(adata.X.toarray(), chunks=(2, 3))
    with pytest.raises(ValueError, match="modality 'rna': the measurements are a Array; accepted: a NumPy array"):
        Mosaic.from_anndata({"rna": adata})
