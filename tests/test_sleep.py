"""The sleep phase: against exact posteriors, its loss written out, for every model, interrupted and resumed."""

import warnings

import anndata
import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, progress, simulate
from pyromosaic.data import loader, measured
from pyromosaic.penalties import Penalty
from pyromosaic.program import AtMean
from pyromosaic.train import NonFiniteLossError, sleep
from pyromosaic.train.drawn import draw_prior, drawn_minibatch, shared_variables, without_penalties

pytestmark = [
    pytest.mark.filterwarnings("ignore:the shared latent space carries only"),
    pytest.mark.filterwarnings("ignore:the guidance graph has few links"),
]
QUIET = {"progress_bar": False, "accelerator": "cpu"}


def made(name, **options):
    if name == "ContrastiveVI":
        mdata, _ = simulate(160, {"rna": 12, "adt": 8}, treated=0.5)
        mosaic = Mosaic.from_mudata(mdata, batch_key="batch").with_cohorts("condition", background="control")
        return ContrastiveVI(mosaic, n_latent=3, n_salient=2, **options)
    if name == "MultiVI":
        mdata, _ = simulate(160, {"rna": 12, "adt": 8})
        options = {"n_private": 1, "library": "latent"} | options
        return MultiVI(Mosaic.from_mudata(mdata, batch_key="batch"), n_latent=3, n_hidden=16, **options)
    mdata, truth = simulate(160, {"rna": 12, "adt": 8}, patterns=["rna", "adt"], links={"adt": 1.0})
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    kind = {"DiagVI": DiagVI, "ScModal": ScModal}[name]
    options = {"n_private": 1, "linkage": None} | options
    return kind(Mosaic.from_mudata(mdata, batch_key="batch"), links, n_latent=3, **options)


def minibatches(model):
    mosaic = model._data(None)
    index = mosaic.find(None)
    return loader(mosaic, index if mosaic.groups is None else index[mosaic.groups[index] >= 0], 64, seed=0)


class Affine(nn.Module):
    """Linear map to mean and standard deviation."""

    def __init__(self, n_features, n_latent):
        super().__init__()
        self.loc = nn.Linear(n_features, n_latent)
        self.log_scale = nn.Parameter(torch.full((n_latent,), -3.0))

    def forward(self, view):
        loc = self.loc(view.dense_counts())
        return loc, self.log_scale.exp().expand_as(loc)


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z, view):
        return {"loc": z @ self.weight.T}


def test_it_finds_the_exact_posterior_of_a_linear_model():
    rng = np.random.default_rng(0)
    weight, sigma = np.linalg.qr(rng.normal(size=(8, 2)))[0] * [1.5, 0.8], 0.7
    x = (rng.normal(size=(300, 2)) @ weight.T + sigma * rng.normal(size=(300, 8))).astype(np.float32)
    mosaic = Mosaic.from_anndata({"x": anndata.AnnData(x)}, {"x": ModalitySpec("normal")})
    model = MultiVI(mosaic, n_latent=2, prior="normal")
    part = model.model.modalities["x"]
    part.decoder, model.guide.modalities["x"].encoder = Linear(torch.tensor(weight).float()), Affine(8, 2)
    part.likelihood.log_sigma.data.fill_(np.log(sigma))
    losses = sleep(model.model, model.guide, minibatches(model), 300, 0.1)
    encoder, precision = model.guide.modalities["x"].encoder, 1 + np.array([1.5, 0.8]) ** 2 / sigma**2
    np.testing.assert_allclose(encoder.log_scale.exp().detach(), precision**-0.5, rtol=0.08)
    np.testing.assert_allclose(encoder.loc.weight.detach(), (weight / sigma**2 / precision).T, atol=0.06)
    entropy = (0.5 * np.log(2 * np.pi * np.e) - 0.5 * np.log(precision)).sum()  # of the exact posterior
    assert losses[-30:].mean() == pytest.approx(entropy, abs=0.1) and losses[0] > 10 * abs(entropy)


