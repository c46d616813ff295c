import copy
import json
from contextlib import nullcontext
from tempfile import mkdtemp

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata.abc import CSCDataset, CSRDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from mudata import MuData
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from pyromosaic import ModalitySpec, Mosaic, hide, pbmc_mosaic, protein_gene_links, unpair
from pyromosaic.data import Schema, loader, measured, split, to_predict

IN_MEMORY = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "whole numbers": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "dense": np.array,
    "dense, column by column": np.asfortranarray,
    "dense, double precision": lambda x: x.astype(np.float64),
}
BACKED = {"backed csr": sparse.csr_matrix, "backed csc": sparse.csc_matrix, "backed dense": np.array}
STORAGES = [*IN_MEMORY, *BACKED]


def make(cells, n_features=3, seed=0, prefix="f", density=1.0, storage="csr", folder=None, **obs):
    """Counts of these cells, without an empty one."""
    generator = np.random.default_rng(seed)
    counts = (1 + generator.poisson(3, (len(cells), n_features))) * (
        generator.random((len(cells), n_features)) < density
    )
    counts[:, 0] = 1 + np.arange(len(cells))
    obs = pd.DataFrame(obs, index=pd.Index(cells, dtype=object))
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_features)])
    adata = anndata.AnnData({**IN_MEMORY, **BACKED}[storage](counts.astype(np.float32)), obs, var)
    if storage in IN_MEMORY:
        return adata
    path = f"{mkdtemp(dir=folder)}/data.h5ad"
    adata.write_h5ad(path)
    return anndata.read_h5ad(path, backed="r")


def names(first, last):
    return [f"c{i}" for i in range(first, last)]


def dense(matrix):
    matrix = matrix[:]
    return np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, dtype=np.float32)


def arrays(matrix):
    if isinstance(matrix, pd.DataFrame):
        return [type(matrix), matrix.to_numpy()]
    if sparse.issparse(matrix):
        return [type(matrix), matrix.shape, matrix.data, matrix.indices, matrix.indptr]
    return [type(matrix), matrix]


def parts(adata):
    """Everything in an AnnData that registration could have touched."""
    found = {"uns": dict(adata.uns), "obs": adata.obs, "var": adata.var, "X": arrays(adata.X)}
    found |= {f"layer {k}": arrays(v) for k, v in adata.layers.items()}
    return found | {f"obsm {k}": arrays(v) for k, v in adata.obsm.items()}


class Unchanged:
    """Within, the data stay exactly as they are."""

    def __init__(self, data):
        adatas = data.mod if isinstance(data, MuData) else data
        self.now = lambda: {
            "obs": data.obs if isinstance(data, MuData) else None,
            **{name: parts(adata) for name, adata in adatas.items()},
        }

    def __enter__(self):
        self.before = copy.deepcopy(self.now())

    def __exit__(self, *exception):
        same(self.before, self.now())


def same(before, after):
    assert type(before) is type(after)
    if isinstance(before, dict):
        assert list(before) == list(after)
        for key in before:
            same(before[key], after[key])
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            same(one, other)
    elif isinstance(before, pd.DataFrame):
        pd.testing.assert_frame_equal(before, after)
    elif isinstance(before, np.ndarray):
        assert before.dtype == after.dtype
        assert before.flags.f_contiguous == after.flags.f_contiguous
        assert_array_equal(before, after)
    else:
        assert before == after


