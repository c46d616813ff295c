"""In which forms users pass arguments of registration and of questions: taken as meant, or refused in one sentence."""

import re
import traceback

import anndata
import numpy as np
import pandas as pd
import pytest
from small import make, matched, names

from pyromosaic import DiagVI, ModalitySpec, Mosaic, MultiVI, simulate
from pyromosaic.likelihoods import NB
from pyromosaic.tasks import contrasts

COLUMN = pd.Series(np.resize(["a", "b"], 60), [f"cell{i}" for i in range(60)])
#: No name of a column.
NO_NAMES = [["batch"], ("batch",), COLUMN, COLUMN.to_numpy(), pd.Index(["batch"]), {"batch"}, {"rna": "batch"}, ""]
NO_NAMES += [1.5, True, object(), slice(3), [None], [["batch"]], pd.DataFrame({"b": COLUMN})]


@pytest.fixture(scope="module")
def mdata():
    return simulate(60, {"rna": 50, "adt": 8}, patterns=["rna+adt"], n_batches=2, treated=0.5)[0]


@pytest.fixture(scope="module")
def model(mdata):
    return MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), n_latent=3, n_hidden=8)


def refused(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)
    assert "raise" in (traceback.extract_tb(caught.tb)[-1].line or "")  # by our own hand


# Registration


@pytest.mark.parametrize("key", ["batch_key", "label_key", "size_factor_key"])
@pytest.mark.parametrize("value", NO_NAMES, ids=lambda value: type(value).__name__)
def test_keys_are_names_of_one_column(mdata, key, value):
    refused(lambda: Mosaic.from_mudata(mdata, **{key: value}), f"'rna': {key} must be the name of a column of obs or N")
    refused(lambda: ModalitySpec("nb", **{key: value}), f"^{key} must be the name of a column of obs or None; found ")


@pytest.mark.parametrize("key", ["categorical_covariates", "continuous_covariates"])
def test_covariates_are_lists_of_names(key):
    adata = make(names(6), one=np.arange(6.0), two=np.arange(6.0)[::-1])
    expected = Mosaic.from_anndata({"rna": adata}, **{key: ["one", "two"]}).schema
    for columns in (("one", "two"), np.array(["one", "two"]), pd.Index(["one", "two"])):
        assert Mosaic.from_anndata({"rna": adata}, **{key: columns}).schema == expected
    for columns in ("one", 3, None, {"one"}, {"one": 1}, adata.obs["one"], adata.obs[["one"]], [["one"]], [None]):
        refused(
            lambda columns=columns: Mosaic.from_anndata({"rna": adata}, **{key: columns}),
            f"{key} must be a list with values each the name of a column of obs; found",
        )


def test_numbers_name_columns():
    adata = make(names(6))
    adata.obs[0] = np.resize(["a", "b"], 6)
    adata.obs["1"] = np.resize(["u", "v", "w"], 6)
    expected = Mosaic.from_anndata({"rna": adata}, batch_key="0", label_key="1")
    for zero, one in ((0, 1), (np.int64(0), np.int8(1)), (np.str_("0"), np.str_("1"))):
        mosaic = Mosaic.from_anndata({"rna": adata}, batch_key=zero, label_key=one, unlabelled=-1)
        assert mosaic.modalities["rna"].schema.categories == {"0": ("a", "b")}
        assert mosaic.labels().equals(expected.labels())
        assert mosaic.column(zero).equals(expected.column("0")) and mosaic.has_column(zero)
        assert mosaic.with_cohorts(zero, background="a").groups.tolist() == [0, 1] * 3
        assert [c.group1 for c in contrasts(mosaic, one)] == ["u", "v", "w"]
    refused(lambda: Mosaic.from_anndata({"rna": adata}, batch_key=3), "no obs has a column '3'; there are '0', '1'")
    refused(lambda: expected.column(3), "no obs has a column '3'; there are '0', '1'")