@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal"])
def test_the_loss_is_that_of_what_cells_were_drawn_with(name):
    """The first loss, of all latent variables of cells, written out; the model is left alone."""
    model = made(name, **({"left_out": 0.0} if name in ("MultiVI", "ContrastiveVI") else {}))
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    only = [measured(model._data(None), model._data(None).find(None))]
    guide_before = {k: v.clone() for k, v in model.guide.state_dict().items()}
    first = sleep(model.model, model.guide, only, 1, seed=3)[0]
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert any(not torch.equal(v, guide_before[k]) for k, v in model.guide.state_dict().items())
    model.guide.load_state_dict(guide_before)
    torch.manual_seed(3)
    with torch.no_grad(), pyro.validation_enabled(False), without_penalties(model.guide):
        shared = shared_variables(model.guide, only[0])
        drawn = draw_prior(model.model, only[0], shared)
        simulated = drawn_minibatch(model.model, only[0], drawn)
        nodes = poutine.trace(poutine.replay(model.guide, trace=drawn)).get_trace(simulated).nodes
    variables = {
        "MultiVI": ["z", "z_rna", "z_adt", "rna_library"],
        "ContrastiveVI": ["z", "s"],
        "DiagVI": ["z", "z_rna", "z_adt"],
        "ScModal": ["z", "z_rna", "z_adt"],
    }[name]
    expected = 0.0
    for variable in variables:
        site = nodes[variable]
        base = site["fn"]
        while not isinstance(base, torch.distributions.Normal):
            base = base.base_dist
        value = drawn.nodes[variable]["value"]
        log_q = torch.distributions.Normal(base.loc, base.scale).log_prob(value)
        if variable == "s":  # only target cells have it
            log_q = log_q[only[0].groups > 0]
        expected -= float(log_q.sum()) / len(only[0])
    assert first == pytest.approx(expected, rel=1e-4)


class Toward(Penalty):
    """Draws the means of measured cells towards 5."""

    name = "toward"

    def forward(self, posteriors, minibatch):
        return sum((q.loc - 5).square().mean() for q in posteriors.values())


def test_penalties_stay_in_the_loss_on_measured_cells():
    means = []
    for weight in (0.0, 100.0):
        model = made("MultiVI", mmd=0.0, jeffreys=0.0, penalties=[Toward(weight)])
        sleep(model.model, model.guide, minibatches(model), 15)
        means.append(float(model.get_latent_representation().to_numpy().mean()))
    assert means[1] > means[0] + 0.2


@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal"])
def test_every_model_sleeps_after_training(name):
    means, draws = [], []
    for steps in (0, 8, 8):
        model = made(name, adversary=1.0) if name == "MultiVI" else made(name)
        model.train(8, batch_size=64, sleep_steps=steps, **QUIET)
        history = model.history
        assert len(history) == 8 and ("sleep_after" in history) == (steps > 0)
        if steps:
            assert history["sleep_before"].notna().sum() == 1
        means.append(model.get_latent_representation().to_numpy())
        draws.append(model.get_latent_representation(sample=True).to_numpy())
        modes = {module.training for part in (model.model, model.guide) for module in part.modules()}
        assert modes == {False} and all(p.requires_grad for p in model.model.parameters())
    assert np.array_equal(draws[1], draws[2]) and not np.array_equal(draws[0], draws[1])
    assert np.array_equal(means[0], means[1]) == (name != "MultiVI")  # in the other models only widths change


def test_points_and_untrainable_guides_are_left_as_they_are():
    model = made("ScModal", deterministic=True, n_private=0)
    model.train(1, sleep_steps=200, **QUIET)
    assert "sleep_after" not in model.history
    before = {k: v.clone() for k, v in model.guide.state_dict().items()}
    assert len(sleep(model.model, model.guide, minibatches(model), 3)) == 0
    assert len(sleep(model.model, model.guide, minibatches(model), 3, means=False)) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.guide.state_dict().items())
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="sleep_steps must be a whole number"):
            model.train(1, sleep_steps=wrong, **QUIET)


