"""What registration and questions take from users' tables: the right value, or one sentence."""

import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mudata import MuData
from scipy import sparse

from pyromosaic import ModalitySpec, Mosaic, MultiVI, metrics, pbmc_mosaic, simulate
from pyromosaic.data import Schema
from pyromosaic.data.tables import kept_apart, word, words
from pyromosaic.guidance import GuidanceGraph
from pyromosaic.links import links_by_overlap
from pyromosaic.tasks import contrasts


def make(cells, n_features=3, prefix="f", **obs):
    counts = 1 + np.random.default_rng(0).poisson(5, (len(cells), n_features)).astype(np.float32)
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_features)])
    return anndata.AnnData(counts, pd.DataFrame(obs, index=pd.Index(cells, dtype=object)), var)


def names(n, prefix="c"):
    return [f"{prefix}{i}" for i in range(n)]


def matched(rna, adt, **shared):
    return Mosaic.from_anndata({"rna": rna, "adt": adt}, match_cells=True, **shared)


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
    with pytest.warns(UserWarning, match="column 'b' has the values 'X', 'x', which are taken for different ones"):
        Mosaic.from_anndata(capitals, batch_key="b")


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


@pytest.mark.parametrize("doubtful", ["Unknown", "nan", "NA", "", "unassigned", "None", "<NA>"])
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


# Precedence and contradictions


def test_one_column_has_one_reading():
    mdata, _ = simulate(60, {"rna": 50}, treated=0.5)
    exchanged = {"control": "treated", "treated": "control"}
    mdata["rna"].obs["condition"] = mdata["rna"].obs["condition"].map(exchanged)
    said = "'condition' of cell 'cell0' is '.*' in modality 'rna' and '.*' in the obs of the whole .and in 59 further"
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
    said = "'kind' of cell 'c1' is not known in modality 'rna' and 'B' in the obs of the whole .and in 1 further"
    with pytest.warns(UserWarning, match=said):
        Mosaic.from_mudata(mdata, label_key="kind")


def test_cells_of_one_name_in_two_batches_are_refused():
    rna, adt = make(names(6), batch="s1"), make(names(6), prefix="p", batch="s2")
    with pytest.raises(
        ValueError, match="column 'batch' of cell 'c0' is 's1' in modality 'rna' and 's2' in modality 'a"
    ):
        matched(rna, adt, batch_key="batch")
    with pytest.raises(ValueError, match="one name stands for two cells"):
        Mosaic.from_mudata(MuData({"rna": rna, "adt": adt}), batch_key="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vocabularies that do not meet
        assert Mosaic.from_anndata({"rna": rna, "adt": adt}, batch_key="batch").n_cells == 12


# Names


@pytest.fixture(scope="module")
def shuffled():
    """Two modalities of the same cells, rows in different orders; and a model of them, not trained."""
    mdata, _ = simulate(60, {"rna": 50, "adt": 8}, patterns=["rna+adt"])
    adt = mdata["adt"][np.random.default_rng(0).permutation(60)].copy()
    mdata = MuData({"rna": mdata["rna"].copy(), "adt": adt})
    return mdata, MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), n_latent=3, n_hidden=8)


SELECTIONS = [
    lambda mask: mask,
    lambda mask: mask.astype("boolean"),
    lambda mask: mask.astype(object),
    lambda mask: mask[mask],  # names only those asked for
    lambda mask: mask.index[mask],
    lambda mask: mask.index[mask].to_series(),
    lambda mask: list(mask.index[mask]),
    lambda mask: mask.index[mask].to_numpy(),
    lambda mask: pd.Categorical(mask.index[mask]),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SELECTIONS), st.permutations(range(60)), st.sets(st.integers(0, 59), min_size=1))
def test_cells_are_matched_by_name(shuffled, select, order, chosen):
    mosaic = shuffled[1].mosaic
    mask = pd.Series(np.isin(np.arange(60), list(chosen)), mosaic.obs_names)
    found = mosaic.find(select(mask.iloc[list(order)]))
    assert sorted(found) == sorted(chosen)


