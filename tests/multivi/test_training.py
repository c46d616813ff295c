"""Training of MultiVI."""

import copy

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from mosaics import QUIET, small
from pyro.infer import SVI, TraceMeanField_ELBO

from pyromosaic import ModalitySpec, Mosaic, MultiVI
from pyromosaic.data import loader, measured, split
from pyromosaic.train import MosaicELBO, NonFiniteLossError, Optimisation, Plan

# Training


def test_plain_svi_reaches_the_same_held_out_elbo(mosaic):
    parts = split(mosaic, 0.2, seed=0)
    held_out = measured(mosaic, parts.validation)

    def evaluate(model: MultiVI) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [MosaicELBO().loss(model.model, model.guide, held_out) for _ in range(20)]
        return -np.mean(losses) / held_out.n_cells

    ours = small(mosaic, jeffreys=0.0, mmd=0.0)
    before = evaluate(ours)
    ours.train(
        30,
        batch_size=64,
        validation=0.2,
        learning_rate=1e-2,
        weight_decay=0.0,
        kl_warmup_epochs=0,
        schedule="constant",
        sleep_steps=0,
        **QUIET,
    )
    plain = small(mosaic, jeffreys=0.0, mmd=0.0)
    plain.model.train(), plain.guide.train()
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    torch.manual_seed(3)
    minibatches = loader(mosaic, parts.train, 64, seed=5)
    for _ in range(30):
        for minibatch in minibatches:
            svi.step(minibatch)
    plain.model.eval(), plain.guide.eval()
    gain = evaluate(ours) - before
    assert gain > 5
    assert abs(evaluate(plain) - evaluate(ours)) < 0.05 * gain
    assert len(pyro.get_param_store()) == 0


def test_two_models_train_interleaved_as_if_alone(mosaic):
    alone = []
    for seed in (0, 1):
        model = small(mosaic, seed=seed)
        model.train(2, batch_size=64, seed=seed, **QUIET)
        alone.append(model.get_latent_representation())
    first, second = small(mosaic, seed=0), small(mosaic, seed=1)
    second.train(2, batch_size=64, seed=1, **QUIET)
    untouched = {k: v.clone() for k, v in second.model.state_dict().items()}
    first.train(2, batch_size=64, seed=0, **QUIET)
    for model, expected in zip((first, second), alone, strict=True):
        pd.testing.assert_frame_equal(model.get_latent_representation(), expected)
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, untouched[name])