def test_a_column_that_is_there_twice_is_refused():
    adata = make(names(6), b=["x", "y"] * 3)
    adata.obs = pd.concat([adata.obs, adata.obs[::-1].set_axis(adata.obs_names)], axis=1)
    refused(lambda: Mosaic.from_anndata({"rna": adata}, batch_key="b"), "modality 'rna' has the column 'b' more than")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": "b"}, "no argument 'batch'; accepted for all modalities: .*'batch_key'.*'size_factor_key'"),
        ({"labelkey": "b"}, "no argument 'labelkey'; .*'label_key'"),
        ({"labels_key": "b"}, "registration takes no 'labels_key'; use label_key"),
        ({"batch_key": "b", "covariates": ["b"]}, "no argument 'covariates'; .*'categorical_covariates'"),
        ({"likelihood": "nb"}, "no argument 'likelihood'"),
        ({"layer": ["counts"]}, "layer must be text or None; found"),
        ({"layer": 0}, "layer must be text or None; found 0"),
        ({"exposure_layer": 0}, "exposure_layer must be text or None; found 0"),
        ({"unlabelled": None}, "unlabelled must be text or a whole number; found None"),
        ({"unlabelled": ["unknown"]}, "unlabelled must be text or a whole number; found"),
        ({"allow_non_integer": "yes"}, "allow_non_integer must be True or False; found 'yes'"),
        ({"dispersion": None}, "dispersion must be 'gene', 'gene-batch' or 'gene-label'; found None"),
        ({"empty_cells": True}, "empty_cells must be 'refuse', 'holes' or 'keep'; found True"),
        ({"background": ["latent"]}, "background must be 'marginal' or 'latent'; found"),
        ({"match_cells": "yes"}, "match_cells must be True or False; found 'yes'"),
        ({"new_batches": ["add"]}, "new_batches must be 'refuse', 'average' or 'add'; found"),
        ({"schema": {}}, "schema must be a Schema or None; found {}"),
    ],
)
def test_settings_that_are_refused(given, message):
    refused(lambda: Mosaic.from_anndata({"rna": make(names(6), b=["x", "y"] * 3)}, **given), message)


MODALITIES = [
    ["rna"],
    "rna",
    ("rna", "adt"),
    {"rna"},
    {"rna": 3},
    {"rna": None},
    {"rna": ["nb"]},
    3,
    ModalitySpec("nb"),
]
MODALITIES += [pd.Series({"rna": "nb"}), {"rna": {"likelihood": "nb"}}, pd.DataFrame({"rna": ["nb"]})]


@pytest.mark.parametrize("modalities", MODALITIES, ids=lambda value: type(value).__name__)
def test_modalities_are_a_dictionary(mdata, modalities):
    message = "modalities must be a dictionary with values each a ModalitySpec, text or a class or None; found "
    adata = mdata["rna"]
    refused(lambda: Mosaic.from_mudata(mdata, modalities), message)
    refused(lambda: Mosaic.from_anndata(dict(mdata.mod), modalities), message)
    refused(lambda: Mosaic.from_obsm(adata, {"rna": None}, modalities), message)


def test_likelihoods_by_name_by_class_and_by_specification(mdata):
    for likelihood in ("nb", NB, ModalitySpec("nb")):
        assert Mosaic.from_mudata(mdata, {"rna": likelihood}).n_cells == 60
    for likelihood in ("NB", ModalitySpec, int):
        refused(
            lambda given=likelihood: Mosaic.from_mudata(mdata, {"rna": given}), "'rna': there is no likelihood .*nb"
        )
    refused(lambda: Mosaic.from_mudata(mdata, {"prot": "nb"}), "there is no modality 'prot'; found 'rna', 'adt'")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["adt"], "blocks must be a dictionary with values each text or None"),
        ("adt", "blocks must be a dictionary with values each text or None"),
        (None, "blocks must be a dictionary with values each text or None"),
        (pd.Series({"rna": None}), "blocks must be a dictionary with values each text or None"),
        ({"adt": ["adt"]}, "blocks must be a dictionary with values each text or None"),
        ({"adt": 3}, "blocks must be a dictionary with values each text or None"),
        ({0: "adt"}, "the name of a modality must be text; found 0"),
        ({"adt": "protein"}, "'adt': obsm has no key 'protein'; it has 'adt'"),
        ({}, "there is no modality to register"),
    ],
)
def test_blocks_are_a_dictionary(mdata, blocks, message):
    adata = mdata["rna"].copy()
    adata.obsm["adt"] = mdata["adt"].X
    refused(lambda: Mosaic.from_obsm(adata, blocks), message)