def test_every_question_takes_masks_by_name(shuffled):
    mdata, model = shuffled
    mask = mdata["adt"].obs["celltype"] == "type0"
    asked = set(mask.index[mask])
    assert set(model.get_latent_representation(mask).index) == asked
    assert set(model.get_normalized_expression("adt", mask).index) == asked
    assert set(model.get_imputed_values("adt", mask, n_samples=2).mean.index) == asked
    assert set(model.get_cell_factors(mask).index) == asked
    table = model.differential(cells1=mask, cells2=~mask, modality="adt", n_samples=20)
    right = mdata["adt"][mask.to_numpy()].X.mean(0)
    np.testing.assert_allclose(table.loc[mdata["adt"].var_names, "raw_mean1"], np.ravel(right), rtol=1e-6)
    cohorts = model.mosaic.with_cohorts(background=mask, target={"others": ~mask})
    assert set(model.mosaic.obs_names[cohorts.groups == 0]) == asked


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (
            lambda n: pd.Series([True] * len(n)),
            "cell '0' is not in the mosaic; a mask without names is mask.to_numpy()",
        ),
        (lambda n: pd.Series([True, None] * 30, n, dtype="boolean"), "the mask of cells has missing values"),
        (lambda n: pd.Series([True, True], [n[0], n[0]]), "the mask has the cell 'cell0' twice"),
        (lambda n: pd.Index([0, 1]), "cell '0' is not in the mosaic"),
        (lambda n: pd.DataFrame({"x": [True] * 60}, n), "cells are given by names, numbers or a mask .* a DataFrame"),
        (lambda n: np.ones((60, 1), bool), r"in one dimension; found the shape \(60, 1\)"),
        (lambda n: {"cell0"}, "found a set"),
        (lambda n: np.where(np.zeros(60, bool)), "no cell was asked for"),
    ],
)
def test_cells_that_are_refused(shuffled, cells, message):
    mosaic = shuffled[1].mosaic
    with pytest.raises(ValueError, match=message):
        mosaic.find(cells(mosaic.obs_names))


def test_selections_that_are_meant():
    mosaic = Mosaic.from_anndata({"rna": make(names(6))})
    mask = np.array([False, True, False, True, False, False])
    for cells in (mask, mask.astype(object), list(mask), np.where(mask), [1, 3], pd.Series([1, 3]), ["c1", "c3"]):
        assert mosaic.find(cells).tolist() == [1, 3]
    assert mosaic.find("c2").tolist() == [2]


def test_numbers_as_names_are_names():
    mosaic = Mosaic.from_anndata({"rna": make(["3", "0", "2", "1"])})
    mask = pd.Series([True, True, False, False])  # of the cells 0 and 1
    assert mosaic.find(mask).tolist() == [1, 3]
    assert mosaic.find(pd.Index([0, 1])).tolist() == [1, 3]
    assert mosaic.find(np.array([0, 1])).tolist() == [0, 1]
    with pytest.raises(ValueError, match="could be names or positions of cells"):
        mosaic.find(pd.Series([0, 1]))


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("rna_1", ["rna_1"]),
        (pd.Series({"rna_3": True, "rna_1": False, "rna_0": True}), ["rna_0", "rna_3"]),
        (np.arange(50) == 7, ["rna_7"]),
        (["rna_4", "rna_2"], ["rna_4", "rna_2"]),
    ],
)
def test_features_by_name_or_mask(shuffled, features, expected):
    model = shuffled[1]
    assert list(model.get_normalized_expression("rna", features=features).columns) == expected
    table = model.differential("celltype", "type0", modality="rna", features=features, n_samples=10)
    assert sorted(table.index) == sorted(expected)


def test_features_that_are_refused_or_numbered():
    numbered = make(names(6))
    numbered.var_names = ["2", "0", "1"]
    model = MultiVI(Mosaic.from_anndata({"rna": numbered}), n_latent=2, n_hidden=8)
    assert list(model.get_normalized_expression("rna", features=[0]).columns) == ["0"]
    with pytest.raises(ValueError, match="feature '3' is not in modality 'rna'"):
        model.get_normalized_expression("rna", features=[3])
    with pytest.raises(ValueError, match="there is no modality to infer from"):
        model.get_imputed_values("rna", encode=[])
    pd.testing.assert_frame_equal(
        model.get_imputed_values("rna", encode="rna", n_samples=2).mean,
        model.get_imputed_values("rna", encode=["rna"], n_samples=2).mean,
    )