def test_steps_of_two_models_and_a_users_program_do_not_mix(mosaic):
    models = [small(mosaic, seed=seed) for seed in (0, 1)]
    minibatch = measured(mosaic, np.arange(40))

    def users_model(x):
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("x", pyro.distributions.Normal(loc, 1.0), obs=x)

    svis = [SVI(m.model, m.guide, pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO()) for m in models]
    users = SVI(users_model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    before = [copy.deepcopy(m.model.state_dict()) for m in models]
    for _ in range(2):
        svis[0].step(minibatch)
        users.step(torch.ones(()))
    assert set(pyro.get_param_store().keys()) == {"loc"}
    assert any(not torch.equal(v, before[0][k]) for k, v in models[0].model.state_dict().items())
    assert all(torch.equal(v, before[1][k]) for k, v in models[1].model.state_dict().items())
    pyro.clear_param_store()


def test_same_seed_same_numbers(mosaic):
    frames = []
    for _ in range(2):
        model = small(mosaic)
        model.train(2, batch_size=64, **QUIET)
        frames.append(model.history)
        torch.rand(7)  # the caller's random numbers play no part
    pd.testing.assert_frame_equal(*frames)


def test_training_leaves_the_callers_random_numbers_alone(mosaic):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    small(mosaic).train(1, **QUIET)
    assert torch.equal(torch.rand(3), expected)


def test_history_has_every_term(trained):
    history = trained.history
    assert len(history) == 60 and history.index.name == "epoch"
    seen = history["validation_elbo"].notna()
    assert list(history.index[seen]) == list(range(2, 60, 3))  # some 20 times, and at the end
    assert history[["sleep_before", "sleep_after"]].notna().sum().eq(1).all()  # in the last row
    history = history.drop(columns=["sleep_before", "sleep_after"])
    assert history.loc[seen].notna().all(axis=None) and history["train_elbo"].notna().all()
    history = history[seen]
    for part in ("train", "validation"):
        sites = ["z", "rna", "atac", "adt"]
        elbo = -history[[f"{part}_{site}" for site in sites]].sum(axis=1)
        np.testing.assert_allclose(history[f"{part}_elbo"], elbo, rtol=1e-4)
        objective = -history["validation_elbo"] + history["validation_penalty/jeffreys"]
        objective = objective + history["validation_penalty/mmd"]
    np.testing.assert_allclose(history["validation_objective"], objective, rtol=1e-4)
    assert history["kl_weight"].iloc[0] < 1 and history["kl_weight"].iloc[-1] == 1
    assert history["train_objective"].iloc[-1] < history["train_objective"].iloc[5]


def test_early_stopping_returns_to_the_best_epoch(mosaic):
    model = small(mosaic)
    options = {
        "batch_size": 64,
        "learning_rate": 0.05,
        "kl_warmup_epochs": 0,
        "schedule": "constant",
        "validation": 0.3,
    }
    model.train(300, early_stopping=3, sleep_steps=0, **options, **QUIET)
    assert len(model.history) < 300
    best = model.history["validation_elbo"].idxmax()
    assert best == len(model.history) - 4
    again = small(mosaic)
    again.train(best + 1, sleep_steps=0, **options, **QUIET)
    pd.testing.assert_frame_equal(model.get_latent_representation(), again.get_latent_representation())
    with pytest.raises(ValueError, match="early stopping needs validation cells"):
        small(mosaic).train(2, validation=0.0, early_stopping=2, **QUIET)


def test_early_stopping_on_reconstruction(mosaic):
    model = small(mosaic)
    options = {"batch_size": 64, "learning_rate": 0.05, "schedule": "constant", "validation": 0.3}
    model.train(300, early_stopping=3, monitor="reconstruction", kl_warmup_epochs=0, **options, **QUIET)
    history = model.history
    sites = ["rna", "atac", "adt"]
    np.testing.assert_allclose(
        history["validation_reconstruction"], history[[f"validation_{s}" for s in sites]].sum(axis=1), rtol=1e-5
    )
    assert len(history) < 300 and history["validation_reconstruction"].idxmin() == len(history) - 4
    with pytest.raises(ValueError, match="'elbo' or 'reconstruction'; found 'loss'"):
        model.train(1, early_stopping=1, monitor="loss", **QUIET)


def test_presets_are_options_of_model_and_training(mosaic):
    options, training = MultiVI.presets["paper"]
    model = MultiVI(mosaic, **options)
    assert model.options["n_hidden"] is None
    encoder = model.guide.modalities["rna"].encoder
    assert encoder.hidden[0].out_features == 7 and encoder.loc.out_features == 2  # of 50 regions
    assert encoder.hidden[0].in_features == 30  # no covariates
    model.train(**training | {"n_epochs": 3}, **QUIET)
    assert {"train_rna_library", "train_penalty/adversary"} <= set(model.history)
    assert "train_penalty/mmd" not in model.history


def test_a_loss_that_is_not_finite_names_the_site_and_keeps_good_parameters(mosaic):
    model = small(mosaic)
    model.train(1, **QUIET)
    model.model.modalities["rna"].likelihood.register_forward_pre_hook(
        lambda module, inputs: inputs[1].update(rate=inputs[1]["rate"] * float("nan"))
    )
    good = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="'rna'"):
        model.train(1, **QUIET)
    assert all(torch.equal(v, good[k]) for k, v in model.model.state_dict().items())


def test_training_arguments_are_checked(mosaic):
    for arguments, message in [
        ({"n_epochs": 0}, "n_epochs must be a whole number from 1"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1"),
        ({"validation": 1.0}, "below 1"),
        ({"validation": -0.1}, "below 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(mosaic).train(**arguments, **QUIET)


@pytest.mark.filterwarnings("ignore:.*all values are whole numbers from 0")
@pytest.mark.parametrize("likelihood", ["nb", "zinb", "nb_mixture", "normal", "log1p_normal", "ziln", "zig"])
def test_any_likelihood_trains_and_predicts(data, likelihood):
    spec = {"adt": ModalitySpec(likelihood), "rna": "nb"}
    mosaic = Mosaic.from_anndata(dict(data.mod.items()), spec, match_cells=True)
    model = small(mosaic)
    before = MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(mosaic.n_cells)))
    model.train(15, batch_size=64, learning_rate=5e-3, **QUIET)
    after = MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(mosaic.n_cells)))
    assert after < before
    estimate = model.get_imputed_values("adt")
    assert np.isfinite(estimate.mean.to_numpy()).all()
    truth = data["adt"].to_df()
    observed = estimate.mean.loc[truth.index]
    assert np.corrcoef(np.log1p(observed.mean()), np.log1p(truth.mean()))[0, 1] > 0.9


def test_parameters_of_likelihoods_have_a_rate_of_their_own(mosaic):
    model = small(mosaic)
    own = {id(p) for part in model.model.modalities for p in model.model.modalities[part].likelihood.parameters()}
    for rate, settings in ((10.0, [(3e-3, 1e-3), (3e-2, 0.0)]), (1.0, [(3e-3, 1e-3)])):
        optimisation = Optimisation(likelihood_rate=rate, schedule="constant")
        groups = Plan(model.model, model.guide, optimisation, 3).configure_optimizers().param_groups
        assert np.allclose([(g["lr"], g["weight_decay"]) for g in groups], settings)
        if rate > 1:
            assert {id(p) for p in groups[1]["params"]} == own and own
            assert not own & {id(p) for p in groups[0]["params"]}
        n = sum(len(g["params"]) for g in groups)
        assert n == sum(1 for part in (model.model, model.guide) for _ in part.parameters())
    with pytest.raises(ValueError, match="likelihood_rate.*found 0"):
        model.train(1, likelihood_rate=0, **QUIET)