def refusal(expected, call, *args, **kwargs):
    """The call is refused with one line that says all that is expected."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert "np." not in message
    for part in expected:
        assert part in message


# Registration


def test_mudata_holes(mdata):
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    assert mosaic.n_cells == 32
    assert list(mosaic.obs_names) == list(mdata.obs_names)
    for name, adata in mdata.mod.items():
        modality = mosaic.modalities[name]
        assert_array_equal(mosaic.presence[name], mdata.obs_names.isin(adata.obs_names))
        present = mosaic.obs_names[modality.present]
        assert_array_equal(adata.obs_names[modality.rows[modality.present]], present)
        assert_array_equal(modality.rows[~modality.present], -1)
        assert modality.schema.features == tuple(adata.var_names)
        totals = pd.Series(np.ravel(adata.X.sum(1)), adata.obs_names)
        assert_allclose(modality.library[modality.present], totals[present])
        assert np.isnan(modality.library[~modality.present]).all()
        assert modality.schema.library == np.median(totals)
    assert mosaic.patterns.value_counts().to_dict() == {"rna": 8, "adt": 8, "rna+adt": 16}
    assert mosaic.patterns["cell0"] == "rna"
    assert mosaic.patterns["cell31"] == "adt"
    assert [m.spec.likelihood for m in mosaic.modalities.values()] == ["nb", "nb_mixture"]


def test_only_some_modalities(mdata):
    mosaic = Mosaic.from_mudata(mdata, {"adt": "nb"})
    assert list(mosaic.obs_names) == list(mdata["adt"].obs_names)
    assert list(mosaic.modalities) == ["adt"]


def test_unmatched_anndata_keep_every_row_a_cell():
    mosaic = Mosaic.from_anndata({"rna": make(names(0, 4)), "adt": make(names(2, 5))})
    assert mosaic.n_cells == 7
    assert list(mosaic.obs_names) == [f"rna:c{i}" for i in range(4)] + [f"adt:c{i}" for i in range(2, 5)]
    assert not mosaic.presence.all(axis=1).any()
    apart = Mosaic.from_anndata({"rna": make(names(0, 4)), "adt": make(names(4, 6))})
    assert list(apart.obs_names) == names(0, 6)


def test_matched_anndata():
    adatas = {"rna": make(names(0, 4)), "adt": make(["c3", "c9", "c2"])}
    mosaic = Mosaic.from_anndata(adatas, match_cells=True)
    assert list(mosaic.obs_names) == ["c0", "c1", "c2", "c3", "c9"]
    assert mosaic.modalities["adt"].rows.tolist() == [-1, -1, 2, 0, 1]


@pytest.mark.parametrize("kind", ["array", "table", "csr", "csc"])
def test_obsm_blocks(kind):
    adata = make(names(0, 6), 4)
    protein = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
    if kind in ("array", "table"):
        protein[[1, 4]] = np.nan
        adata.obsm["protein"] = (
            protein if kind == "array" else pd.DataFrame(protein, index=adata.obs_names, columns=["CD3", "CD4"])
        )
        missing = [1, 4]
    else:
        adata.obsm["protein"] = getattr(sparse, f"{kind}_matrix")(protein)
        missing = []
    with Unchanged({"all": adata}):
        mosaic = Mosaic.from_obsm(adata, {"rna": None, "adt": "protein"})
        batch = measured(mosaic, np.arange(6))
    assert mosaic.modalities["adt"].schema.features == (("CD3", "CD4") if kind == "table" else ("adt_0", "adt_1"))
    assert np.flatnonzero(~mosaic.presence["adt"]).tolist() == missing
    assert_array_equal(batch.observed["adt"].dense_counts(), np.delete(protein, missing, axis=0))
    assert_array_equal(batch.observed["rna"].dense_counts(), dense(adata.X))
    if kind in ("array", "table"):
        assert np.shares_memory(mosaic.modalities["adt"].matrix.source, np.asarray(adata.obsm["protein"]))


def test_holes_in_the_dense_x_beside_an_obsm_block():
    adata = make(names(0, 4), 3, storage="dense")
    adata.X[2] = np.nan
    adata.obsm["protein"] = np.ones((4, 2))
    assert Mosaic.from_obsm(adata, {"rna": None, "adt": "protein"}).presence["rna"].tolist() == [
        True,
        True,
        False,
        True,
    ]


def test_specification_of_a_modality(mdata):
    rna = mdata["rna"]
    rna.layers["raw"] = 3 * rna.X
    specs = {
        "rna": ModalitySpec(
            "zinb",
            layer="raw",
            batch_key="batch",
            categorical_covariates=("sex",),
            continuous_covariates=["age"],
            label_key="celltype",
            size_factor_key="size",
        ),
        "adt": "nb",
    }
    with Unchanged(mdata), pytest.warns(UserWarning, match="the sizes in column 'size' hardly correlate with"):
        mosaic = Mosaic.from_mudata(mdata, specs, label_key="celltype")
    modality = mosaic.modalities["rna"]
    schema, present = modality.schema, modality.present
    assert schema.categories == {"batch": ("a", "b"), "sex": ("f", "m")}
    assert_array_equal(np.array(["a", "b"])[modality.codes[present, 0]], rna.obs["batch"])
    assert_array_equal(np.array(["f", "m"])[modality.codes[present, 1]], rna.obs["sex"])
    age = rna.obs["age"].to_numpy()
    assert schema.continuous["age"] == pytest.approx((age.mean(), age.std()))
    assert_allclose(modality.continuous[present, 0], (age - age.mean()) / age.std(), rtol=1e-5)
    assert_allclose(modality.library[present], rna.obs["size"], rtol=1e-6)
    assert schema.library == pytest.approx(rna.obs["size"].median())
    assert schema.labels == ("B", "NK", "T")
    assert_array_equal(
        modality.labels[present],
        [("B", "NK", "T", "unknown").index(c) % 3 - (c == "unknown") for c in rna.obs["celltype"]],
    )
    assert_array_equal(measured(mosaic, np.arange(5)).observed["rna"].dense_counts(), dense(rna.layers["raw"])[:5])
    assert schema.n_covariates == measured(mosaic, np.arange(5)).observed["rna"].design().shape[1] == 5
    assert mosaic.modalities["adt"].spec == ModalitySpec("nb", label_key="celltype")


def test_cells_without_a_modality_know_its_columns_from_elsewhere(mdata):
    # cell0 to cell7 have RNA only; antibodies were measured in b and c.
    mdata["rna"].obs["batch"] = np.repeat(["a", "b", "b"], [3, 5, 16])
    codes = Mosaic.from_mudata(mdata, batch_key="batch").modalities["adt"].codes[:8, 0]
    assert codes.tolist() == [-1] * 3 + [0] * 5
    for adata in mdata.mod.values():
        adata.obs["lane"] = "own"
    mdata.obs["lane"] = "whole"
    with pytest.warns(UserWarning, match="'lane' of cell 'cell0' is 'own' in modality 'rna' and 'whole' in the obs of"):
        own = Mosaic.from_mudata(mdata, categorical_covariates=("lane",))
    assert own.schema["rna"].categories == {"lane": ("own",)}
    del mdata["rna"].obs["lane"], mdata["adt"].obs["lane"]
    assert Mosaic.from_mudata(mdata, categorical_covariates=("lane",)).schema["rna"].categories == {"lane": ("whole",)}


def test_numbered_batches_have_the_same_names_with_and_without_holes():
    adatas = {"rna": make(names(0, 4), batch=[1, 1, 2, 2]), "adt": make(names(2, 4), batch=[2, 2])}
    mosaic = Mosaic.from_anndata(adatas, match_cells=True, batch_key="batch")
    assert mosaic.schema["rna"].categories["batch"] == ("1", "2")
    assert mosaic.schema["adt"].categories["batch"] == ("2",)
    assert mosaic.modalities["adt"].codes[:, 0].tolist() == [-1, -1, 0, 0]


def test_labels_come_from_the_modality_that_knows():
    adatas = {
        "rna": make(names(0, 4), kind=["B", "?", None, "T"]),
        "adt": make(names(1, 5), kind=["NK", None, "T", "?"]),
    }
    mosaic = Mosaic.from_anndata(adatas, match_cells=True, label_key="kind", unlabelled="?")
    assert mosaic.labels().astype(object).fillna("?").tolist() == ["B", "NK", "?", "T", "?"]
    unlabelled = Mosaic.from_anndata({"rna": make(["c0"], kind="unknown")}, label_key="kind")
    assert unlabelled.schema["rna"].labels == ()
    assert unlabelled.labels().isna().all()


def test_likelihoods_decide_what_values_are_accepted():
    halves, minus, empty = (make(names(0, 3), storage="dense") for _ in range(3))
    halves.X[1, 1], minus.X[1, 1], empty.X[1] = 0.5, -1, 0

    def register(adata, likelihood, **fields):
        return Mosaic.from_anndata({"x": adata}, {"x": ModalitySpec(likelihood, **fields)})

    for likelihood in ("nb", "zinb", "nb_mixture", "bernoulli"):
        refusal(["'x'", "c1", "f1", "0.5", "not a whole number"], register, halves, likelihood)
        register(halves, likelihood, allow_non_integer=True)
        refusal(["'x'", "c1", "f1", "-1", "negative"], register, minus, likelihood, allow_non_integer=True)
    for likelihood in ("log1p_normal", "ziln", "zig"):
        register(halves, likelihood)
        refusal(["'x'", "c1", "f1", "-1", "negative"], register, minus, likelihood)
    assert_array_equal(register(minus, "normal").modalities["x"].library, 1)
    for likelihood in ("nb", "zinb", "nb_mixture"):
        refusal(["'x'", "'c1'", "all values are 0"], register, empty, likelihood)
        refusal(["'x'", "'c1'", "size 0.0"], register, empty, likelihood, empty_cells="keep")


# Storage


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_minibatches_hold_the_rows_of_the_source(storage, density, tmp_path):
    adatas = {
        "rna": make(names(0, 12), 11, 1, density=density, storage=storage, folder=tmp_path),
        "adt": make(names(8, 16)[::-1], 4, 2, density=density, storage=storage, folder=tmp_path),
    }
    index = np.random.default_rng(0).permutation(16)
    with Unchanged(adatas) if storage in IN_MEMORY else nullcontext():
        mosaic = Mosaic.from_anndata(adatas, {"rna": "nb", "adt": "nb"}, match_cells=True)
        batch = measured(mosaic, index)
    for name, adata in adatas.items():
        modality, view = mosaic.modalities[name], batch.observed[name]
        cells = mosaic.obs_names[index[view.rows.numpy()]]
        assert sorted(cells) == sorted(adata.obs_names)
        expected = dense(adata.X)[adata.obs_names.get_indexer(cells)]
        assert_array_equal(view.dense_counts(), expected)
        assert view.dense_counts().dtype == torch.float32
        assert_array_equal(view.library[:, 0], expected.sum(1))
        read = modality.read(index[view.rows])
        assert_array_equal(read.toarray() if sparse.issparse(read) else read, expected)
        if name == "rna":
            assert view.counts.is_sparse == ("dense" not in storage and density < 0.3)


def test_some_cells_of_a_modality_are_those_cells(mdata):
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch", label_key="celltype")
    cells = np.array([20, 3, 9])
    for modality in mosaic.modalities.values():
        part = modality.take(cells)
        assert np.array_equal(part.present, modality.present[cells]) and part.schema is modality.schema
        here = np.flatnonzero(part.present)
        assert torch.equal(part.tensor(here).to_dense(), modality.tensor(cells[here]).to_dense())
        for name in ("codes", "continuous", "library", "labels"):
            np.testing.assert_array_equal(getattr(part, name), getattr(modality, name)[cells])


@pytest.mark.filterwarnings("ignore:.*like counts")
def test_only_sparse_counts_make_sparse_minibatches():
    adata = make(names(0, 12), 11, density=0.1)
    for likelihood, sparse_counts in {"zinb": True, "bernoulli": True, "normal": False, "ziln": False}.items():
        counts = measured(Mosaic.from_anndata({"x": adata}, {"x": likelihood}), np.arange(12)).observed["x"].counts
        assert counts.is_sparse == sparse_counts
        assert_array_equal(counts.to_dense(), dense(adata.X))


def test_matrices_stay_as_they_are(tmp_path):
    def source(storage):
        adata = make(names(0, 5), storage=storage, folder=tmp_path)
        return adata.X, Mosaic.from_anndata({"rna": adata}).modalities["rna"].matrix.source

    for storage in ("csr", "csr_array", "whole numbers"):
        given, kept = source(storage)
        assert kept is given
    for storage in ("csc", "csc_array"):
        assert source(storage)[1].format == "csr"
    for storage in ("dense", "dense, column by column", "dense, double precision"):
        assert np.shares_memory(*source(storage))
    for storage, kind in {"backed csr": CSRDataset, "backed csc": CSCDataset, "backed dense": h5py.Dataset}.items():
        assert isinstance(source(storage)[1], kind)


def test_backed_mudata_and_views(mdata, tmp_path):
    mdata.write(tmp_path / "data.h5mu")
    backed = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
    index = np.arange(32)
    ours = measured(Mosaic.from_mudata(mdata, batch_key="batch"), index)
    theirs = measured(Mosaic.from_mudata(backed, batch_key="batch"), index)
    for name in mdata.mod:
        assert_array_equal(ours.observed[name].dense_counts(), theirs.observed[name].dense_counts())
        assert_array_equal(ours.observed[name].codes, theirs.observed[name].codes)
    view = mdata[mdata.obs_names[20:10:-1]]
    mosaic = Mosaic.from_mudata(view)
    expected = mdata["rna"][view["rna"].obs_names].X.toarray()
    present = mosaic.modalities["rna"].present
    assert_array_equal(mosaic.modalities["rna"].tensor(np.flatnonzero(present)).to_dense(), expected)


def test_sparse_entries_in_any_order_and_in_pieces():
    scattered = sparse.csr_matrix((np.array([1.0, 2.0, 3.0, 4.0]), [9, 1, 9, 0], [0, 3, 4]), shape=(2, 20))
    adata = anndata.AnnData(scattered, var=pd.DataFrame(index=[f"f{i}" for i in range(20)]))
    with Unchanged({"rna": adata}):
        counts = measured(Mosaic.from_anndata({"rna": adata}), np.array([1, 0])).observed["rna"].counts
    assert counts.is_sparse
    assert counts.is_coalesced()
    assert torch.equal(counts.indices(), torch.tensor([[0, 1, 1], [0, 1, 9]]))
    assert_array_equal(counts.values(), [4, 2, 4])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_epoch_goes_through_every_measurement_once(data, tmp_path_factory):
    n_cells, n_modalities = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    pattern = st.integers(1, 2**n_modalities - 1)
    presence = np.array(
        [
            [p >> m & 1 for m in range(n_modalities)]
            for p in data.draw(st.lists(pattern, min_size=n_cells, max_size=n_cells))
        ]
    )
    cells = np.array(names(0, n_cells))
    adatas = {}
    for m in range(n_modalities):
        mine = data.draw(st.permutations(cells[presence[:, m] == 1].tolist()))
        if mine:
            adatas[f"m{m}"] = make(
                mine,
                data.draw(st.integers(1, 6)),
                m,
                density=data.draw(st.sampled_from([0.1, 0.5, 1.0])),
                storage=data.draw(st.sampled_from(STORAGES)),
                folder=tmp_path_factory.getbasetemp(),
            )
    mosaic = Mosaic.from_anndata(adatas, dict.fromkeys(adatas, "nb"), match_cells=True)
    seen = {name: [] for name in adatas}
    for batch in loader(mosaic, np.arange(n_cells), data.draw(st.integers(1, 13)), data.draw(st.none() | st.just(7))):
        assert all(len(view.rows) for view in batch.observed.values())
        for name, view in batch.observed.items():
            rows = pd.DataFrame(view.dense_counts().numpy(), mosaic.obs_names[batch.index[view.rows].numpy()])
            seen[name].append(rows)
    for name, adata in adatas.items():
        table = pd.concat(seen[name])
        assert len(table) == adata.n_obs
        assert_array_equal(table.loc[adata.obs_names], dense(adata.X))


# Schema


@pytest.fixture
def registered(mdata):
    return Mosaic.from_mudata(
        mdata,
        batch_key="batch",
        categorical_covariates=("sex",),
        continuous_covariates=("age",),
        label_key="celltype",
    )


def test_schema_survives_json(registered):
    text = json.dumps(registered.schema.to_json())
    assert Schema.from_json(json.loads(text)) == registered.schema


def test_the_same_data_with_the_schema(mdata, registered):
    again = Mosaic.from_mudata(mdata, schema=Schema.from_json(registered.schema.to_json()))
    assert again.schema == registered.schema
    for name, modality in registered.modalities.items():
        for part in ("rows", "codes", "continuous", "library", "labels"):
            assert_array_equal(getattr(again.modalities[name], part), getattr(modality, part))


@pytest.mark.parametrize("storage", STORAGES)
def test_features_are_put_in_the_order_of_the_schema(storage, tmp_path):
    schema = Mosaic.from_anndata({"rna": make(names(0, 5), 6)}).schema
    shuffled = make(names(0, 5), 6, density=0.5, storage=storage, folder=tmp_path)
    order = np.array([3, 0, 5, 1, 2, 4])
    shuffled.var_names = shuffled.var_names[order]
    mosaic = Mosaic.from_anndata({"rna": shuffled}, schema=schema)
    assert mosaic.schema == schema
    expected = pd.DataFrame(dense(shuffled.X), columns=shuffled.var_names)[[f"f{i}" for i in range(6)]]
    assert_array_equal(measured(mosaic, np.arange(5)).observed["rna"].dense_counts(), expected)


def test_query_without_one_of_the_modalities(mdata, registered):
    query = mdata["rna"].copy()
    query.obs_names = [f"query{i}" for i in range(24)]
    query.obs["batch"] = "b"
    with Unchanged({"rna": query}):
        mosaic = Mosaic.from_anndata({"rna": query}, schema=registered.schema)
    assert mosaic.schema == registered.schema
    assert list(mosaic.modalities) == ["rna", "adt"]
    adt = mosaic.modalities["adt"]
    assert not adt.present.any()
    assert_array_equal(adt.rows, -1)
    assert np.isnan(adt.library).all()
    # The columns are those of the RNA: batch b and both sexes are known to the antibodies, labels too.
    assert_array_equal(adt.codes[:, 0], registered.schema["adt"].categories["batch"].index("b"))
    assert_array_equal(adt.codes[:, 1], mosaic.modalities["rna"].codes[:, 1])
    assert_array_equal(adt.labels, mosaic.modalities["rna"].labels)
    mean, sd = registered.schema["adt"].continuous["age"]
    assert_allclose(adt.continuous[:, 0], (query.obs["age"] - mean) / sd, rtol=1e-5)
    assert set(mosaic.patterns) == {"rna"}

    index = np.array([4, 2, 9])
    assert list(measured(mosaic, index).observed) == ["rna"]
    predicted = to_predict(mosaic, index, ("adt",))
    assert list(predicted.observed) == ["rna"]
    assert predicted.decoded["adt"].library.isnan().all()
    assert len(split(mosaic, 0.25).validation) == 6


def test_absent_modality_of_a_mudata_and_categories_it_never_saw(mdata, registered):
    query = MuData({"rna": mdata["rna"].copy()})
    del query["rna"].obs["batch"]
    query.obs["batch"] = np.resize(["a", "b"], 24)
    mosaic = Mosaic.from_mudata(query, schema=registered.schema)
    assert mosaic.schema == registered.schema
    assert mosaic.modalities["adt"].codes[:4, 0].tolist() == [-1, 0, -1, 0]
    assert_allclose(to_predict(mosaic, np.arange(2), ("adt",)).decoded["adt"].one_hot(), [[0.5, 0.5], [1, 0]])
    # A column that only the absent modality's schema asks for.
    schema = Mosaic.from_mudata(
        mdata, {"rna": "nb", "adt": ModalitySpec("nb", None, "batch", ("sex",), ("age",), "celltype")}
    ).schema
    bare = MuData({"rna": make(names(0, 3), 12, prefix="gene", celltype="not a label of the model")})
    adt = Mosaic.from_mudata(bare, schema=schema).modalities["adt"]
    assert_array_equal(adt.codes, -1)
    assert_array_equal(adt.continuous, 0)
    assert_array_equal(adt.labels, -1)


def test_data_that_do_not_fit_the_schema(mdata, registered):
    def fails(expected, change, call=Mosaic.from_mudata):
        query = MuData({name: adata.copy() for name, adata in mdata.mod.items()})
        change(query)
        with Unchanged(query):
            refusal(expected, call, query, schema=registered.schema)

    def column(key, value):
        def change(query):
            query["adt"].obs[key] = query["adt"].obs[key].astype(object)
            query["adt"].obs.loc["cell30", key] = value

        return change

    fails(["'adt'", "'cell30'", "batch", "'d'", "'b', 'c'"], column("batch", "d"))
    fails(["'adt'", "'cell30'", "sex", "'x'"], column("sex", "x"))
    fails(["'adt'", "'cell30'", "label", "'DC'", "'unknown'"], column("celltype", "DC"))

    def genes(wanted):
        def change(query):
            extra = query["rna"][:, :1].copy()
            extra.var_names = ["novel"]
            joined = anndata.concat([query["rna"], extra], axis=1, merge="first")
            query.mod["rna"] = joined[:, wanted].copy()

        return change

    fails(["'rna'", "none of the 12 features of the model", "'gene0'", "'novel'"], genes(["novel"]))

    adatas = {"rna": mdata["rna"], "prot": mdata["adt"]}
    refusal(["'adt'", "'prot'"], Mosaic.from_anndata, adatas, schema=registered.schema)
    refusal(["schema"], Mosaic.from_mudata, mdata, schema=registered.schema, batch_key="batch")
    refusal(["schema"], Mosaic.from_mudata, mdata, {"rna": "nb"}, schema=registered.schema)
    extra = {**mdata.mod, "hto": make(names(0, 3))}
    assert Mosaic.from_anndata(extra, match_cells=True, schema=registered.schema).n_cells == 32


# Bad input

CELL = {"rna": "cell3", "adt": "cell31"}  # cells without the other modality


def value(number):
    def change(mdata):
        mdata["rna"].X[3, 2] = number

    return change


def dense_value(number):
    def change(mdata):
        mdata["rna"].X = mdata["rna"].X.toarray()
        mdata["rna"].X[3, 2] = number

    return change


def column(key, number, modality="rna"):
    def change(mdata):
        mdata[modality].obs[key] = mdata[modality].obs[key].astype(object)
        mdata[modality].obs.loc[CELL[modality], key] = number

    return change


def empty_cell(mdata):
    counts = mdata["rna"].X.toarray()
    counts[3] = 0
    mdata["rna"].X = sparse.csr_matrix(counts)


def as_it_is(mdata):
    pass


BAD = {
    "no such layer": (as_it_is, {"layer": "raw"}, ["'rna'", "'raw'"]),
    "no values": (lambda m: setattr(m["rna"], "X", None), {}, ["'rna'", "X"]),
    "no batch column": (as_it_is, {"batch_key": "donor"}, ["'rna'", "'donor'", "'batch'"]),
    "no categorical column": (as_it_is, {"categorical_covariates": ["donor"]}, ["'rna'", "'donor'"]),
    "no continuous column": (as_it_is, {"continuous_covariates": ["donor"]}, ["'rna'", "'donor'"]),
    "no label column": (as_it_is, {"label_key": "donor"}, ["'rna'", "'donor'"]),
    "no size column": (as_it_is, {"size_factor_key": "donor"}, ["'rna'", "'donor'"]),
    **{
        f"{number} in {kind}": (change(number), {}, ["'rna'", "'cell3'", "'gene2'", str(number), problem])
        for number, problem in {
            -1.0: "negative",
            -0.5: "negative",
            1.5: "not a whole number",
            np.nan: "not a finite number",
            np.inf: "not a finite number",
        }.items()
        for kind, change in {"csr": value, "dense": dense_value}.items()
    },
    "empty cell": (empty_cell, {}, ["'rna'", "'cell3'", "all values are 0 in 1 of 24 cells"]),
    **{
        f"size {size}": (column("size", size), {"size_factor_key": "size"}, ["'rna'", "'cell3'", "'size'"])
        for size in (0.0, -1.0, np.nan, np.inf, "large")
    },
    "no batch": (column("batch", None), {"batch_key": "batch"}, ["'rna'", "'cell3'", "'batch'"]),
    "no sex": (column("sex", np.nan, "adt"), {"categorical_covariates": ("sex",)}, ["'adt'", "'cell31'", "'sex'"]),
    **{
        f"age {age}": (column("age", age), {"continuous_covariates": ("age",)}, ["'rna'", "'cell3'", "'age'", str(age)])
        for age in (np.nan, np.inf, "old")
    },
    "one string": (as_it_is, {"continuous_covariates": "age"}, ["'rna'", "continuous_covariates", "'age'"]),
    "string of categories": (as_it_is, {"categorical_covariates": "sex"}, ["'rna'", "categorical_covariates", "'sex'"]),
    "batch twice": (
        as_it_is,
        {"batch_key": "sex", "categorical_covariates": ("sex",)},
        ["'rna'", "'sex'", "more than once"],
    ),
    "unknown likelihood": (as_it_is, {"modalities": {"rna": "gaussian"}}, ["'rna'", "'gaussian'", "nb_mixture"]),
    "unknown modality": (as_it_is, {"modalities": {"rna": "nb", "atac": "bernoulli"}}, ["'atac'", "'rna', 'adt'"]),
    "no modality": (as_it_is, {"modalities": {}}, ["no modality"]),
    "field of no modality": (
        as_it_is,
        {"modalities": {"rna": ModalitySpec("nb")}, "batch_key": "batch"},
        ["'batch_key'", "ModalitySpec"],
    ),
}


@pytest.mark.parametrize(("change", "arguments", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_left_alone(mdata, change, arguments, expected):
    change(mdata)
    with Unchanged(mdata):
        refusal(expected, Mosaic.from_mudata, mdata, **arguments)


@pytest.mark.parametrize("storage", BACKED)
def test_bad_values_in_a_file(storage, tmp_path):
    counts = dense(make(names(0, 5)).X)
    counts[3, 2] = 0.5
    adata = anndata.AnnData(
        BACKED[storage](counts), pd.DataFrame(index=names(0, 5)), pd.DataFrame(index=["x", "y", "z"])
    )
    adata.write_h5ad(tmp_path / "data.h5ad")
    backed = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    refusal(["'rna'", "'c3'", "'z'", "0.5"], Mosaic.from_anndata, {"rna": backed})


def test_names_that_occur_twice():
    with pytest.warns(UserWarning, match="not unique"):
        adata = make(["c0", "c1", "c1"])
    refusal(["'rna'", "'c1'", "more than once"], Mosaic.from_anndata, {"rna": adata}, match_cells=True)
    refusal(["'rna'", "c1'", "more than once"], Mosaic.from_anndata, {"rna": adata})
    adata = make(names(0, 3))
    adata.var_names = ["f0", "f2", "f2"]
    refusal(["'rna'", "'f2'", "more than once"], Mosaic.from_anndata, {"rna": adata})


def test_nothing_measured():
    full = make(names(0, 3))
    refusal(["'adt'", "no cell"], Mosaic.from_anndata, {"rna": full, "adt": make([])}, match_cells=True)
    refusal(["'adt'", "no feature"], Mosaic.from_anndata, {"rna": full, "adt": full[:, :0].copy()}, match_cells=True)
    refusal(["no modality"], Mosaic.from_anndata, {})
    full.obsm["protein"] = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 1.0]])
    refusal(["'c1'", "no modality"], Mosaic.from_obsm, full, {"adt": "protein"})
    full.obsm["protein"] = np.full((3, 2), np.nan)
    refusal(["'adt'", "no cell"], Mosaic.from_obsm, full, {"rna": None, "adt": "protein"})


def test_mudata_that_was_not_updated(mdata):
    mdata["adt"]._inplace_subset_obs(np.arange(24) < 20)
    refusal(["'cell28'", "no modality"], Mosaic.from_mudata, mdata)
    mdata.update()
    assert Mosaic.from_mudata(mdata).n_cells == 28
    mdata["adt"].obs_names = [f"other{i}" for i in range(20)]
    refusal(["'adt'", "'other0'", "update()"], Mosaic.from_mudata, mdata)


def test_blocks_that_cannot_be_read():
    adata = make(names(0, 3))
    adata.obsm["protein"] = pd.DataFrame({"CD3": ["high", "low", "low"]}, index=adata.obs_names)
    refusal(["'adt'", "object", "numbers"], Mosaic.from_obsm, adata, {"adt": "protein"})
    refusal(["'adt'", "'prot'", "'protein'"], Mosaic.from_obsm, adata, {"adt": "prot"})
    spec = {"adt": ModalitySpec("nb", layer="raw")}
    refusal(["'adt'", "'raw'", "obsm"], Mosaic.from_obsm, adata, {"adt": "protein"}, spec)


def test_names_that_do_not_say_the_likelihood():
    refusal(["'metabolome'", "likelihood"], Mosaic.from_anndata, {"metabolome": make(names(0, 3))})
    with pytest.raises(TypeError, match="batchkey"):
        Mosaic.from_anndata({"rna": make(names(0, 3))}, batchkey="batch")


def test_finding_cells(registered):
    n = registered.n_cells
    assert_array_equal(registered.find(None), np.arange(n))
    assert registered.find(["cell5", "cell0"]).tolist() == [5, 0]
    assert registered.find(pd.Index(["cell5"])).tolist() == registered.find("cell5").tolist() == [5]
    assert registered.find([3, 3]).tolist() == [3, 3]
    assert registered.find(np.arange(n) > 29).tolist() == [30, 31]
    refusal(["'nobody'"], registered.find, ["cell5", "nobody"])
    refusal(["31", "32"], registered.find, [0, n])
    refusal(["-1"], registered.find, [-1])
    refusal(["32 cells", "found 5"], registered.find, np.ones(5, bool))
    refusal(["cells must be", "found none"], registered.find, [])
    refusal(["cells must be", "found none"], registered.find, np.zeros(n, bool))


# Splits and minibatches


@pytest.fixture
def rare():
    """500 cells with RNA, 5 of them with antibodies, and one cell with antibodies alone in its batch."""
    adatas = {
        "rna": make(names(0, 500), batch=["a"] * 495 + ["b"] * 5),
        "adt": make([*names(495, 500), "lone"], batch=["b"] * 5 + ["c"]),
    }
    return Mosaic.from_anndata(adatas, match_cells=True, batch_key="batch")


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.0), (0.2, 0.2), (0.0, 0.5), (0.0, 0.0), (0.45, 0.45)])
def test_split_is_disjoint_complete_and_stratified(rare, validation, test):
    parts = split(rare, validation, test, seed=3)
    together = np.concatenate([parts.train, parts.validation, parts.test])
    assert_array_equal(np.sort(together), np.arange(rare.n_cells))
    for pattern, n in {"rna": 495, "rna+adt": 5, "adt": 1}.items():
        mine = [(rare.patterns.iloc[part] == pattern).sum() for part in (parts.train, parts.validation, parts.test)]
        assert mine[1:] == [int(validation * n), int(test * n)]
        assert mine[0] == n - sum(mine[1:]) > 0


def test_split_is_seeded(rare):
    one, again, other = (split(rare, 0.2, 0.2, seed=seed) for seed in (0, 0, 1))
    assert_array_equal(one.validation, again.validation)
    assert_array_equal(one.test, again.test)
    assert not np.array_equal(one.validation, other.validation)
    refusal(["0.5", "0.5"], split, rare, 0.5, 0.5)
    for shares in [(-0.1, 0.0), (0.0, 1.0)]:
        refusal(["share from 0 to below 1"], split, rare, *shares)


@pytest.mark.parametrize(("n", "size"), [(501, 256), (257, 256), (256, 256), (10, 3), (1, 256), (7, 1)])
def test_minibatches_are_of_nearly_one_size(rare, n, size):
    cells = np.arange(501 - n, 501)
    batches = list(loader(rare, cells, size, seed=0))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == len(loader(rare, cells, size)) == int(np.ceil(n / size))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size
    assert_array_equal(np.sort(np.concatenate([batch.index for batch in batches])), cells)
    for batch in batches:
        assert batch.n_cells == n
        assert batch.scale == n / len(batch)
        assert batch.decoded is batch.observed or batch.decoded == batch.observed
        assert set(batch.observed) == {m for p in rare.patterns.iloc[batch.index] for m in p.split("+")}


def test_shuffling_is_seeded(rare):
    def orders(seed):
        minibatches = loader(rare, np.arange(100), 30, seed)
        return [np.concatenate([batch.index for batch in minibatches]) for _ in range(2)]

    first, second = orders(1)
    assert_array_equal(first, orders(1)[0])
    assert_array_equal(second, orders(1)[1])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, orders(2)[0])
    assert_array_equal(orders(None), [np.arange(100)] * 2)
    minibatches = loader(rare, np.arange(100), 30, 1)
    iter(minibatches.sampler)  # as a loader with workers does
    assert_array_equal(np.concatenate([batch.index for batch in minibatches]), first)


def test_loader_refuses_nothing(rare):
    refusal(["at least one cell"], loader, rare, np.arange(0), 10)
    refusal(["0"], loader, rare, np.arange(5), 0)


def test_measured_minibatch(registered, mdata):
    index = np.array([30, 2, 12])  # antibodies, RNA, both
    batch = measured(registered, index, 7)
    assert (len(batch), batch.n_cells, batch.scale) == (3, 7, 7 / 3)
    assert measured(registered, index).n_cells == 32
    assert batch.observed["rna"].rows.tolist() == [1, 2]
    assert batch.observed["adt"].rows.tolist() == [0, 2]
    adt = mdata["adt"].obs.loc[["cell30", "cell12"]]
    view = batch.observed["adt"]
    assert view.n_categories == (2, 2)
    assert_array_equal(view.one_hot(0), adt["batch"].to_numpy()[:, None] == np.array(["b", "c"]))
    assert_array_equal(view.one_hot(1), adt["sex"].to_numpy()[:, None] == np.array(["f", "m"]))
    assert_array_equal(view.design(), torch.cat([view.one_hot(0), view.one_hot(1), view.continuous], 1))
    assert view.library.shape == view.continuous.shape == (2, 1)
    assert list(measured(registered, np.array([0])).observed) == ["rna"]
    moved = batch.to("cpu")
    assert moved.observed["adt"] is moved.decoded["adt"]
    assert_array_equal(moved.observed["adt"].dense_counts(), view.dense_counts())


def test_prediction_for_every_cell(registered):
    index = np.array([30, 2, 3, 12])  # batches c, a, a, b; no antibodies were measured in a
    batch = to_predict(registered, index, ("adt",))
    assert (len(batch), batch.scale) == (4, 1)
    assert set(batch.observed) == {"rna", "adt"}
    view = batch.decoded["adt"]
    assert view.rows.tolist() == [0, 1, 2, 3]
    assert_array_equal(view.one_hot(), [[0, 1], [0.5, 0.5], [0.5, 0.5], [1, 0]])
    own = registered.modalities["adt"].library[index]
    assert np.isnan(own).tolist() == [False, True, True, False]
    assert_allclose(view.library[:, 0], own)
    with pytest.raises(ValueError, match="no measurements"):
        view.dense_counts()


def test_prediction_for_another_batch_size_and_source(registered):
    index = np.array([30, 2, 3, 12])
    batch = to_predict(registered, index, ("adt", "rna"), encode=["rna"], batch="b", library=100.0)
    assert list(batch.observed) == ["rna"]
    assert batch.observed["rna"].rows.tolist() == [1, 2, 3]
    assert_array_equal(batch.decoded["adt"].one_hot(), [[1, 0]] * 4)
    assert_array_equal(batch.decoded["rna"].one_hot(), [[0, 1]] * 4)
    assert_array_equal(
        batch.decoded["adt"].one_hot(1), to_predict(registered, index, ("adt",)).decoded["adt"].one_hot(1)
    )
    assert_array_equal(batch.decoded["rna"].library, [[100]] * 4)
    before = copy.deepcopy(registered.modalities["adt"].codes)
    to_predict(registered, np.arange(32), ("adt",), batch="c")
    assert_array_equal(registered.modalities["adt"].codes, before)
    each = to_predict(registered, index, ("adt",), library=np.arange(1.0, 5.0)).decoded["adt"]
    assert_array_equal(each.library, [[1], [2], [3], [4]])
    assert to_predict(registered, np.array([2]), ("adt",), encode=["adt"]).observed == {}
    refusal(["'adt'", "'a'", "b, c"], to_predict, registered, index, ("adt",), batch="a")
    refusal(["'atac'", "'rna', 'adt'"], to_predict, registered, index, ("atac",))
    refusal(["'atac'", "'rna', 'adt'"], to_predict, registered, index, ("adt",), encode=["atac"])


def test_start_values_come_from_few_cells(rare):
    assert_array_equal(rare.modalities["adt"].sample(), np.flatnonzero(rare.presence["adt"]))
    wide = Mosaic.from_anndata({"rna": anndata.AnnData(sparse.eye(600, 100_000, format="csr"))})
    sample = wide.modalities["rna"].sample(seed=1)
    assert len(sample) == len(np.unique(sample)) == 500
    assert_array_equal(sample, wide.modalities["rna"].sample(seed=1))
    assert not np.array_equal(sample, wide.modalities["rna"].sample(seed=2))


# Hiding and unpairing


def test_hidden_measurements_are_the_truth(mdata):
    mdata.obs["site"] = np.arange(32)
    with Unchanged(mdata):
        mosaic, truth = hide(mdata, {"adt": 5, "rna": 3}, seed=1)
    assert {name: adata.n_obs for name, adata in truth.items()} == {"adt": 5, "rna": 3}
    assert not set(truth["adt"].obs_names) & set(truth["rna"].obs_names)
    complete = set(mdata["rna"].obs_names) & set(mdata["adt"].obs_names)
    for name, adata in mdata.mod.items():
        hidden = truth[name].obs_names
        assert set(hidden) <= complete
        assert_array_equal(truth[name].X.toarray(), adata[hidden].X.toarray())
        assert set(mosaic[name].obs_names) == set(adata.obs_names) - set(hidden)
        assert_array_equal(mosaic[name].X.toarray(), adata[mosaic[name].obs_names].X.toarray())
    assert set(mosaic.obs_names) == set(mdata.obs_names)
    assert_array_equal(mosaic.obs["site"], mdata.obs["site"][mosaic.obs_names])
    again, other = (hide(mdata, {"adt": 5, "rna": 3}, seed=seed)[1]["adt"].obs_names for seed in (1, 2))
    assert_array_equal(again, truth["adt"].obs_names)
    assert set(other) != set(again)
    whole, nothing = hide(mdata, {})
    assert nothing == {}
    assert whole.shape == mdata.shape


def test_hiding_refuses(mdata):
    with Unchanged(mdata):
        refusal(["'atac'", "'rna', 'adt'"], hide, mdata, {"atac": 1})
        refusal(["17", "16"], hide, mdata, {"adt": 9, "rna": 8})
        refusal(["'adt'", "-1"], hide, mdata, {"adt": -1})


@pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_unpaired_cells_stand_once_for_each_modality(mdata, share, n):
    mdata.obs["site"] = np.arange(32)
    with Unchanged(mdata):
        apart = unpair(mdata, share, seed=1)
    assert apart.n_obs == 32 + n
    copies = [name for name in apart.obs_names if ":" in name]
    assert len(copies) == 2 * n
    for name, adata in mdata.mod.items():
        origin = apart[name].obs_names.str.replace(":.*", "", regex=True)
        assert_array_equal(origin, adata.obs_names)
        assert_array_equal(apart[name].X.toarray(), adata.X.toarray())
        assert sum(cell.endswith(f":{name}") for cell in apart[name].obs_names) == n
    origin = apart.obs_names.str.replace(":.*", "", regex=True)
    assert_array_equal(apart.obs["site"], mdata.obs["site"][origin])
    assert Mosaic.from_mudata(apart).patterns.value_counts().get("rna+adt", 0) == 16 - n
    assert_array_equal(unpair(mdata, share, seed=1).obs_names, apart.obs_names)


def test_unpairing_refuses_shares_beyond_one(mdata):
    for share in (-0.1, 1.1):
        refusal([str(share)], unpair, mdata, share)


# Real data


def test_packaged_mosaic():
    mdata = pbmc_mosaic()
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch", label_key="celltype")
    assert {name: adata.shape for name, adata in mdata.mod.items()} == {"rna": (1200, 500), "adt": (1200, 224)}
    assert mosaic.patterns.value_counts().to_dict() == {"rna": 400, "adt": 400, "rna+adt": 800}
    assert mosaic.labels().nunique() == 8
    for adata in mdata.mod.values():
        assert adata.obs["batch"].value_counts().tolist() == [400] * 3
    links = protein_gene_links()
    assert list(links.columns) == ["protein", "gene"]
    assert len(links) == 240
    assert links["gene"].isin(mdata["rna"].var_names).sum() == 74
    assert links["protein"].isin(mdata["adt"].var_names).all()


def test_sparse_chromatin(shared_data):
    mdata = mudata.read_h5mu(shared_data / "snare_cortex.h5mu")
    mosaic = Mosaic.from_mudata(unpair(mdata, 0.75), batch_key="batch", label_key="cell_type")
    assert mosaic.patterns.value_counts().to_dict() == {"rna": 7732, "atac": 7732, "rna+atac": 2577}
    assert not mosaic.modalities["atac"].dense
    index = np.arange(0, mosaic.n_cells, 50)
    view = measured(mosaic, index).observed["atac"]
    cells = mosaic.obs_names[index[view.rows]].str.removesuffix(":atac")
    assert view.counts.is_sparse
    assert_array_equal(view.dense_counts(), mdata["atac"][cells].X.toarray())


@pytest.mark.parametrize(
    ("file", "n_cells", "likelihood"), [("pbmc_stim_adt", 8689, "nb_mixture"), ("kang_ifnb_small", 600, "nb")]
)
def test_single_modalities(shared_data, file, n_cells, likelihood):
    adata = anndata.read_h5ad(shared_data / f"{file}.h5ad")
    mosaic = Mosaic.from_anndata({"x": adata}, {"x": likelihood}, categorical_covariates=("condition",))
    assert mosaic.n_cells == n_cells
    assert mosaic.modalities["x"].n_categories == (2,)


def test_a_column_is_found_for_every_cell_even_when_added_later():
    rna = anndata.AnnData(np.ones((3, 2), np.float32), obs=pd.DataFrame({"kind": ["a", "b", "a"]}, index=list("xyz")))
    adt = anndata.AnnData(np.ones((2, 2), np.float32), obs=pd.DataFrame({"kind": ["a", "c"]}, index=list("zw")))
    mosaic = Mosaic.from_anndata({"rna": rna, "adt": adt}, match_cells=True)
    assert mosaic.column("kind").tolist() == ["a", "b", "a", "c"]
    rna.obs["later"] = [1, 2, 3]
    assert mosaic.column("later").tolist()[:3] == [1, 2, 3]
    assert mosaic.column("later").isna().tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="no obs has a column 'nothing'; there are 'kind', 'later'"):
        mosaic.column("nothing")