CELLS = names(40)
RNG = np.random.default_rng(0)
GROUP = pd.Series(RNG.choice(["a", "b"], 40), CELLS)
LATENT = pd.DataFrame(RNG.normal(size=(40, 2)) + 4 * (GROUP == "a").to_numpy()[:, None], CELLS, ["z_0", "z_1"])
OTHER = LATENT + RNG.normal(size=LATENT.shape) * [0.1, 1]
COUNTS = pd.DataFrame(RNG.poisson(3, (40, 5)), CELLS, list("vwxyz"))
GUESS = COUNTS + RNG.normal(size=COUNTS.shape)
CHANCE = pd.Series(RNG.random(40), CELLS)
MEASURES = {
    "label_purity": (LATENT, GROUP),
    "modality_enrichment": (LATENT, GROUP),
    "foscttm": (LATENT, OTHER),
    "neighbor_rank_distance": (LATENT, OTHER),
    "imputation_spearman": (COUNTS, GUESS),
    "imputation_auprc": (COUNTS, GUESS),
    "interval_coverage": (COUNTS, GUESS - 1, GUESS + 1),
    "reliability_curve": (CHANCE, GROUP == "a"),
    "expected_calibration_error": (CHANCE, GROUP == "a"),
    "error_by_uncertainty": (COUNTS, GUESS.abs()),
    "label_transfer_accuracy": (LATENT, GROUP, OTHER, GROUP),
    "label_transfer_both_ways": (LATENT, GROUP, OTHER, GROUP),
}


@pytest.mark.parametrize("measure", MEASURES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_measures_match_names_in_any_order(measure, data):
    call, tables = getattr(metrics, measure), MEASURES[measure]
    expected = call(*tables)
    permuted = []
    for table in tables:
        rows, columns = (
            data.draw(st.permutations(list(axis))) for axis in (table.index, getattr(table, "columns", []))
        )
        permuted.append(table.loc[rows, columns] if columns else table.loc[rows])
    found = call(*permuted)
    np.testing.assert_allclose(np.asarray(found, dtype=float), np.asarray(expected, dtype=float), rtol=1e-9)
    strange = permuted[-1].rename(index={CELLS[0]: "another"})
    with pytest.raises(ValueError, match="'another'|'c0'.*names do not fit"):
        call(*permuted[:-1], strange)


def test_copies_are_matched_without_their_modality():
    expected = metrics.foscttm(LATENT, OTHER)
    for rename in ("rna:{}".format, "{}:rna".format):
        other = OTHER.rename(lambda name, rename=rename: rename(name).replace("rna", "adt"))
        assert metrics.foscttm(LATENT.rename(rename), other[::-1]) == pytest.approx(expected)
        with pytest.raises(ValueError, match="names do not fit"):
            metrics.foscttm(LATENT.rename(rename), other.rename(lambda name: name.replace("c1", "d1")))


def test_measures_take_anndata_and_arrays():
    truth = anndata.AnnData(COUNTS.astype(np.float32))
    expected = metrics.imputation_spearman(COUNTS.to_numpy(), GUESS.to_numpy())
    assert metrics.imputation_spearman(truth[::-1], GUESS) == pytest.approx(expected)
    assert metrics.imputation_spearman(COUNTS, GUESS.to_numpy()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="`labels` has 'c0' and `latent` has not|names do not fit"):
        metrics.label_purity(LATENT.reset_index(drop=True), GROUP)
    numbered = LATENT.reset_index(drop=True), GROUP.reset_index(drop=True).sample(frac=1, random_state=0)
    assert metrics.label_purity(*numbered) == metrics.label_purity(LATENT, GROUP)
    with pytest.warns(UserWarning, match="`labels` is 'unknown' in 1 cells"):
        metrics.label_purity(LATENT, GROUP.where(GROUP.index != "c0", "unknown"))


def test_a_matrix_of_links_is_matched_by_name(shuffled):
    mosaic = shuffled[1].mosaic
    genes, proteins = (mosaic.schema[name].features for name in ("rna", "adt"))
    matrix = pd.DataFrame(np.resize(np.eye(8), (50, 8)), genes, proteins)
    graph = GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix.sample(frac=1, random_state=0)[list(proteins)[::-1]])
    expected = GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix.to_numpy())
    pd.testing.assert_frame_equal(graph.links("rna", "adt"), expected.links("rna", "adt"))
    with pytest.raises(ValueError, match="names do not fit"):
        GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix.reset_index(drop=True))


