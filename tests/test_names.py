"""Cells, features and tables of users are matched by name, or refused in one sentence."""

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mudata import MuData
from small import CELLS, GROUP, LATENT, RNG, make, names

from pyromosaic import Mosaic, MultiVI, metrics, simulate
from pyromosaic.guidance import GuidanceGraph


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
            "cell '0' is not in the mosaic; to match by position, pass mask.to_numpy()",
        ),
        (lambda n: pd.Series([True, None] * 30, n, dtype="boolean"), "the mask of cells has missing values"),
        (lambda n: pd.Series([True, True], [n[0], n[0]]), "the mask has the cell 'cell0' twice"),
        (lambda n: pd.Index([0, 1]), "cell '0' is not in the mosaic"),
        (lambda n: pd.DataFrame({"x": [True] * 60}, n), "cells must be names, numbers or a mask .* a DataFrame"),
        (lambda n: np.ones((60, 1), bool), r"in one dimension; found the shape \(60, 1\)"),
        (lambda n: {"cell0"}, "found a set"),
        (lambda n: np.where(np.zeros(60, bool)), "cells must be .*; found none"),
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
    with pytest.raises(ValueError, match="'another'|'c0'.*give both the same names"):
        call(*permuted[:-1], strange)


def test_copies_are_matched_without_their_modality():
    expected = metrics.foscttm(LATENT, OTHER)
    for rename in ("rna:{}".format, "{}:rna".format):
        other = OTHER.rename(lambda name, rename=rename: rename(name).replace("rna", "adt"))
        assert metrics.foscttm(LATENT.rename(rename), other[::-1]) == pytest.approx(expected)
        with pytest.raises(ValueError, match="give both the same names"):
            metrics.foscttm(LATENT.rename(rename), other.rename(lambda name: name.replace("c1", "d1")))


def test_measures_take_anndata_and_arrays():
    truth = anndata.AnnData(COUNTS.astype(np.float32))
    expected = metrics.imputation_spearman(COUNTS.to_numpy(), GUESS.to_numpy())
    assert metrics.imputation_spearman(truth[::-1], GUESS) == pytest.approx(expected)
    assert metrics.imputation_spearman(COUNTS, GUESS.to_numpy()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="`latent` has the name '0' and `labels` does not .*same names"):
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
    with pytest.raises(ValueError, match="give both the same names"):
        GuidanceGraph.from_matrix(mosaic, "rna", "adt", matrix.reset_index(drop=True))