@pytest.mark.parametrize("data", [pd.DataFrame(np.ones((3, 3))), np.ones((3, 3)), "x.h5mu", None, 3, [], {}])
def test_data_of_another_type(mdata, data):
    refused(lambda: Mosaic.from_mudata(data), "mdata must be a MuData; found a .*from_anndata")
    if data != {} if isinstance(data, dict) else True:
        refused(lambda: Mosaic.from_anndata(data), "adatas must be a dictionary from modality to AnnData")
    refused(lambda: Mosaic.from_obsm(data, {"rna": None}), "adata must be an AnnData; found a ")
    refused(lambda: Mosaic.from_anndata({"rna": data}), "must be a dictionary .*; found a dictionary with other values")
    refused(lambda: Mosaic.from_anndata({0: mdata["rna"]}), "the name of a modality must be text; found 0")


@pytest.mark.parametrize("name", ["rna.counts", "type", "a b", "training", "modalities", "rna+adt"])
def test_any_name_of_a_modality_works(tmp_path, name):
    model = MultiVI(Mosaic.from_anndata({name: make(names(20))}, {name: "nb"}), n_latent=2, n_hidden=8)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "saved")
    again = MultiVI.load(tmp_path / "saved", model.mosaic)
    pd.testing.assert_frame_equal(again.get_latent_representation(), model.get_latent_representation())
    assert model.get_imputed_values(name, n_samples=2).mean.shape == (20, 3)


# Questions


@pytest.mark.parametrize("key", NO_NAMES, ids=lambda value: type(value).__name__)
def test_questions_take_the_name_of_a_column(model, key):
    mosaic = model.mosaic
    message = "must be the name of a column of obs( or None)?; found "
    for question in (mosaic.column, mosaic.has_column, mosaic.words, lambda k: contrasts(mosaic, k)):
        refused(lambda question=question: question(key), message)
    refused(lambda: mosaic.with_cohorts(key, background="a"), f"key {message}")
    refused(lambda: model.transfer_labels(key, "rna", to="adt"), f"key {message}")
    refused(lambda: model.differential(key, n_samples=10), f"groupby {message}")


NO_SELECTION = [
    slice(3),
    slice("cell0", "cell3"),
    (c for c in ["cell0"]),
    iter([1]),
    map(str, [1]),
    object(),
    {"cell0"},
]
NO_SELECTION += [{"cell0": 1}.keys(), frozenset({1})]


@pytest.mark.parametrize("cells", NO_SELECTION, ids=lambda value: type(value).__name__)
def test_what_is_no_selection(model, cells):
    message = "must be names(, numbers)? or a mask with at least one (cell|feature); found a "
    refused(lambda: model.mosaic.find(cells), f"^cells {message}")
    refused(lambda: model.get_latent_representation(cells), message)
    refused(lambda: model.get_imputed_values("adt", cells, n_samples=2), message)
    refused(lambda: model.get_normalized_expression("rna", features=cells), f"^features {message}")
    refused(lambda: model.differential(cells1=cells, n_samples=10), message)
    refused(
        lambda: model.mosaic.with_cohorts(background=cells, target=["cell9"]), f"cohort 'background': cells {message}"
    )


def test_ranges_and_what_where_gives(model):
    mask = np.arange(60) < 3
    for cells in (
        range(3),
        np.where(mask),
        np.nonzero(mask),
        np.flatnonzero(mask),
        (0, 1, 2),
        pd.RangeIndex(3).to_numpy(),
    ):
        assert model.mosaic.find(cells).tolist() == [0, 1, 2]


@pytest.mark.parametrize("encode", [0, 1, True, {"rna"}, ["rna", 0], pd.Series(["rna"]), slice(1)])
def test_what_to_infer_from_is_named(model, encode):
    refused(lambda: model.get_imputed_values("adt", encode=encode, n_samples=2), "encode must be text, a list with ")
    refused(lambda: model.posterior_predictive_sample("adt", encode=encode), "encode must be text, a list with values ")