def test_it_is_shown_and_as_long_as_training_at_most(capsys, monkeypatch):
    monkeypatch.setattr(progress, "MINUTE", 0.0)
    model = made("MultiVI")
    with warnings.catch_warnings(action="ignore"):
        model.train(2, batch_size=64, sleep_steps=200, progress_bar=True, accelerator="cpu")
    assert "Training, widths of posteriors: 100%" in capsys.readouterr().err


class Stops:
    """Minibatches, then Ctrl-C."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        yield from self.batches
        raise KeyboardInterrupt


def test_an_interrupted_phase_leaves_the_guide_and_is_gone_through_by_a_resumed_run(tmp_path, monkeypatch):
    whole, without, stopped, resumed = (made("MultiVI") for _ in range(4))
    whole.train(4, batch_size=64, sleep_steps=200, **QUIET)
    without.train(4, batch_size=64, sleep_steps=0, **QUIET)
    calls, own = [], MultiVI.loader

    def third_stops(self, *args, **kwargs):
        calls.append(own(self, *args, **kwargs))
        return Stops(calls[-1]) if len(calls) == 3 else calls[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiVI, "loader", third_stops)
        stopped.train(4, batch_size=64, sleep_steps=200, checkpoint_dir=tmp_path, **QUIET)
    assert len(stopped.history) == 4 and "sleep_after" not in stopped.history
    resumed.train(4, batch_size=64, sleep_steps=200, resume_from=tmp_path, **QUIET)
    for one, other in ((without, stopped), (whole, resumed)):
        for part in ("model", "guide"):
            state = getattr(other, part).state_dict()
            assert all(torch.equal(v, state[k]) for k, v in getattr(one, part).state_dict().items())
    assert whole.history.equals(resumed.history)
    with pytest.raises(ValueError, match="sleep_steps=200; found 0"):
        made("MultiVI").train(4, batch_size=64, sleep_steps=0, resume_from=tmp_path, **QUIET)


def test_a_loss_that_is_not_finite_is_said():
    model = made("MultiVI")
    with torch.no_grad():
        next(iter(model.model.modalities["rna"].decoder.parameters())).fill_(torch.nan)
    before = {k: v.clone() for k, v in model.guide.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="parameters that are not finite"):
        sleep(model.model, model.guide, minibatches(model), 3)
    assert all(torch.equal(v, before[k]) for k, v in model.guide.state_dict().items())


@pytest.mark.parametrize("name", ["MultiVI", "ContrastiveVI", "DiagVI", "ScModal"])
def test_means_may_be_left_as_they_are(name):
    model = made(name)
    only = [measured(model._data(None), model._data(None).find(None))]

    def moments():
        with torch.no_grad(), without_penalties(model.guide), AtMean():
            nodes = poutine.trace(model.guide).get_trace(only[0]).nodes
        return {k: (nodes[k]["fn"].mean, nodes[k]["fn"].stddev) for k in nodes if k == "z" or k == "s" or k[:2] == "z_"}

    before = moments()
    losses = sleep(model.model, model.guide, only, 60, means=False)
    assert losses[-10:].mean() < losses[:10].mean()
    for site, (mean, sd) in moments().items():
        assert torch.equal(mean, before[site][0])
        assert not torch.equal(sd, before[site][1])


def test_widths_of_a_rare_modality_are_fitted_too():
    """The first minibatch lacks it."""
    model = made("ContrastiveVI")
    mosaic = model._data(None)
    kinds = [np.flatnonzero(mosaic.patterns == kind) for kind in ("rna", "adt")]
    several = [measured(mosaic, cells) for cells in kinds]
    head = {name: model.guide.modalities[name].encoder.z.log_variance for name in ("rna", "adt")}
    before = {name: [p.clone() for p in layer.parameters()] for name, layer in head.items()}
    sleep(model.model, model.guide, several, 6, means=False)
    for name, layer in head.items():
        assert not any(torch.equal(a, b) for a, b in zip(layer.parameters(), before[name], strict=True))