# Zeros


LIKELIHOODS = ["nb", "zinb", "nb_mixture", "multinomial", "bernoulli", "normal", "log1p_normal", "ziln", "zig"]
STORED = [np.array, sparse.csr_matrix, sparse.csc_matrix]


def with_zeros(store=np.array):
    x = 1 + np.random.default_rng(0).poisson(3, (60, 20)).astype(np.float32)
    x[::4] = 0
    return anndata.AnnData(store(x), pd.DataFrame(index=names(60)), pd.DataFrame(index=names(20, "x")))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("store", STORED)
def test_rows_of_zeros_are_no_measurement(likelihood, store):
    with pytest.raises(ValueError, match="'x': 15 of 60 cells have 0 throughout, 'c0' first.*empty_cells=\"holes\""):
        Mosaic.from_anndata({"x": with_zeros(store)}, {"x": likelihood})
    spec = ModalitySpec(likelihood, empty_cells="holes")
    whole = {"rna": make(names(60)), "x": with_zeros(store)}
    mosaic = Mosaic.from_anndata(whole, {"rna": "nb", "x": spec}, match_cells=True)
    assert (~mosaic.presence["x"]).sum() == 15 and not mosaic.presence["x"].iloc[::4].any()
    assert Mosaic.from_mudata(MuData(whole), {"rna": "nb", "x": spec}).presence.equals(mosaic.presence)
    left_out = {"rna": make(names(60)), "x": with_zeros(store)[np.arange(60) % 4 > 0]}
    expected = Mosaic.from_anndata(left_out, {"rna": "nb", "x": likelihood}, match_cells=True)
    assert mosaic.schema["x"].library == expected.schema["x"].library
    again = Schema.from_json(mosaic.schema.to_json())
    assert again == mosaic.schema
    assert Mosaic.from_anndata(whole, schema=again, match_cells=True).presence.equals(mosaic.presence)


def test_zeros_that_are_measured():
    spec = ModalitySpec("bernoulli", empty_cells="keep")
    assert Mosaic.from_anndata({"x": with_zeros()}, {"x": spec}).presence["x"].all()
    with pytest.raises(ValueError, match='empty_cells is "refuse", "holes" or "keep"'):
        ModalitySpec("nb", empty_cells="drop")
    nothing = with_zeros()
    nothing.X[:] = 0
    with pytest.raises(ValueError, match="modality 'x' has 0 throughout in all cells"):
        Mosaic.from_anndata({"x": nothing}, {"x": "nb"} | {"x": ModalitySpec("nb", empty_cells="holes")})


@pytest.mark.parametrize("store", STORED)
@pytest.mark.parametrize("likelihood", ["nb", "nb_mixture", "bernoulli", "normal"])
def test_features_that_a_batch_did_not_measure(likelihood, store):
    x = np.random.default_rng(0).poisson(1, (90, 30)).astype(np.float32)
    x[:, 0] = 1
    obs = pd.DataFrame({"b": np.resize(["p", "q", "r"], 90)}, names(90))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mosaic.from_anndata({"x": anndata.AnnData(store(x), obs)}, {"x": likelihood}, batch_key="b")
    x[np.ix_(obs["b"] == "q", np.arange(3, 10))] = 0
    adata = anndata.AnnData(store(x), obs)
    with pytest.warns(UserWarning, match="of 30 features some are 0 .* not in others: 7 in all 30 cells of batch 'q';"):
        Mosaic.from_anndata({"x": adata}, {"x": likelihood}, batch_key="b")


# Sizes


def test_sizes_that_are_no_counts():
    adata = make(names(30), 40)
    totals = np.ravel(adata.X.sum(1))
    adata.obs["near 1"], adata.obs["logs"], adata.obs["counts"] = totals / np.median(totals), np.log(totals), totals
    for key in ("near 1", "logs"):
        with pytest.warns(UserWarning, match=f"the sizes in column '{key}' are 0.0.* times the cells' total counts"):
            Mosaic.from_anndata({"rna": adata}, size_factor_key=key)
    Mosaic.from_anndata({"rna": adata}, size_factor_key="counts")


# The user's matrix