@pytest.mark.parametrize("encode", ["rna", ("rna",), np.array(["rna"]), pd.Index(["rna"])])
def test_what_to_infer_from_in_other_forms(model, encode):
    expected = model.get_imputed_values("adt", encode=["rna"], n_samples=2).mean
    pd.testing.assert_frame_equal(model.get_imputed_values("adt", encode=encode, n_samples=2).mean, expected)


@pytest.mark.parametrize("batch", [["batch0"], {"batch0"}, pd.Series(["batch0"]), COLUMN, slice(1), []])
def test_an_imputed_value_has_one_batch(model, batch):
    refused(lambda: model.get_imputed_values("rna", batch=batch, n_samples=2), "batch must be one batch here; found a ")


def test_averages_over_batches_in_any_form(model):
    expected = model.get_normalized_expression("rna", batch=["batch0", "batch1"])
    for batch in (("batch0", "batch1"), np.array(["batch0", "batch1"]), pd.Series(["batch0", "batch1"], [5, 6])):
        pd.testing.assert_frame_equal(model.get_normalized_expression("rna", batch=batch), expected)
    refused(
        lambda: model.get_normalized_expression("rna", batch=slice(1)), "batch must be one batch here; found a slice"
    )


@pytest.mark.parametrize("value", [["control"], {"control"}, pd.Series(["control"]), COLUMN, pd.DataFrame(), slice(1)])
def test_a_group_is_one_value(model, value):
    refused(
        lambda: model.differential("condition", value, n_samples=10),
        "a group must be one value of the column; found a ",
    )
    refused(
        lambda: model.differential("condition", "control", value, n_samples=10),
        "a group must be one value of the column",
    )


def test_cohorts_in_any_form(model):
    mosaic = model.mosaic
    expected = mosaic.with_cohorts("condition", background="control", target="treated").groups
    for form in (list, tuple, set, np.array, pd.Index, pd.Series):
        found = mosaic.with_cohorts("condition", background=form(["control"]), target=form(["treated"])).groups
        np.testing.assert_array_equal(found, expected)
    for value in ({"control": 1}, pd.DataFrame({"control": [1]})):
        refused(lambda v=value: mosaic.with_cohorts("condition", background=v), "a cohort must be a value or values of")
    refused(
        lambda: mosaic.with_cohorts(background=None, target=["cell0"]),
        r"background must be cells \(names",
    )
    refused(
        lambda: mosaic.with_cohorts(background=["cell0"]),
        r"target must be cells \(names, .* or a dict",
    )


def test_data_that_were_not_registered(mdata, model):
    for data in (mdata, mdata["rna"], "x.h5mu", mdata.obs):
        refused(
            lambda d=data: model.get_latent_representation(data=d), "data must be a Mosaic .register the data: Mosaic"
        )
    refused(lambda: DiagVI(mdata), "Mosaic")


def test_anndata_of_the_same_cells_in_any_order(mdata):
    """The same cells in other orders of rows and features give the same mosaic, up to the order."""
    rna, adt = (adata.copy() for adata in mdata.mod.values())
    expected = matched(rna, adt, batch_key="batch", label_key="celltype")
    rng = np.random.default_rng(0)
    shuffled = [a[rng.permutation(60)][:, rng.permutation(a.n_vars)].copy() for a in (rna, adt)]
    assert all(isinstance(a, anndata.AnnData) for a in shuffled)
    found = matched(*shuffled, batch_key="batch", label_key="celltype")
    assert found.labels()[expected.obs_names].astype(str).equals(expected.labels().astype(str))
    for name, m in found.modalities.items():
        known = expected.modalities[name]
        cells, features = found.obs_names.get_indexer(expected.obs_names), pd.Index(m.schema.features)
        columns = features.get_indexer(pd.Index(known.schema.features))
        x, y = (pd.DataFrame(each.tensor(np.arange(60)).to_dense().numpy()).to_numpy() for each in (m, known))
        np.testing.assert_array_equal(x[np.ix_(cells, columns)], y)
        np.testing.assert_array_equal(m.codes[cells], known.codes)
