import copy
import json
import subprocess
import sys
from dataclasses import replace

import anndata
import mudata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO

from pyromosaic import ModalitySpec, Mosaic, MultiVI, hide, metrics, pbmc_mosaic
from pyromosaic.data import loader, measured, split
from pyromosaic.distributions import NegativeBinomial, NegativeBinomialMixture
from pyromosaic.nn import Size
from pyromosaic.penalties import Jeffreys, discrepancy
from pyromosaic.train import MosaicELBO, NonFiniteLossError

QUIET = {"progress_bar": False, "accelerator": "cpu"}


def simulate(n_cells: int = 240, seed: int = 0) -> mudata.MuData:
    """Three modalities from four types in two batches; every pattern of presence occurs."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(4, size=n_cells), rng.integers(2, size=n_cells)
    obs = pd.DataFrame(
        {"batch": np.array(["a", "b"])[batch], "type": kind.astype(str)}, [f"c{i}" for i in range(n_cells)]
    )
    rna = rng.poisson(np.exp(rng.normal(0.3, 1.0, (4, 30)))[kind] * rng.gamma(4, 0.25, (n_cells, 1))) + (
        np.arange(30) == 0
    )
    atac = rng.random((n_cells, 50)) < rng.beta(1, 4, (4, 50))[kind]
    adt = rng.poisson(np.where(rng.random((4, 8)) < 0.5, 3.0, 60.0)[kind]) + 1
    pattern = np.arange(n_cells) % 7 + 1
    blocks = {"rna": rna, "atac": atac * rng.integers(1, 4, atac.shape), "adt": adt}
    return mudata.MuData(
        {
            name: anndata.AnnData(
                counts[pattern >> i & 1 == 1].astype(np.float32),
                obs=obs[pattern >> i & 1 == 1],
                var=pd.DataFrame(index=[f"{name}{j}" for j in range(counts.shape[1])]),
            )
            for i, (name, counts) in enumerate(blocks.items())
        }
    )


@pytest.fixture(scope="module")
def data() -> mudata.MuData:
    return simulate()


@pytest.fixture(scope="module")
def mosaic(data) -> Mosaic:
    return Mosaic.from_mudata(data, batch_key="batch", label_key="type")


def small(mosaic, **options) -> MultiVI:
    return MultiVI(mosaic, **{"n_latent": 4, "n_hidden": 16, "mmd": 5.0, **options})


@pytest.fixture(scope="module")
def trained(mosaic) -> MultiVI:
    model = small(mosaic)
    model.train(60, batch_size=64, kl_warmup_epochs=20, learning_rate=5e-3, **QUIET)
    return model


# The program


def test_sites_and_shapes_read_like_the_paper(mosaic):
    model = small(mosaic)
    cells = mosaic.find([f"c{i}" for i in range(35)])
    minibatch = measured(mosaic, cells)
    trace = poutine.trace(model.model).get_trace(minibatch)
    trace.compute_log_prob()
    shapes = {
        name: tuple(site["fn"].batch_shape + site["fn"].event_shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not name.endswith(("cells", "features"))
    }
    n = {name: len(view.rows) for name, view in minibatch.decoded.items()}
    assert shapes == {
        "z": (35, 1, 4),
        "rna": (n["rna"], 30),
        "atac": (n["atac"], 50),
        "adt_background": (n["adt"], 8),
        "adt": (n["adt"], 8),
    }
    assert n == {"rna": 20, "atac": 20, "adt": 20}
    assert {site["scale"] for name, site in trace.nodes.items() if name in shapes} == {mosaic.n_cells / 35}
    assert trace.nodes["rna"]["is_observed"] and not trace.nodes["z"]["is_observed"]


def test_loss_equals_the_formulas(mosaic):
    """Negative log-likelihoods, analytic divergences and the Jeffreys penalty, each written out again."""
    model = small(mosaic, left_out=0.0, jeffreys=3.0, mmd=7.0)
    minibatch = measured(mosaic, np.arange(0, 240, 5))
    beta, scale = 0.3, mosaic.n_cells / 48
    elbo = MosaicELBO()
    torch.manual_seed(1)
    loss = elbo.differentiable_loss(model.model, model.guide, minibatch, beta)
    torch.manual_seed(1)
    guide = poutine.trace(model.guide).get_trace(minibatch, beta)
    z, background = guide.nodes["z"]["value"][:, 0], guide.nodes["adt_background"]["value"]

    expected = {}
    posteriors = {name: model.guide.encoders[name](view) for name, view in minibatch.observed.items()}
    means, variances = torch.zeros(48, 4), torch.zeros(48, 4)
    jeffreys = 0.0
    for cell in range(48):
        own = [
            torch.distributions.Normal(*(p[(minibatch.observed[name].rows == cell).nonzero().item()] for p in q))
            for name, q in posteriors.items()
            if cell in minibatch.observed[name].rows
        ]
        means[cell] = sum(q.loc for q in own) / len(own)
        variances[cell] = sum(q.variance for q in own) / len(own) ** 2
        for i, p in enumerate(own):
            for q in own[i + 1 :]:
                jeffreys += (torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).sum()
    expected["penalty/jeffreys"] = 3.0 * jeffreys * scale
    loc = [q[0] for q in posteriors.values()]
    mmd = 0.0
    for i, x in enumerate(loc):
        for y in loc[i + 1 :]:
            n, m = len(x), len(y)
            width = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square().mean()

            def kernel(a, b, width=width):
                squared = torch.cdist(a, b).square()
                return sum((-squared / (c * width)).exp() for c in (0.125, 0.25, 0.5, 1.0)) / 4

            within = (kernel(x, x).sum() - n) / (n * (n - 1)) + (kernel(y, y).sum() - m) / (m * (m - 1))
            mmd += within - 2 * kernel(x, y).mean()
    expected["penalty/mmd"] = 7.0 * beta * mmd * mosaic.n_cells
    expected["z"] = beta * scale * 0.5 * (means**2 + variances - 1 - variances.log()).sum()

    def decode(side, name):
        view = minibatch.decoded[name]
        return view, side.decoders[name](z[view.rows], view)

    view, predictors = decode(model.model, "rna")
    theta = model.model.likelihoods["rna"].log_theta.exp()
    mu = view.counts.to_dense().sum(1, keepdim=True) * predictors["rate"].softmax(-1)
    expected["rna"] = -scale * NegativeBinomial(mu, theta).log_prob(view.counts.to_dense()).sum()

    view, predictors = decode(model.model, "atac")
    likelihood = model.model.likelihoods["atac"]
    p = predictors["accessibility"].sigmoid() * likelihood.region_logits.sigmoid()
    p = p * likelihood.cell_logits(view).sigmoid()
    opened = (view.counts.to_dense() > 0).float()
    expected["atac"] = -scale * (opened * p.log() + (1 - opened) * torch.log1p(-p)).sum()

    view, predictors = decode(model.model, "adt")
    likelihood = model.model.likelihoods["adt"]
    loc, log_scale = likelihood.background_loc, likelihood.background_log_scale
    batch = view.codes[:, 0]
    size = view.library / mosaic.modalities["adt"].schema.library
    low = size * background.exp()
    mixture = NegativeBinomialMixture(
        low, low * (1 + predictors["foreground"].exp()), likelihood.log_theta.exp(), predictors["mixing"]
    )
    expected["adt"] = -scale * mixture.log_prob(view.counts.to_dense()).sum()
    _, posterior = decode(model.guide, "adt")
    q = torch.distributions.Normal(posterior["loc"], posterior["log_scale"].exp())
    prior = torch.distributions.Normal(loc[batch], log_scale[batch].exp())
    expected["adt_background"] = beta * scale * torch.distributions.kl_divergence(q, prior).sum()

    assert set(elbo.terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(elbo.terms[name], value.detach(), rtol=2e-4, atol=1e-2, msg=name)
    torch.testing.assert_close(loss.detach(), sum(expected.values()).detach(), rtol=2e-4, atol=1e-2)


def test_elbo_and_gradients_are_those_of_pyro(mosaic):
    model = small(mosaic)
    minibatch = measured(mosaic, np.arange(60))
    results = []
    for elbo in (MosaicELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(model.model, model.guide, minibatch, 0.5)
        parameters = [*model.model.parameters(), *model.guide.parameters()]
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for ours, pyros in zip(*results, strict=True):
        torch.testing.assert_close(ours, pyros)


def test_elbo_names_a_site_that_is_missing_or_scaled_on_one_side(mosaic):
    model = small(mosaic)
    minibatch = measured(mosaic, np.arange(10))
    with pytest.raises(ValueError, match="'z'.*missing from the guide"), pyro.validation_enabled(False):
        MosaicELBO().loss(model.model, poutine.block(model.guide, hide=["z"]), minibatch)
    with pytest.raises(ValueError, match="'z' is scaled by .* in the model and .* in the guide"):
        MosaicELBO().loss(poutine.scale(model.model, scale=0.5), model.guide, minibatch)


def test_minibatches_estimate_the_whole_without_bias(mosaic):
    """The loss of the whole mosaic is the mean of the losses of its parts, each scaled to all cells."""
    model = small(mosaic, left_out=0.0)
    terms = []
    for part in (np.arange(240), *np.array_split(np.random.default_rng(0).permutation(240), 4)):
        elbo = MosaicELBO()
        torch.manual_seed(0)
        elbo.loss(model.model, model.guide, measured(mosaic, part))
        terms.append(elbo.terms)
    for name in ("z", "penalty/jeffreys"):  # these do not depend on the draw
        torch.testing.assert_close(
            torch.stack([t[name] for t in terms[1:]]).mean(), terms[0][name], rtol=1e-4, atol=1e-3
        )


def test_a_modality_without_a_cell_in_the_minibatch_is_skipped(mosaic):
    cells = np.flatnonzero(mosaic.patterns == "rna")
    minibatch = measured(mosaic, cells)
    assert set(minibatch.observed) == {"rna"}
    model = small(mosaic)
    elbo = MosaicELBO()
    assert np.isfinite(elbo.loss(model.model, model.guide, minibatch))
    assert set(elbo.terms) == {"z", "rna", "penalty/jeffreys", "penalty/mmd"}
    assert elbo.terms["penalty/jeffreys"] == 0


def test_leaving_modalities_out_changes_only_what_the_posterior_sees(mosaic):
    model = small(mosaic, left_out=1.0)
    minibatch = measured(mosaic, np.flatnonzero(mosaic.patterns == "rna+atac+adt"))
    model.guide.train()
    for module in model.guide.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    z = poutine.trace(model.guide).get_trace(minibatch).nodes["z"]["fn"].mean[:, 0]
    posteriors = torch.stack([p.loc for p in model.guide.posteriors(minibatch).values()])
    matches = torch.isclose(posteriors, z, atol=1e-6).all(-1)
    assert (matches.sum(0) == 1).all(), "each cell is represented by exactly one of its modalities"
    assert matches.any(1).all(), "and each modality by some cell"
    model.guide.eval()
    z = poutine.trace(model.guide).get_trace(minibatch).nodes["z"]["fn"].mean[:, 0]
    torch.testing.assert_close(z, posteriors.mean(0))


def test_discrepancy_is_zero_on_average_for_one_distribution_and_finite_when_collapsed():
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 30, 3, generator=rng) for _ in range(200)]
    same = torch.stack([discrepancy(x, y) for x, y in draws])
    assert abs(same.mean()) < 4 * same.std() / len(same) ** 0.5
    assert torch.stack([discrepancy(x, y + 1) for x, y in draws]).min() > same.mean() + 2 * same.std()
    point = torch.ones(4, 3, requires_grad=True)
    discrepancy(point, point.detach()).backward()
    assert torch.isfinite(point.grad).all()


def test_jeffreys_needs_two_modalities_and_is_symmetric(mosaic):
    model = small(mosaic)
    minibatch = measured(mosaic, np.arange(70))
    posteriors = model.guide.posteriors(minibatch)
    forward = Jeffreys()(posteriors, minibatch)
    backward = Jeffreys()(dict(reversed(posteriors.items())), minibatch)
    torch.testing.assert_close(forward, backward)
    assert forward > 0
    with pytest.raises(ValueError, match="at least 0"):
        Jeffreys(-1.0)


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
        60,
        batch_size=64,
        validation=0.2,
        learning_rate=5e-3,
        weight_decay=0.0,
        kl_warmup_epochs=0,
        schedule="constant",
        **QUIET,
    )
    plain = small(mosaic, jeffreys=0.0, mmd=0.0)
    plain.model.train(), plain.guide.train()
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": 5e-3}), TraceMeanField_ELBO())
    torch.manual_seed(3)
    minibatches = loader(mosaic, parts.train, 64, seed=5)
    for _ in range(60):
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
    for part in ("train", "validation"):
        sites = ["z", "rna", "atac", "adt", "adt_background"]
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
    model.train(300, early_stopping=3, **options, **QUIET)
    assert len(model.history) < 300
    best = model.history["validation_elbo"].idxmax()
    assert best == len(model.history) - 4
    again = small(mosaic)
    again.train(best + 1, **options, **QUIET)
    pd.testing.assert_frame_equal(model.get_latent_representation(), again.get_latent_representation())
    with pytest.raises(ValueError, match="early stopping looks at validation cells"):
        small(mosaic).train(2, validation=0.0, early_stopping=2, **QUIET)


def test_resume_from_a_checkpoint(mosaic, tmp_path):
    first = small(mosaic)
    first.train(3, batch_size=64, checkpoint_dir=str(tmp_path), **QUIET)
    second = small(mosaic)
    second.train(5, batch_size=64, resume_from=str(tmp_path / "last.ckpt"), **QUIET)
    assert list(second.history.index) == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(second.history.iloc[:3], first.history)


def test_a_loss_that_is_not_finite_names_the_site_and_keeps_good_parameters(mosaic):
    model = small(mosaic)
    model.train(1, **QUIET)
    model.model.likelihoods["rna"].register_forward_pre_hook(
        lambda module, inputs: inputs[1].update(rate=inputs[1]["rate"] * float("nan"))
    )
    good = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="'rna'"):
        model.train(1, **QUIET)
    assert all(torch.equal(v, good[k]) for k, v in model.model.state_dict().items())


def test_training_arguments_are_checked(mosaic):
    for arguments, message in [
        ({"n_epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"validation": 1.0}, "below 1 together"),
        ({"validation": -0.1}, "below 1 together"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(mosaic).train(**arguments, **QUIET)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "nb_mixture", "normal", "log1p_normal", "ziln", "zig"])
def test_any_likelihood_trains_and_predicts(data, likelihood):
    spec = {"adt": ModalitySpec(likelihood), "rna": "nb"}
    mosaic = Mosaic.from_anndata(dict(data.mod.items()), spec, match_cells=True)
    model = small(mosaic)
    before = MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(mosaic.n_cells)))
    model.train(15, batch_size=64, learning_rate=5e-3, **QUIET)
    after = MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(mosaic.n_cells)))
    assert after < before
    estimate = model.get_imputed_values("adt", n_samples=3)
    assert np.isfinite(estimate.mean.to_numpy()).all()
    truth = data["adt"].to_df()
    observed = estimate.mean.loc[truth.index]
    assert np.corrcoef(np.log1p(observed.mean()), np.log1p(truth.mean()))[0, 1] > 0.9


# Asking


def test_latent_representations(trained, mosaic):
    joint = trained.get_latent_representation()
    assert list(joint.index) == list(mosaic.obs_names) and joint.shape == (240, 4)
    rna = trained.get_latent_representation(modality="rna")
    present = mosaic.presence
    assert list(rna.index) == list(mosaic.obs_names[present["rna"]])
    only = mosaic.obs_names[mosaic.patterns == "rna"]
    np.testing.assert_allclose(rna.loc[only], joint.loc[only], atol=1e-6)
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    adt = trained.get_latent_representation(both, modality="adt")
    np.testing.assert_allclose((rna.loc[both] + adt) / 2, joint.loc[both], atol=1e-5)
    draws = [trained.get_latent_representation(sample=True, seed=seed) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2])
    assert metrics.label_purity(joint, mosaic.labels(), n_neighbors=10) > 0.8


def test_expected_values_follow_the_data(trained, mosaic, data):
    shares = trained.get_normalized_expression("rna")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)
    counts = data["rna"].to_df()
    own = trained.get_imputed_values("rna", counts.index, n_samples=2).mean
    np.testing.assert_allclose(own.sum(axis=1), counts.sum(axis=1), rtol=1e-3)
    assert metrics.imputation_spearman(counts, own) > 0.45
    accessibility = trained.get_accessibility_estimates()
    seen = trained.get_accessibility_estimates(factors=True)
    assert accessibility.shape == (240, 50) and (seen < accessibility).all().all() and (accessibility <= 1).all().all()
    foreground = trained.get_normalized_expression("adt", features=["adt3", "adt1"], cells=["c5", "c2"])
    assert list(foreground.index) == ["c5", "c2"] and list(foreground.columns) == ["adt3", "adt1"]


def test_size_of_unmeasured_cells_is_log_linear_in_the_latent_variable(mosaic):
    rng = torch.Generator().manual_seed(0)
    view = measured(mosaic, np.flatnonzero(mosaic.presence["adt"])).observed["adt"]
    z = torch.randn(len(view.rows), 3, generator=rng)
    slope, shift = torch.tensor([[0.5], [-1.0], [0.0]]), torch.tensor([[0.2], [-0.2]])
    size = Size(mosaic.schema["adt"], 3)
    unknown = replace(view, library=torch.full_like(view.library, float("nan")))
    torch.testing.assert_close(size(z, unknown).library, torch.full_like(view.library, mosaic.schema["adt"].library))
    truth = (6 + z @ slope + view.one_hot() @ shift).exp()
    size.fit(z, replace(view, library=truth))
    torch.testing.assert_close(size(z, unknown).library, truth, rtol=0.05, atol=0.0)
    assert size(z, view) is view


def test_imputed_counts_have_the_size_that_such_cells_have(trained, mosaic, data):
    """Cells of two types have few antibodies in all, cells of the other two many."""
    totals = data["adt"].to_df().sum(axis=1)
    types = mosaic.labels().astype(str)
    expected = totals.groupby(types[totals.index]).mean()
    unmeasured = mosaic.obs_names[~mosaic.presence["adt"]]
    imputed = trained.get_imputed_values("adt", unmeasured, n_samples=None).mean.sum(axis=1)
    by_type = imputed.groupby(types[unmeasured]).mean()
    np.testing.assert_allclose(by_type, expected, rtol=0.3)
    assert expected.max() / expected.min() > 1.3


def test_draws_are_independent_and_summarised(trained):
    estimate = trained.get_imputed_values("adt", n_samples=40, quantiles=(0.1, 0.5, 0.9))
    low, middle, high = (estimate.quantiles[q] for q in (0.1, 0.5, 0.9))
    assert ((low <= middle) & (middle <= high)).all().all()
    assert (estimate.sd.to_numpy() > 0).all() and (low < high).to_numpy().all()
    again = trained.get_imputed_values("adt", n_samples=40, quantiles=(0.1, 0.5, 0.9))
    pd.testing.assert_frame_equal(estimate.mean, again.mean)
    chunks = list(
        trained._draws("adt", None, None, None, None, 300, None, None, 0, lambda distribution: distribution.mean)
    )
    draws = torch.cat(chunks, dim=1).log().flatten(1)
    centred = draws - draws.mean(0)
    neighbours = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(neighbours) < 0.05


def test_posterior_predictive_has_the_models_moments(trained):
    cells = ["c0", "c1"]
    draws = trained.posterior_predictive_sample("rna", cells, n_samples=1500, library=500.0)
    assert draws.shape == (1500, 2, 30) and (draws == np.round(draws)).all()
    expected = trained.get_imputed_values("rna", cells, n_samples=400, library=500.0).mean.to_numpy()
    error = draws.std(0) / np.sqrt(1500)
    assert (np.abs(draws.mean(0) - expected) < 5 * error + 0.02 * expected + 0.01).all()
    opened = trained.posterior_predictive_sample("atac", cells, n_samples=5)
    assert set(np.unique(opened)) <= {0, 1}


def test_chunks_of_cells_do_not_matter(trained, monkeypatch):
    whole = trained.get_normalized_expression("rna")
    monkeypatch.setattr("pyromosaic.models.mosaic_model.CHUNK_ENTRIES", 30 * 7)
    pd.testing.assert_frame_equal(trained.get_normalized_expression("rna"), whole, rtol=1e-4)


def test_batches_can_be_exchanged(trained, mosaic):
    a, b, own = (trained.get_normalized_expression("rna", batch=batch) for batch in ("a", "b", None))
    is_a = (trained.mosaic.modalities["rna"].codes[:, 0] == 0) & mosaic.presence["rna"].to_numpy()
    pd.testing.assert_frame_equal(own[is_a], a[is_a])
    assert not np.allclose(a, b)


def test_inference_from_some_modalities_only(trained, mosaic):
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    from_rna = trained.get_imputed_values("adt", both, encode=["rna"], n_samples=3).mean
    assert not np.allclose(from_rna, trained.get_imputed_values("adt", both, n_samples=3).mean)
    with pytest.raises(ValueError, match="none of the modalities to infer from"):
        trained.get_imputed_values("adt", encode=["rna"])


def test_wrong_questions_get_a_sentence(trained, mosaic):
    for call, error, message in [
        (lambda: trained.get_latent_representation(modality="protein"), KeyError, "no modality 'protein'"),
        (lambda: trained.get_normalized_expression("rna", features=["CD4"]), ValueError, "no feature 'CD4'"),
        (lambda: trained.get_normalized_expression("rna", ["nobody"]), ValueError, "'nobody' is not in the mosaic"),
        (lambda: trained.get_normalized_expression("rna", batch="z"), ValueError, "no batch 'z'"),
        (lambda: trained.get_imputed_values("rna", n_samples=0), ValueError, "at least 1"),
        (lambda: trained.get_imputed_values("rna", n_samples=2, quantiles=[2.0]), ValueError, "between 0 and 1"),
        (lambda: trained.get_imputed_values("rna", []), ValueError, "no cell was asked for"),
        (lambda: MultiVI(mosaic.schema).train(1), ValueError, "has no data"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_asking_changes_nothing(trained):
    state = {k: v.clone() for k, v in trained.model.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trained.get_imputed_values("adt", n_samples=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, state[k]) for k, v in trained.model.state_dict().items())


# Keeping


def test_save_and_load_give_the_same_answers(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"weights.safetensors", "model.json"}
    loaded = MultiVI.load(tmp_path / "model", data)
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        trained.save(tmp_path / "model")
    trained.save(tmp_path / "model", overwrite=True)


def test_load_in_another_process(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    data.write(tmp_path / "data.h5mu")
    script = (
        "import sys, mudata; from pyromosaic import MultiVI\n"
        f"model = MultiVI.load({str(tmp_path / 'model')!r}, mudata.read_h5mu({str(tmp_path / 'data.h5mu')!r}))\n"
        f"model.get_latent_representation().to_csv({str(tmp_path / 'z.csv')!r})\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    z = pd.read_csv(tmp_path / "z.csv", index_col=0)
    np.testing.assert_allclose(z, trained.get_latent_representation(), atol=1e-5)


def test_load_puts_features_in_order_and_refuses_others(trained, data, tmp_path):
    trained.save(tmp_path / "model")
    mixed = {
        name: adata[::-1, np.random.default_rng(0).permutation(adata.n_vars)].copy() for name, adata in data.mod.items()
    }
    loaded = MultiVI.load(tmp_path / "model", mixed)
    pd.testing.assert_frame_equal(
        loaded.get_latent_representation().sort_index(), trained.get_latent_representation().sort_index(), atol=1e-5
    )
    mixed["rna"].var_names = [f"other{i}" for i in range(30)]
    with pytest.raises(ValueError, match="modality 'rna'.*missing: 'rna0'"):
        MultiVI.load(tmp_path / "model", mixed)
    mixed = {name: adata.copy() for name, adata in data.mod.items()}
    mixed["atac"].obs["batch"] = "new"
    with pytest.raises(ValueError, match="modality 'atac'.*'new'"):
        MultiVI.load(tmp_path / "model", mixed)


def test_damaged_and_foreign_files_are_refused(trained, tmp_path):
    trained.save(tmp_path / "good")

    def broken(change) -> None:
        target = tmp_path / "bad"
        trained.save(target, overwrite=True)
        change(target)
        with pytest.raises(ValueError, match="bad"):
            MultiVI.load(target)

    def edit(**changes):
        return lambda d: (d / "model.json").write_text(json.dumps(json.loads((d / "model.json").read_text()) | changes))

    broken(lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-100]))
    broken(lambda d: (d / "weights.safetensors").write_bytes(b"PK not a safetensors file at all"))
    broken(lambda d: (d / "weights.safetensors").unlink())
    broken(lambda d: (d / "model.json").write_text((d / "model.json").read_text()[:50]))
    broken(lambda d: (d / "model.json").write_text("[1, 2]"))
    broken(edit(**{"class": "DiagVI"}))
    broken(edit(format=99))
    broken(edit(options={"n_latent": 7}))
    broken(edit(options={"no_such_option": 7}))
    broken(edit(schema={"rna": {}}))


def test_objects_are_given_again_at_load(mosaic, tmp_path):
    class Wide(torch.nn.Module):
        def forward(self, minibatch):
            return pyro.distributions.StudentT(5.0, torch.zeros(len(minibatch), 1, 4), 1.0).to_event(1)

    model = small(mosaic, prior=Wide())
    model.train(1, **QUIET)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="give prior again"):
        MultiVI.load(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", prior=Wide())
    loaded.mosaic = mosaic
    pd.testing.assert_frame_equal(loaded.get_latent_representation(), model.get_latent_representation())


# The whole


def test_import_is_quick_and_pulls_in_nothing_optional():
    script = (
        "import time, torch, pyro; start = time.perf_counter(); import pyromosaic, sys; "
        "print(time.perf_counter() - start); "
        "optional = ('matplotlib', 'umap', 'lightning', 'geomloss', 'torch_geometric', 'scanpy'); "
        "print([m for m in optional if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split("\n")
    assert float(out[0]) < 1
    assert out[1] == "[]"


def test_pbmc_mosaic_integrates():
    """Sixty epochs on the packaged data already bring the modalities together and the types apart."""
    data, truth = hide(pbmc_mosaic(), {"adt": 200, "rna": 200}, seed=0)
    mosaic = Mosaic.from_mudata(data, batch_key="batch", label_key="celltype")
    model = MultiVI(mosaic)
    model.train(60, **QUIET)
    z, labels = model.get_latent_representation(), mosaic.labels()
    rna, adt = (mosaic.patterns == name for name in ("rna", "adt"))
    assert metrics.label_purity(z, labels) > 0.85
    assert metrics.label_transfer_accuracy(z[rna], labels[rna], z[adt], labels[adt], n_neighbors=15) > 0.8
    hidden = truth["rna"].X.toarray()
    imputed = model.get_imputed_values("rna", truth["rna"].obs_names, library=1.0, n_samples=5).mean
    assert metrics.imputation_spearman(hidden, imputed * hidden.sum(1, keepdims=True)) > 0.3
