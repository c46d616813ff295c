"""Alignment without links, pairs or labels."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from mudata import MuData

from pyromosaic import DiagVI, Mosaic, ScModal, linkage, metrics, simulate
from pyromosaic.guidance.scores import scores_of
from pyromosaic.linkage import geometry
from pyromosaic.linkage.geometry import Draw, Shape
from pyromosaic.linkage.geometry import _white as white
from pyromosaic.links import GuidanceGraph

pytest.importorskip("ot")

SHARES = [0.35, 0.25, 0.2, 0.12, 0.08]


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Fewer draws, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "N_DRAWS", 3)
        patch.setattr(geometry, "N_JUDGES", 6)
        yield


@pytest.fixture(scope="module")
def data():
    return simulate(
        900, {"rna": 150, "adt": 40}, patterns=["rna", "adt", "rna+adt"], types=SHARES, separation=3.0, seed=1
    )


@pytest.fixture(scope="module")
def mosaic(data):
    return Mosaic.from_mudata(data[0], batch_key="batch")


@pytest.fixture(scope="module")
def link(mosaic):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return linkage.cca(mosaic, ("rna", "adt"), n_pcs=20, rounds=3)


def transfer(mdata, link):
    x, y = link.scores["rna"], link.scores["adt"]
    labels = [mdata[k].obs["celltype"].astype(str).loc[link.scores[k].index] for k in ("rna", "adt")]
    return min(metrics.label_transfer_both_ways(x, labels[0], y, labels[1]))


def test_types_meet_without_links(data, link):
    assert transfer(data[0], link) > 0.75
    assert link.links is None and link.agreement == {}


def test_confidence_is_carried_by_cell_and_population(link, mosaic):
    found = link.by_shape
    for name in ("rna", "adt"):
        values = link.confidence[name]
        assert values.index.equals(link.scores[name].index) and values.between(0, 1).all()
    assert found.populations["cells"].sum() == sum(len(values) for values in link.confidence.values())
    weights = found.populations["cells"][found.populations["modality"] == "rna"]
    means = found.populations["confidence"][found.populations["modality"] == "rna"]
    np.testing.assert_allclose(np.average(means, weights=weights), link.confidence["rna"].mean())
    np.testing.assert_allclose(found.stability, np.mean([v.mean() for v in link.confidence.values()]))
    assert 0 < found.chosen.weight <= 1
    assert sum(m.weight for m in [found.chosen, *link.alternatives]) <= 1 + 1e-9
    for other in link.alternatives:
        assert other.score <= found.chosen.score
        assert set(other.features["adt"]) <= set(mosaic.modalities["adt"].schema.features)
        again = linkage.cca(mosaic, ("rna", "adt"), correspondence=other.correspondence, n_pcs=20)
        assert again.confidence == {} and again.alternatives == []


def test_unrelated_data_give_a_warning_and_no_confidence(data):
    mdata = data[0]
    adt = mdata["adt"].copy()
    adt.X = np.random.default_rng(0).permuted(np.asarray(adt.X), axis=0)
    mosaic = Mosaic.from_mudata(MuData({"rna": mdata["rna"], "adt": adt}), batch_key="batch")
    with pytest.warns(UserWarning, match="share nothing that could be found.*Do not use these scores"):
        link = linkage.cca(mosaic, ("rna", "adt"), n_pcs=20, rounds=1)
    assert link.by_shape.stability == 0 and all((values == 0).all() for values in link.confidence.values())


def test_pairs_a_population_and_links_are_known(data, mosaic):
    mdata, truth = data
    both = mdata["rna"].obs_names.intersection(mdata["adt"].obs_names)
    chosen = np.random.default_rng(0).choice(both, 10, replace=False)
    pairs = pd.DataFrame({"rna": chosen, "adt": chosen})
    population = {k: mdata[k].obs_names[mdata[k].obs["celltype"] == "type1"] for k in ("rna", "adt")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        link = linkage.cca(mosaic, ("rna", "adt"), pairs=pairs, population=population, n_pcs=20, rounds=2)
    assert transfer(mdata, link) > 0.75 and 0 <= link.by_shape.changed <= 1
    for options, message in (
        ({"pairs": pairs[["rna"]]}, "pairs must name cells of modality 'adt'; found 'rna'"),
        ({"pairs": pairs.assign(adt="nobody")}, "modality 'adt' has no cell 'nobody'"),
        ({"pairs": pairs[:0]}, "no cell of modality 'rna' is given"),
        ({"population": {"rna": chosen}}, "population must name cells of modality 'adt'"),
    ):
        with pytest.raises(ValueError, match=message):
            linkage.cca(mosaic, ("rna", "adt"), n_pcs=20, **options)


def test_models_take_it(link, mosaic):
    scores = scores_of(link, mosaic, 5)
    assert scores.shape == (mosaic.n_cells, min(5, len(link.correlations))) and np.isfinite(scores).all()
    only = np.flatnonzero(mosaic.modalities["rna"].present & ~mosaic.modalities["adt"].present)
    radius = np.sqrt((link.correlations[:5] ** 2).sum())
    confidence = link.confidence["rna"].loc[mosaic.obs_names[only]]
    np.testing.assert_allclose(np.linalg.norm(scores[only], axis=1), radius * confidence, rtol=1e-4)
    model = ScModal(mosaic, linkage=link, n_latent=5, n_hidden=8)
    model.train(1)
    split = model.scores.values.numpy()
    assert sorted(np.linalg.norm(split, axis=1)[:20]) != [0.0] * 20 and split.shape[1] == scores.shape[1]
    graph = GuidanceGraph.from_linkage(mosaic, link)
    DiagVI(mosaic, graph, linkage=link, n_latent=5, n_hidden=8).train(1)
    other = Mosaic.from_mudata(simulate(60, {"rna": 150, "atac": 30})[0])
    with pytest.raises(ValueError, match="no scores of 'atac'|same 150 features"):
        scores_of(link, other, 5)


def test_cost_and_starts_against_pot():
    import ot

    rng = np.random.default_rng(0)
    x = rng.exponential(size=(400, 6)) * [3, 2, 1, 1, 1, 1]
    white = [x, x[:, :3], x[:, 3:]]
    none = np.zeros((400, 0))
    draw = Draw(Shape.draw(x, white, none, 0), Shape.draw(x, white, none, 1))
    for start in draw.starts(0):
        np.testing.assert_allclose(start.sum(axis=1), draw.first.weights, atol=1e-9)
        np.testing.assert_allclose(start.sum(axis=0), draw.second.weights, atol=1e-9)
    constant, of_first, of_second = ot.gromov.init_matrix(
        draw.first.straight, draw.second.straight, draw.first.weights, draw.second.weights
    )
    np.testing.assert_allclose(draw.distortion(start), ot.gromov.gwloss(constant, of_first, of_second, start))
    same = Draw(draw.first, draw.first)
    assert same.distortion(np.diag(draw.first.weights)) < 1e-12
    moved = draw.first.carried(draw.second)
    np.testing.assert_allclose(moved @ draw.second.weights, draw.first.weights)


def types_in_two_modalities(n, shares, spread):
    """A draw of two modalities that see the same types and values, and how many cells of each type a metacell has."""
    rng = np.random.default_rng(0)
    kind = rng.choice(len(shares), n, p=shares)
    z = rng.standard_normal((len(shares), 4))[kind] * spread + rng.standard_normal((n, 4))
    turned = [z @ np.linalg.qr(rng.standard_normal((12, 4)))[0].T for _ in range(2)]
    values = [x + 0.5 * rng.standard_normal((n, 12)) for x in turned]
    none = np.zeros((n, 0))
    draw = Draw(*(Shape.draw(x, [white(x), white(x[:, :6]), white(x[:, 6:])], none, 0) for x in values))
    types = [
        np.array([np.bincount(kind[s.groups == g], minlength=len(shares)) for g in range(len(s.weights))])
        for s in (draw.first, draw.second)
    ]
    return draw, types


def test_search_exchanges_small_populations_until_none_is_better(monkeypatch):
    """The only start is right but for four small types, in two pairs, that have exchanged their partners."""
    draw, types = types_in_two_modalities(1200, [0.4, 0.3, 0.1, 0.09, 0.06, 0.05], 6)
    wrong = draw.balanced(types[0] @ types[1][:, [0, 1, 3, 2, 5, 4]].T / 1200**2)
    monkeypatch.setattr(Draw, "starts", lambda self, seed: iter([wrong]))
    monkeypatch.setattr(Draw, "by_distances", lambda self, start: start)

    def right(plan):
        shares = [t / t.sum(axis=1, keepdims=True) for t in types]
        return np.trace(shares[0].T @ plan @ shares[1])

    assert right(draw.refined(wrong)) < 0.8
    best = draw.search(0)[0]
    assert right(best) > 0.95
    for exchanged in geometry._exchanged(best, draw.first.populations):
        assert draw.score(draw.refined(exchanged)) <= draw.score(best) + 0.01


def test_score_prefers_the_right_types_and_halves_that_agree():
    rng = np.random.default_rng(0)
    draw, types = types_in_two_modalities(600, [0.5, 0.3, 0.2], 3)

    def matched(order):
        return draw.refined(draw.balanced(types[0] @ types[1][:, order].T / 600**2), rounds=1)

    right = matched([0, 1, 2])
    assert all(draw.score(right) > draw.score(matched(order)) for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0]))
    halves = [draw.refined(right, half, 3) for half in (1, 2)]
    blurred = Draw(draw.first, replace(draw.second, values=[v[rng.permutation(len(v))] for v in draw.second.values]))
    assert blurred.score(right) < draw.score(right)
    shared = (draw.between(halves[0], 2) + draw.between(halves[1], 1)) / 2
    expected = np.log(shared * np.minimum(*halves).sum() / draw.distortion(right))
    np.testing.assert_allclose(draw.score(right), expected)
