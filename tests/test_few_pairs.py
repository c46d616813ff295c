"""Cells with several modalities, few or many: what they say linearly about all cells, and what models make of it."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from mudata import MuData

from pyromosaic import Mosaic, MultiVI, hide, linkage, metrics, simulate
from pyromosaic.data import measured
from pyromosaic.guidance import GuidanceGraph, few_pairs, mosaic_scores, scores
from pyromosaic.neighbors import nearest
from pyromosaic.penalties import Pull, Scores
from pyromosaic.posterior import Posterior
from pyromosaic.program import AtMean
from pyromosaic.sizes import Size, other_sizes


def split(n_pairs, n_cells=700, seed=0, **options):
    """A simulated mosaic in which few cells stay paired, and the hidden measurements."""
    options = {"patterns": ["rna+adt"], "types": 6, "n_latent": 6} | options
    mdata, truth = simulate(n_cells, {"rna": 120, "adt": 30}, seed=seed, **options)
    shown, hidden = hide(mdata, dict.fromkeys(mdata.mod, (n_cells - n_pairs) // 2), seed=seed)
    return Mosaic.from_mudata(shown, batch_key="batch"), hidden, truth


def apart(model_scores, hidden_scores):
    """FOSCTTM of the hidden measurements of cells and what is seen of these cells."""
    return np.mean([metrics.foscttm(own, model_scores.loc[own.index]) for own in hidden_scores.values()])


@pytest.fixture(scope="module")
def few():
    return split(20)


def of_linkage(mosaic, hidden, **options):
    link = linkage.cca(mosaic, ("rna", "adt"), n_components=6, n_pcs=15, start="pairs", **options)
    unseen = link.transform(Mosaic.from_anndata(dict(hidden), match_cells=True, schema=mosaic.schema))
    return link, apart(pd.concat(link.scores.values()).groupby(level=0).mean(), unseen)


def test_matching_all_cells_makes_more_of_few_pairs(few):
    mosaic, hidden, _ = few
    link, found = of_linkage(mosaic, hidden)
    alone, by_pairs = of_linkage(mosaic, hidden, rounds=1)
    assert found < 0.8 * by_pairs and found < 0.15
    assert len(link.agreement["pairs"]) == 5 and link.agreement["pairs"][-1] > link.agreement["pairs"][0]
    assert np.isnan(alone.crossfit).all() and np.isfinite(link.crossfit).all()


def test_left_out_pairs_choose_rounds_without_the_others(few):
    """Exchanged partners are no better matched by the right rounds: no trial finds an agreement."""
    mosaic, _, _ = few
    rng = np.random.default_rng(0)
    adt = mosaic.modalities["adt"]
    paired = np.flatnonzero(mosaic.presence.all(axis=1))
    rows = adt.rows.copy()
    rows[paired] = rng.permutation(rows[paired])
    exchanged = replace(mosaic, modalities=mosaic.modalities | {"adt": replace(adt, rows=rows)})
    right, wrong = (
        linkage.cca(m, ("rna", "adt"), n_components=6, n_pcs=15, start="pairs").agreement["pairs"]
        for m in (mosaic, exchanged)
    )
    assert max(right) > 0.6 > max(wrong)


def test_a_start_from_pairs_needs_pairs():
    mdata, _ = simulate(80, {"rna": 50, "adt": 20}, patterns=["rna", "adt"])
    with pytest.raises(ValueError, match="needs cells that have both 'rna' and 'adt'; found none"):
        linkage.cca(Mosaic.from_mudata(mdata), ("rna", "adt"), start="pairs", n_pcs=5)


def test_scores_of_three_modalities_and_of_one_that_nothing_links(monkeypatch):
    sizes = {"rna": 80, "adt": 20, "atac": 60}
    patterns = ["rna+adt", "adt+atac", "rna", "adt", "atac"]
    mdata, truth = simulate(500, sizes, patterns=patterns, n_latent=3, separation=4.0, seed=1)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    found = mosaic_scores(mosaic, None, 3)
    assert found.shape == (500, 3) and np.isfinite(found).all()
    table = pd.DataFrame(found, mosaic.obs_names)
    types = pd.Series(np.asarray(truth.type), mdata.obs_names)
    one, other = (mosaic.presence.sum(axis=1).eq(1) & mosaic.presence[n] for n in ("rna", "atac"))  # never in one cell
    right = metrics.label_transfer_accuracy(
        table[one], types[table.index[one]], table[other], types[table.index[other]], n_neighbors=5
    )
    assert right > types.value_counts(normalize=True).max() + 0.25
    monkeypatch.setattr(scores, "N_LEARNT", 300)  # as in large data: learnt from some cells
    assert np.isfinite(mosaic_scores(mosaic, None, 3)).all()
    apart, _ = simulate(200, sizes, patterns=["rna+adt", "rna", "atac"], seed=1)
    mosaic = Mosaic.from_mudata(apart)
    missing = np.isnan(mosaic_scores(mosaic, None, 3)).all(axis=1)
    assert (missing == mosaic.presence["atac"].to_numpy()).all()
    single, _ = simulate(60, {"rna": 50}, seed=1)
    assert mosaic_scores(Mosaic.from_mudata(single), None, 3).shape == (60, 0)


def test_links_stand_in_for_pairs():
    mdata, truth = simulate(300, {"rna": 80, "adt": 20}, patterns=["rna", "adt"], links={"adt": 1.0}, seed=0)
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    for graph, known in ((None, False), (links, True)):
        model = MultiVI(mosaic, graph, n_latent=4, linkage="cca")
        with nullcontext() if known else pytest.warns(UserWarning, match="nothing to start from"):
            model.train(1, progress_bar=False, sleep_steps=0)
        assert bool(model.scores) == known
    with pytest.warns(UserWarning, match="the links have no effect"):
        MultiVI(mosaic, links, n_latent=4, linkage=None).train(1, progress_bar=False, sleep_steps=0)


def test_cells_without_scores_are_not_pulled():
    values = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]])
    known = Scores()
    known.set(values)
    loc = torch.ones(2, 3, requires_grad=True)
    mdata, _ = simulate(20, {"rna": 50})
    minibatch = measured(Mosaic.from_mudata(mdata), np.arange(2))
    penalty = Pull(1.0, known)({"rna": Posterior(torch.arange(2), loc, torch.ones(2, 3))}, minibatch)
    assert penalty.item() == pytest.approx(0.5)  # distance 1 of one of two cells, mean square 1
    penalty.backward()
    assert loc.grad[1].eq(0).all() and loc.grad[0].tolist() == [0.0, 1.0, 0.0]


def test_a_trained_model_is_not_pulled_anew(few):
    mosaic, _, _ = few
    model = MultiVI(mosaic, n_latent=4, linkage="cca")
    model.train(1, progress_bar=False, sleep_steps=0)
    first = model.scores.values.clone()
    model.train(1, progress_bar=False, sleep_steps=0)
    assert model.scores and torch.equal(model.scores.values, first)
    for options in ({"linkage": None}, {"linkage": "cca", "pull": 0.0}):
        other = MultiVI(mosaic, n_latent=4, **options)
        other.train(1, progress_bar=False, sleep_steps=0)
        assert not other.scores


def test_few_pairs_are_linked_by_default_and_many_are_not(few, tmp_path):
    mosaic, _, _ = few
    model = MultiVI(mosaic, n_latent=4)
    assert model.linkage == model.options["linkage"] == "cca" and "linkage='cca'" in repr(model)
    model.save(tmp_path)
    assert MultiVI.load(tmp_path, mosaic).linkage == "cca"
    many, _, _ = split(300)
    for data, options in ((many, {}), (mosaic, {"linkage": None}), (mosaic.schema, {})):
        assert MultiVI(data, n_latent=4, **options).linkage is None
    model = MultiVI(many, n_latent=4)
    assert model.options["linkage"] == "auto" and "linkage" not in repr(model)
    model.train(1, progress_bar=False, sleep_steps=0)
    assert not model.scores and "train_penalty/pull" not in model.history
    assert all(MultiVI(mosaic, **MultiVI.presets[name].options).linkage is None for name in ("paper", "calibrated"))


@pytest.mark.parametrize(
    ("n_linked", "n_pairs", "expected"), [(0, 0, False), (30, 0, True), (0, 4, False), (0, 6, True)]
)
def test_what_few_pairs_need_to_start_from(n_linked, n_pairs, expected):
    mosaic, _, _ = split(n_pairs, n_cells=200)
    links = pd.DataFrame({name: [f"{name}_{i}" for i in range(n_linked)] for name in ("rna", "adt")})
    graph = GuidanceGraph.from_table(mosaic, links) if n_linked else None
    assert few_pairs(mosaic, graph) == expected


def test_a_modality_of_few_cells_is_not_linked_by_default(recwarn):
    rna, adt = (simulate(60, {"rna": 20, "adt": 5}, seed=0)[0][name] for name in ("rna", "adt"))
    mosaic = Mosaic.from_anndata({"rna": rna.copy(), "adt": adt[:8].copy()}, match_cells=True)
    assert not few_pairs(mosaic, None)
    MultiVI(mosaic, n_latent=2).train(1, progress_bar=False, sleep_steps=0)
    assert not any("linkage" in str(one.message) for one in recwarn)


def test_sizes_follow_the_depth_of_other_modalities():
    mdata, _ = simulate(400, {"rna": 50, "adt": 10}, patterns=["rna+adt", "rna"], seed=3)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    others = other_sizes(mosaic.schema, "adt")
    assert others == {"rna": mosaic.schema["rna"].library}
    size = Size("adt", mosaic.schema["adt"], 2, others)
    cells = np.flatnonzero(mosaic.presence["adt"])
    view = measured(mosaic, cells).observed["adt"]
    z = torch.randn(len(cells), 2, generator=torch.Generator().manual_seed(0))
    depth = torch.from_numpy(mosaic.modalities["rna"].library[cells] / others["rna"])[:, None]
    size.fit(z, replace(view, library=100 * depth**0.5), size.depths_in(mosaic, cells))
    assert float(size.of_depths) == pytest.approx(0.5, abs=0.02) and float(size.weight.abs().max()) < 0.01
    unmeasured = np.flatnonzero(~mosaic.presence["adt"].to_numpy())
    minibatch = measured(mosaic, unmeasured)
    asked = replace(minibatch.observed["rna"], library=torch.full((len(unmeasured), 1), float("nan")), counts=None)
    with AtMean():
        found = size(torch.zeros(len(unmeasured), 2), asked, minibatch).library
        blind = size(torch.zeros(len(unmeasured), 2), asked, replace(minibatch, observed={})).library
    own = torch.from_numpy(mosaic.modalities["rna"].library[unmeasured] / others["rna"])[:, None]
    torch.testing.assert_close(found, 100 * own**0.5, rtol=0.05, atol=0.0)
    torch.testing.assert_close(blind, torch.full_like(blind, 100.0), rtol=0.05, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("n_pairs", [20, 600])
def test_few_pairs_suffice_and_many_lose_nothing(n_pairs):
    mosaic, hidden, _ = split(n_pairs, seed=1)
    found = {}
    for pull in (0.0, 20.0):
        model = MultiVI(mosaic, n_latent=8, linkage="cca", pull=pull)
        model.train(40, progress_bar=False)
        other = model.register(dict(hidden))
        unseen = {name: model.get_latent_representation(modality=name, data=other) for name in hidden}
        imputed = model.get_imputed_values("adt", hidden["adt"].obs_names, n_samples=None).mean
        rho = np.nanmean(metrics.imputation_spearman(hidden["adt"].to_df(), imputed, per="feature"))
        found[pull] = apart(model.get_latent_representation(), unseen), rho
    (without, poor), (pulled, rho) = found[0.0], found[20.0]
    if n_pairs == 20:
        assert pulled < 0.85 * without and rho > poor
    else:
        assert pulled < without + 0.01 and rho > poor - 0.02


def test_most_of_the_pull_fades_in_the_warm_up(few):
    mosaic, _, _ = few
    found = {}
    for name, pull in {"default": 20.0, "stays": Pull(20.0, fades=0.0)}.items():
        model = MultiVI(mosaic, n_latent=4, linkage="cca", pull=pull)
        model.train(4, kl_warmup_epochs=2, progress_bar=False, sleep_steps=0)
        found[name] = model.history["train_penalty/pull"].to_numpy()
        weight = model.history["kl_weight"].to_numpy()
    assert weight[0] < 1
    for each in found.values():
        assert (each > 0).all()
    last = weight == 1
    assert (found["default"][last] < 0.3 * found["stays"][last]).all()  # it has a tenth of the weight


@pytest.mark.slow
@pytest.mark.parametrize(("n_pairs", "gain"), [(30, 0.02), (90, 0.0)])
def test_few_pairs_separate_types_and_keep_a_private_one(n_pairs, gain):
    """By default, with few pairs: shared types are purer, one that a modality lacks is about as well apart."""
    whole, truth = simulate(600, {"rna": 120, "adt": 30}, types=5, patterns=["rna+adt"], separation=3.0, seed=14)
    types = pd.Series(np.asarray(truth.type), whole.obs_names)
    private = types.index[types == "type4"]  # without antibodies, and never a pair
    others = np.random.default_rng(14).permutation(types.index[types != "type4"])
    half = (len(others) + n_pairs) // 2
    cells = {"rna": [*others[:half], *private], "adt": [*others[:n_pairs], *others[half:]]}
    shown = MuData({k: whole[k][whole[k].obs_names.isin(v)].copy() for k, v in cells.items()})
    mosaic = Mosaic.from_mudata(shown, batch_key="batch")
    own = types[mosaic.obs_names].eq("type4").to_numpy()
    found = {}
    for option in (None, "auto"):
        model = MultiVI(mosaic, n_latent=8, linkage=option)
        model.train(60, progress_bar=False, sleep_steps=0)
        near = nearest(model.get_latent_representation().to_numpy(), 15)[1]
        codes = pd.factorize(types[mosaic.obs_names])[0]
        same = (codes[near] == codes[:, None]).mean(axis=1)
        found[option] = same[own].mean(), same[~own].mean()
    (private_without, without), (private_with, linked) = found[None], found["auto"]
    assert linked > without + gain and private_with > private_without - 0.05


@pytest.mark.slow
def test_few_pairs_keep_abundance():
    """A type that one condition lacks is found with few pairs too, as in `test_cells_of_a_missing_type_are_found`."""
    whole, truth = simulate(400, {"rna": 100, "adt": 30}, types=3, patterns=["rna+adt"], seed=11)
    shown, _ = hide(whole, dict.fromkeys(whole.mod, 175), seed=11)
    types = pd.Series(np.asarray(truth.type), whole.obs_names)
    condition = np.where((np.random.default_rng(11).random(400) < 0.5) | (types == "type0"), "a", "b")
    for part in shown.mod.values():
        part.obs["condition"] = pd.Series(condition, types.index)[part.obs_names]
    ratio = {}
    for option in (None, "auto"):
        model = MultiVI(Mosaic.from_mudata(shown), n_latent=5, linkage=option)
        model.train(60, progress_bar=False, sleep_steps=0)
        density = model.differential_abundance("condition")
        ratio[option] = (density["a"] - density["b"]).groupby(types[density.index]).median()
    assert ratio["auto"]["type0"] > max(3, ratio[None]["type0"] - 0.5)
    assert ratio["auto"].drop("type0").max() < 0.5


@pytest.mark.slow
def test_a_type_that_one_modality_lacks_stays_apart():
    """The scores hold only what the modalities share; a pull that stays puts the type among others."""
    private = {"type4": ["rna"]}
    patterns = ["rna+adt", "rna", "adt"]
    mdata, truth = simulate(600, {"rna": 120, "adt": 30}, patterns=patterns, private=private, separation=3.0, seed=1)
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    own = pd.Series(np.asarray(truth.type), mdata.obs_names)[mosaic.obs_names].eq("type4").to_numpy()
    found = {}
    for name, pull in {"without": 0.0, "default": 20.0, "stays": Pull(20.0, fades=0.0)}.items():
        model = MultiVI(mosaic, n_latent=8, linkage="cca", pull=pull)
        model.train(40, progress_bar=False, sleep_steps=0)
        near = nearest(model.get_latent_representation().to_numpy(), 15)[1]
        found[name] = own[near[own]].mean()
    assert found["default"] > found["without"] - 0.1 > found["stays"]
