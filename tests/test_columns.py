"""What registration and questions take from users' columns: the right value, or one sentence."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mudata import MuData
from small import make, matched, names

from pyromosaic import ModalitySpec, Mosaic, MultiVI, pbmc_mosaic, simulate
from pyromosaic.data.tables import kept_apart, word, words
from pyromosaic.tasks import contrasts

# Words


@pytest.mark.parametrize("one", [1, 1.0, np.int8(1), np.float32(1), "1", " 1 ", "1.0", np.str_("1")])
def test_one_number_is_one_word(one):
    assert word(one) == "1"


@pytest.mark.parametrize(
    ("value", "expected"), [(1.5, "1.5"), (True, "True"), ("v1.0", "v1.0"), (-2.0, "-2"), ("", "")]
)
def test_other_words(value, expected):
    assert word(value) == expected


SPELLINGS = [
    lambda b: b.astype(int),
    lambda b: b.astype(float),
    lambda b: b.astype(str),
    lambda b: b.astype(float).astype(str),
    lambda b: " " + b.astype(str) + " ",
    lambda b: b.astype("Int64"),
    lambda b: b.astype(object),
    lambda b: b.astype("category"),
    lambda b: b.astype(float).astype("category"),
    lambda b: b.astype(float).where(np.arange(len(b)) != 1),  # one cell missing, which other tables know
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS), st.permutations(range(6)))
def test_one_column_is_one_vocabulary_in_any_type_and_order(spell, spell_other, order):
    batch = pd.Series([0, 0, 1, 1, 2, 2], names(6))
    rna, adt = make(names(6)), make(names(6), prefix="p")
    rna.obs["b"], adt.obs["b"] = spell(batch), batch
    if spell_other is not SPELLINGS[-1]:
        adt.obs["b"] = spell_other(batch)
    mosaic = matched(rna, adt[list(order)].copy(), batch_key="b")
    for modality in mosaic.modalities.values():
        assert modality.schema.categories["b"] == ("0", "1", "2")
        assert modality.codes[:, 0].tolist() == batch[mosaic.obs_names].tolist()


def test_words_of_several_kinds_are_not_mixed_up():
    assert words(pd.Series([True, 1, "1", 1.0, None], dtype=object)).tolist()[:4] == ["True", "1", "1", "1"]


def test_vocabularies_that_do_not_meet_are_said():
    apart = {"rna": make(names(4), b=[1, 1, 2, 2]), "adt": make(names(4, "d"), b=["d1", "d1", "d2", "d2"])}
    with pytest.warns(UserWarning, match="column 'b' has no value in common between modality 'rna' .*'1', '2'.*'d1'"):
        Mosaic.from_anndata(apart, batch_key="b")
    capitals = {"rna": make(names(4), b=["x", "x", "y", "y"]), "adt": make(names(4, "d"), b=["X", "X", "y", "y"])}
    with pytest.warns(UserWarning, match="column 'b' has the values 'X', 'x', which count as different"):
        Mosaic.from_anndata(capitals, batch_key="b")


@pytest.mark.parametrize(
    ("first", "other", "n_warnings"),
    [("01", "1", 1), ("s01", "S1", 1), ("A", "a", 1), ("0.05", "0.5", 0), ("10", "1", 0), ("100", "0100", 1)],
)
def test_spellings_of_a_batch_give_one_warning(first, other, n_warnings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mosaic = Mosaic.from_anndata({"rna": make(names(8), b=[first, other] * 4)}, batch_key="b")
        Mosaic.from_anndata({"rna": make(names(8), b=[first, other] * 4)}, schema=mosaic.schema)
    assert sum(w.category is UserWarning for w in caught) == n_warnings
    known = Mosaic.from_anndata({"rna": make(names(8), b=first)}, batch_key="b").schema
    for new_batches in ("add", "average"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Mosaic.from_anndata({"rna": make(names(8), b=other)}, schema=known, new_batches=new_batches)
        assert sum(w.category is UserWarning for w in caught) == n_warnings
    apart = {"rna": make(names(8), b=[first, "x"] * 4), "adt": make(names(8, "d"), b=[other, "x"] * 4)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Mosaic.from_anndata(apart, batch_key="b")
    assert sum(w.category is UserWarning for w in caught) == n_warnings


def test_several_spellings_give_one_warning():
    apart = {"rna": make(names(6), b=["01", "02", "03"] * 2), "adt": make(names(6, "d"), b=[1, 2, 3] * 2)}
    with pytest.warns(UserWarning, match="'01', '1', which count as different .2 further") as caught:
        Mosaic.from_anndata(apart, batch_key="b")
    assert len(caught) == 1


def test_bytes_are_text():
    values = np.resize([b"a", b"b"], 20)
    adatas = {"rna": make(names(20), b=values.astype(object)), "adt": make(names(20), b=values.astype(str))}
    mosaic = Mosaic.from_anndata(adatas, batch_key="b", match_cells=True)
    assert {m.schema.categories["b"] for m in mosaic.modalities.values()} == {("a", "b")}
    model = MultiVI(mosaic, n_latent=2, n_hidden=8)
    expected = model.get_normalized_expression("rna", batch="a")
    pd.testing.assert_frame_equal(model.get_normalized_expression("rna", batch=b"a"), expected)
    assert mosaic.with_cohorts("b", background=b"a").groups.tolist() == [0, 1] * 10
    assert words(pd.Series([b"\xff", "a", b"1.0", None], dtype=object)).tolist()[:3] == ["\\xff", "a", "1"]


@pytest.mark.parametrize("batch", [1, 1.0, "1", " 1.0"])
def test_batches_in_questions_are_words(batch):
    mosaic = Mosaic.from_anndata({"rna": make(names(20), b=[0, 1] * 10)}, batch_key="b")
    model = MultiVI(mosaic, n_latent=2, n_hidden=8)
    expected = model.get_normalized_expression("rna", batch="1")
    pd.testing.assert_frame_equal(model.get_normalized_expression("rna", batch=batch), expected)
    pd.testing.assert_frame_equal(model.get_normalized_expression("rna", batch=[batch]), expected)
    again = Mosaic.from_anndata({"rna": make(names(4), b=[batch] * 4)}, schema=mosaic.schema, new_batches="add")
    assert again.schema == mosaic.schema


@pytest.mark.parametrize(
    ("values", "background"), [([0, 1], 0), ([0.0, 1.0], 0), ([False, True], False), (["0", "1"], 0)]
)
def test_values_of_cohorts_are_words(values, background):
    mosaic = Mosaic.from_anndata({"rna": make(names(4), c=np.repeat(values, 2))}).with_cohorts(
        "c", background=background
    )
    assert mosaic.groups.tolist() == [0, 0, 1, 1]
    assert contrasts(mosaic, "c", background)[0].cells1.tolist() == [0, 1]


# The word for "not known"


@pytest.fixture(scope="module")
def partly_labelled():
    """Blood cells of which 70 % have no label, in a word."""
    mdata = pbmc_mosaic()
    truth = mdata.obs["celltype"].astype(str)
    rna = mdata["rna"]
    hidden = np.random.default_rng(0).random(1200) < 0.7
    return mdata, truth, truth[rna.obs_names].where(~hidden), rna


def labels_model(partly_labelled, told, spec):
    mdata, _, labels, rna = partly_labelled
    rna.obs["ct"] = labels.fillna(told) if told is not None else labels
    mosaic = Mosaic.from_mudata(mdata, {"rna": ModalitySpec("nb", **spec), "adt": "nb_mixture"})
    return MultiVI(mosaic, n_latent=5, n_hidden=16)


@pytest.mark.parametrize("told", ["unknown", "Unassigned", "-1"])
def test_the_word_for_not_known_is_known_to_every_question(partly_labelled, told):
    word_model = labels_model(partly_labelled, told, {"label_key": "ct", "unlabelled": told})
    missing_model = labels_model(partly_labelled, None, {"label_key": "ct"})
    # Tables are read when they are asked: the labels of the second model now have the word again.
    mosaic = word_model.mosaic
    missing = missing_model.transfer_labels("ct", "rna", to="adt")
    labels_model(partly_labelled, told, {"label_key": "ct", "unlabelled": told})
    pd.testing.assert_frame_equal(word_model.transfer_labels("ct", "rna", to="adt"), missing)
    assert told not in set(mosaic.column("ct").dropna())
    assert mosaic.column("ct").dropna().equals(mosaic.labels().dropna().astype(object))
    assert all(told not in (c.group1, c.group2) for c in contrasts(mosaic, "ct"))
    rest = contrasts(mosaic, "ct", "B")[0].cells2
    assert mosaic.labels().iloc[rest].notna().all()
    cohorts = mosaic.with_cohorts("ct", background="B")
    assert told not in cohorts.cohorts.names
    assert (cohorts.groups[mosaic.labels().isna()] == -1).all()
    with pytest.raises(ValueError, match=f"column 'ct' has no value {told!r}"):
        mosaic.with_cohorts("ct", background=told)


@pytest.mark.parametrize(
    "doubtful", ["Unknown", "nan", "NA", "", "unassigned", "Unclassified", "Not available", "None", "<NA>"]
)
def test_other_words_for_not_known_are_warned_of(doubtful):
    adata = make(names(6), kind=["B", "B", "T", "T", doubtful, doubtful])
    with pytest.warns(UserWarning, match=f"column 'kind' is {doubtful!r} in 2 cells, which counts as a value"):
        Mosaic.from_anndata({"rna": adata}, label_key="kind")
    with pytest.warns(UserWarning, match=f"column 'kind' is {doubtful!r} in 2 cells"):
        Mosaic.from_anndata({"rna": adata}, batch_key="kind")
    mosaic = Mosaic.from_anndata({"rna": adata})
    with pytest.warns(UserWarning, match=f"column 'kind' is {doubtful!r} in 2 cells"):
        contrasts(mosaic, "kind")
    with pytest.warns(UserWarning, match=f"column 'kind' is {doubtful!r} in 2 cells"):
        mosaic.with_cohorts("kind", background="B")
    told = Mosaic.from_anndata({"rna": adata}, label_key="kind", unlabelled=doubtful)  # said, so no warning
    assert len(contrasts(told, "kind")) == 2


@pytest.mark.parametrize("labels", [[None, np.nan], ["unknown", "unknown"]])
def test_dispersion_by_label_needs_a_label(labels):
    spec = ModalitySpec("nb", label_key="kind", dispersion="gene-label", unlabelled="unknown")
    adata = make(names(6), kind=pd.Series(labels * 3, names(6), dtype=object))
    with pytest.raises(ValueError, match="dispersion 'gene-label' needs labels; found none in column 'kind'"):
        Mosaic.from_anndata({"rna": adata}, {"rna": spec})


# Precedence and contradictions


def test_one_column_has_one_reading():
    mdata, _ = simulate(60, {"rna": 50}, treated=0.5)
    exchanged = {"control": "treated", "treated": "control"}
    mdata["rna"].obs["condition"] = mdata["rna"].obs["condition"].map(exchanged)
    said = "'condition' of cell 'cell0' is '.*' in modality 'rna' and '.*' in the obs of the MuData .and in 59 further"
    with kept_apart():
        mdata.obs["condition"] = mdata["rna"].obs["condition"].map(exchanged)
    with pytest.warns(UserWarning, match=said):
        mosaic = Mosaic.from_mudata(mdata, label_key="condition")
    with pytest.warns(UserWarning, match=said):
        column = mosaic.column("condition")
    assert column.equals(mosaic.labels().astype(object))
    assert column.astype(str).equals(mdata["rna"].obs["condition"].astype(str))
    with pytest.warns(UserWarning, match=said):
        cohorts = mosaic.with_cohorts("condition", background="control")
    assert (cohorts.groups == (column == "treated")).all()
    with pytest.warns(UserWarning, match=said):
        (contrast,) = contrasts(mosaic, "condition", "treated", "control")
    assert (column.iloc[contrast.cells1] == "treated").all()


def test_a_label_hidden_in_a_modality_and_known_to_the_whole_is_said():
    with kept_apart():
        mdata = MuData({"rna": make(names(4), kind=["B", "unknown", "T", "unknown"])})
        mdata.obs["kind"] = ["B", "B", "T", "T"]
    said = "'kind' of cell 'c1' is not known in modality 'rna' and 'B' in the obs of the MuData .and in 1 further"
    with pytest.warns(UserWarning, match=said):
        Mosaic.from_mudata(mdata, label_key="kind")


def test_cells_of_one_name_in_two_batches_are_refused():
    rna, adt = make(names(6), batch="s1"), make(names(6), prefix="p", batch="s2")
    with pytest.raises(
        ValueError, match="column 'batch' of cell 'c0' is 's1' in modality 'rna' and 's2' in modality 'a"
    ):
        matched(rna, adt, batch_key="batch")
    with pytest.raises(ValueError, match="two cells have the same name"):
        Mosaic.from_mudata(MuData({"rna": rna, "adt": adt}), batch_key="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vocabularies that do not meet
        assert Mosaic.from_anndata({"rna": rna, "adt": adt}, batch_key="batch").n_cells == 12