@pytest.mark.parametrize("store", STORED[:2])
def test_counts_changed_after_registration_are_said(store):
    adata = make(names(30))
    adata.X = store(adata.X)
    model = MultiVI(Mosaic.from_anndata({"rna": adata}), n_latent=2, n_hidden=8)
    before = model.get_latent_representation()
    x = adata.X if store is np.array else adata.X.data
    x[...] = np.log1p(x)
    for question in (
        lambda: model.train(1, progress_bar=False),
        model.get_latent_representation,
        lambda: model.differential(cells1=["c0"], n_samples=10),
    ):
        with pytest.raises(ValueError, match="modality 'rna': the measurements were changed after registration"):
            question()
    x[...] = np.round(np.expm1(x))
    pd.testing.assert_frame_equal(model.get_latent_representation(), before)


# Annotation


def overlap(**columns):
    cells = names(10)
    rna, atac = make(cells, 2, "g"), make(cells, 4, "r")
    atac.var_names = ["chr1:800-900", "chr1:1000-2000", "chr1:2100-2200", "chr2:1000-2000"]
    mosaic = Mosaic.from_anndata({"rna": rna, "atac": atac}, match_cells=True)
    place = {"chromosome": "chr1", "start": 1200, "end": 1800, "strand": "+"} | columns
    pairs = links_by_overlap(mosaic, ("rna", "atac"), pd.DataFrame(place, index=["g0"]), promoter=500).pairs
    return set(pairs["atac"])


BODY, UPSTREAM, DOWNSTREAM = "chr1:1000-2000", "chr1:800-900", "chr1:2100-2200"


@pytest.mark.parametrize("strand", ["+", 1, 1.0, "1", "+1", " + "])
def test_the_plus_strand_in_all_its_words(strand):
    assert overlap(strand=[strand]) == {BODY, UPSTREAM}


@pytest.mark.parametrize("strand", ["-", -1, -1.0, "-1"])
def test_the_minus_strand_in_all_its_words(strand):
    assert overlap(strand=[strand]) == {BODY, DOWNSTREAM}


@pytest.mark.parametrize("strand", [".", None, np.nan, ""])
def test_a_strand_that_is_not_known(strand):
    with pytest.warns(UserWarning, match="the strand of 1 of 1 genes is unknown; they are linked by their body"):
        assert overlap(strand=[strand]) == {BODY}


def test_places_in_other_types():
    assert overlap(start="1200", end="1800") == {BODY, UPSTREAM}
    assert overlap(chromosome=[1]) == overlap(chromosome=["1"]) == overlap(chromosome=[1.0]) == {BODY, UPSTREAM}
    with pytest.raises(ValueError, match="the start of gene 'g0' is '1,200'; accepted: a number of bases"):
        overlap(start="1,200")
    with pytest.raises(ValueError, match="the end of gene 'g0' is 'nan'"):
        overlap(end=np.nan)
    with pytest.raises(ValueError, match="the strand of gene 'g0' is 'forward'; accepted: '[+]' and '-'"):
        overlap(strand="forward")


# The page of the documentation

PAGE = Path(__file__).parents[1] / "docs/user_guide/registration.md"
ROWS = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in PAGE.read_text().splitlines() if "| `" in line]


@pytest.fixture
def examples():
    """The names that the examples of the page use."""
    mdata, _ = simulate(60, {"rna": 50, "adt": 8}, patterns=["rna+adt"], n_batches=2)
    rna, adt = mdata["rna"], mdata["adt"]
    rna.obs["number"] = [0, 1] * 30
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

    return {
        **{"rna": rna, "adt": adt, "mosaic": mosaic, "model": MultiVI(mosaic, n_latent=3, n_hidden=8)},
        **{"register": register, "apart": lambda **shared: register(match_cells=False, **shared)},
        **{"zeros": zeros, "unmeasured": unmeasured, "changed": changed, "overlap": overlap},
        **{"mask": adt.obs["celltype"] == "type0", "latent": LATENT, "labels": GROUP, "metrics": metrics},
        **{"Mosaic": Mosaic, "MultiVI": MultiVI, "np": np},
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
            with pytest.raises(ValueError, match=re.escape(message.strip())):
                eval(code, examples)
        else:
            eval(code, examples)
    assert bool([w for w in caught if w.category is UserWarning]) == (how == "warned")
