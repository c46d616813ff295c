"""Whatever Pyro does with a program it does with every model's."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import optim, poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.data import measured, to_predict
from pyromosaic.labels import Labels
from pyromosaic.likelihoods import NB
from pyromosaic.priors import GaussianMixture
from pyromosaic.program import unannounced
from pyromosaic.train import MosaicELBO

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")
LINKS = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
MODELS = ("MultiVI", "DiagVI", "ContrastiveVI", "ScModal")


@pytest.fixture(scope="module")
def data():
    return simulate(90, {"rna": 30, "adt": 6}, treated=0.5, seed=3)[0]


def build(name, data):
    mosaic = Mosaic.from_mudata(data, batch_key="batch")
    if name == "MultiVI":
        return MultiVI(mosaic, n_latent=4, n_hidden=16)
    if name == "ContrastiveVI":
        return ContrastiveVI(
            mosaic.with_cohorts("condition", background="control"), n_latent=4, n_salient=3, n_hidden=16
        )
    return {"DiagVI": DiagVI, "ScModal": ScModal}[name](
        mosaic, LINKS, n_latent=4, n_private=2, n_hidden=16, linkage=None
    )


@pytest.fixture(params=MODELS)
def model(request, data):
    return build(request.param, data)


def whole(model):
    mosaic = model._data(None)
    return measured(mosaic, mosaic.find(None))


def parameters(*programs):
    return {
        (i, k): v.detach().clone()
        for i, program in enumerate(programs)
        for k, v in program.named_parameters()
        if v.numel()
    }


# Traces and graphs


def sites(trace):
    """Batch and event shape of the sites that are no plate."""
    return {
        name: (tuple(site["fn"].batch_shape), tuple(site["fn"].event_shape))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and hasattr(site["fn"], "event_shape")
    }


def test_traces_read_like_the_papers(model):
    minibatch = whole(model)
    n, b = len(minibatch), {k: len(v.rows) for k, v in minibatch.decoded.items()}
    trace = poutine.trace(model.model).get_trace(minibatch)
    expected = {
        "z": ((n, 1), (4,)),
        "rna": ((b["rna"], 30), ()),
        "adt": ((b["adt"], 6), ()),
    }
    if isinstance(model, DiagVI):
        expected |= {"v": ((36,), (4,)), "edges": ((2 * (12 + 36),), ())}
    if isinstance(model, DiagVI | ScModal):
        expected |= {"z_rna": ((b["rna"], 1), (2,)), "z_adt": ((b["adt"], 1), (2,))}
    if isinstance(model, ContrastiveVI):
        expected |= {"s": ((n, 1), (3,))}
    assert sites(trace) == expected
    text = trace.format_shapes()
    assert all(f"{plate} dist" in text for plate in ("cells", "rna_cells", "rna_features", "adt_cells"))
    latent = {name for name in expected if not trace.nodes[name]["is_observed"]}
    assert latent == expected.keys() - {"rna", "adt", "edges"}
    guide = sites(poutine.trace(model.guide).get_trace(minibatch))
    assert {name for name in guide if not name.startswith("penalty/")} == latent
    assert all(guide[name] == expected[name] for name in latent)


def test_the_graph_has_plates_and_sites(model):
    minibatch = whole(model)
    source = pyro.render_model(model.model, model_args=(minibatch,), render_distributions=True).source
    for part in ("cluster_cells", "cluster_rna_cells", "cluster_rna_features", "z -> rna", "z -> adt"):
        assert part in source
    assert "rna ~ NegativeBinomial" in source
    assert "penalty" not in source  # the model is a proper joint density
    if isinstance(model, DiagVI):
        assert "v -> rna" in source and "v -> edges" in source
    if isinstance(model, ContrastiveVI):
        assert "s -> rna" in source


# Predictions and counterfactuals


@pytest.mark.parametrize("parallel", [False, True])
def test_prior_and_posterior_predictive(model, parallel):
    mosaic = model._data(None)
    minibatch = to_predict(mosaic, mosaic.find(None)[:8], ("rna", "adt"))
    prior = Predictive(model.model, num_samples=50, parallel=parallel)(minibatch)
    posterior = Predictive(model.model, guide=model.guide, num_samples=50, parallel=parallel)(minibatch)
    for drawn in (prior, posterior):
        assert drawn["rna"].shape == (50, 8, 30) and drawn["adt"].shape == (50, 8, 6)
        assert drawn["z"].shape == (50, 8, 1, 4)
    q = poutine.trace(model.guide).get_trace(minibatch).nodes["z"]["fn"]
    error = posterior["z"].mean(0) - q.mean
    assert (error.abs() < 5 * q.stddev / 50**0.5).all()
    wider = 2**0.5 - 1 if isinstance(model, MultiVI) else 0  # before training, a mixture of normals at random places
    assert prior["z"].mean().abs() < 0.2 and abs(prior["z"].std() - 1 - wider) < 0.2


def test_condition_scores_a_value_and_do_does_not(model):
    minibatch = whole(model)
    z = torch.ones(len(minibatch), 1, 4)
    conditioned = poutine.trace(pyro.condition(model.model, {"z": z})).get_trace(minibatch)
    done = poutine.trace(poutine.do(model.model, {"z": z})).get_trace(minibatch)
    site = conditioned.nodes["z"]
    assert site["is_observed"] and torch.equal(site["value"], z)
    assert not done.nodes["z"]["is_observed"] and not torch.equal(done.nodes["z"]["value"], z)  # its story is cut off
    means = []
    for value in (z, -z):  # all but z and the measurements as they were drawn
        rest = {k: done.nodes[k]["value"] for k in done.stochastic_nodes if k != "z"}
        changed = poutine.do(pyro.condition(model.model, rest), {"z": value})
        means.append(poutine.trace(changed).get_trace(minibatch).nodes["rna"]["fn"].mean)
    assert not torch.allclose(*means)  # what follows from z follows the intervention


# Bounds and optimisers


def test_parameters_are_announced_unless_the_optimiser_has_them(model):
    def announced():
        return {
            n for n, site in poutine.trace(model.model).get_trace(whole(model)).nodes.items() if site["type"] == "param"
        }

    everything = announced()
    with unannounced():
        few = announced()
    assert few < everything == announced()
    assert any("decoder" in name for name in everything - few)


@pytest.mark.parametrize("bound", [Trace_ELBO, TraceMeanField_ELBO, MosaicELBO, RenyiELBO])
def test_svi_moves_every_parameter(model, bound):
    svi = SVI(model.model, model.guide, optim.ClippedAdam({"lr": 1e-2}), bound())
    own = {p for m in model.guide.modules() if hasattr(m, "optimiser") for p in m.parameters()}
    elsewhere = {(1, k) for k, p in model.guide.named_parameters() if p in own}
    if isinstance(model, DiagVI):  # without pairing no cell has two modalities
        elsewhere |= {(1, "fusion.width.tenth_of_log")}
    before = parameters(model.model, model.guide)
    for _ in range(2):
        assert np.isfinite(svi.step(whole(model)))
    after = parameters(model.model, model.guide)
    assert {k for k in before if torch.equal(before[k], after[k])} <= elsewhere


def test_particles_at_once_and_one_by_one(model):
    minibatch = whole(model)

    def loss(bound, **options):
        pyro.set_rng_seed(0)
        svi = SVI(model.model, model.guide, optim.Adam({}), bound(num_particles=30, **options))
        return svi.evaluate_loss(minibatch)

    at_once = {"vectorize_particles": True, "max_plate_nesting": 2}
    elbo = loss(Trace_ELBO, **at_once)
    assert elbo == pytest.approx(loss(Trace_ELBO), rel=0.02)
    assert loss(RenyiELBO, alpha=0.0, **at_once) < elbo  # importance weights make the bound tighter


# Global latent variables


class Scaled(NB):
    """NB with a positive, global, hierarchical scale of the dispersions."""

    def __init__(self, schema):
        super().__init__(schema)
        n = schema.n_features
        self.spread = PyroSample(dist.HalfNormal(1.0))
        self.log_theta = PyroSample(lambda self: dist.Normal(0.0, self.spread).expand([n]).to_event(1))


def scaled(data, **options):
    return MultiVI(Mosaic.from_mudata(data, {"rna": ModalitySpec(Scaled)}), n_latent=3, n_hidden=16, **options)


def test_global_variables_are_drawn_once_outside_every_plate(data):
    model = scaled(data)
    trace = poutine.trace(model.model).get_trace(whole(model))
    for name, shape in (("modalities.rna.likelihood.spread", ()), ("modalities.rna.likelihood.log_theta", (30,))):
        site = trace.nodes[name]
        assert site["cond_indep_stack"] == () and site["scale"] == 1.0
        assert tuple(site["value"].shape) == shape
    assert torch.equal(
        trace.nodes["rna"]["fn"].theta, trace.nodes["modalities.rna.likelihood.log_theta"]["value"].exp()
    )


def test_the_bound_of_an_automatic_guide_has_the_density_of_its_transform(data):
    model = scaled(data)
    losses = []
    for bound in (MosaicELBO(), Trace_ELBO()):
        pyro.set_rng_seed(0)
        losses.append([bound.loss(model.model.globals, model.guide.globals) for _ in range(20)])
    # No divergence of these sites has a formula that is used, so the same draws give the same numbers.
    assert np.allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("automatic", [None, AutoMultivariateNormal])
def test_posterior_of_global_variables_is_returned_saved_and_loaded(data, automatic, tmp_path):
    model = scaled(data)
    if automatic is not None:
        model.guide.global_posterior = automatic(model.model.globals)
        model.guide.globals()
    before = parameters(model.guide.global_posterior)
    model.train(2, progress_bar=False)
    after = parameters(model.guide.global_posterior)
    assert not any(torch.equal(before[k], after[k]) for k in before)
    table = model.get_global_posterior(300, quantiles=(0.5,))
    theta = table.loc["modalities.rna.likelihood.log_theta"]
    assert (
        len(theta) == 30 and (theta["sd"] > 0).all() and (table.loc["modalities.rna.likelihood.spread", 0.5] > 0).all()
    )
    if automatic is None:
        posterior = model.guide.global_posterior
        loc = posterior.locs.modalities.rna.likelihood.log_theta.detach().numpy()
        sd = posterior.scales.modalities.rna.likelihood.log_theta.detach().numpy()
        assert np.allclose(theta["mean"], loc, atol=4 * sd.max() / 300**0.5)
        assert np.allclose(theta["sd"], sd, rtol=0.25)
        model.save(tmp_path)
        again = MultiVI.load(tmp_path, Scaled=Scaled)
        pd.testing.assert_frame_equal(again.get_global_posterior(20), model.get_global_posterior(20))
        with pytest.raises(ValueError, match="pass Scaled=<object> to load"):
            MultiVI.load(tmp_path)


class ScaledForPredictive(NB):
    """The same, with two event dimensions, as docs/extending.md asks for Pyro's `Predictive`."""

    def __init__(self, schema):
        super().__init__(schema)
        n = schema.n_features
        self.spread = PyroSample(dist.HalfNormal(1.0))
        self.log_theta = PyroSample(lambda self: dist.Normal(0.0, self.spread).expand([1, n]).to_event(2))


@pytest.mark.parametrize("likelihood", [Scaled, ScaledForPredictive])
def test_hierarchical_global_variables_in_predictions(data, likelihood):
    model = MultiVI(Mosaic.from_mudata(data, {"rna": ModalitySpec(likelihood)}), n_latent=3, n_hidden=16)
    minibatch = to_predict(model.mosaic, np.arange(20), ("rna",))
    assert model.posterior_predictive_sample("rna", n_samples=3).shape == (3, model.mosaic.n_cells, 30)
    for parallel in (False, True):
        predictive = Predictive(model.model, guide=model.guide, num_samples=3, parallel=parallel)
        if likelihood is ScaledForPredictive and not parallel:
            drawn = predictive(minibatch)
            assert drawn["rna"].shape == (3, 20, 30)
            spread, theta = (drawn[f"modalities.rna.likelihood.{name}"] for name in ("spread", "log_theta"))
            assert len(spread.unique()) == 3 and len(theta.unique()) == 90  # each draw has other values
        else:  # an error, never measurements of a wrong shape
            with pytest.raises(RuntimeError, match="expand"):
                predictive(minibatch)


def test_a_model_without_global_variables_says_so(model):
    with pytest.raises(ValueError, match="no global latent variable"):
        model.get_global_posterior(2)


class Effects(PyroModule):
    """A decoder of any model with a global variable."""

    def __init__(self, schema, predictors, n_latent, n_hidden=0, n_layers=0):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(n_latent, schema.n_features) for name in predictors})
        self.effect = PyroSample(dist.Normal(0.0, 1.0).expand([schema.n_features]).to_event(1))

    def start(self, biases):
        pass

    def forward(self, z, view):
        return {name: head(z) + self.effect for name, head in self.heads.items()}


@pytest.mark.parametrize("name", ["ContrastiveVI", "ScModal"])
def test_decoders_with_global_variables_in_other_models(name, data):
    mosaic = Mosaic.from_mudata(data, batch_key="batch").with_cohorts("condition", background="control")
    options = {"n_latent": 4, "n_hidden": 16, "decoder": Effects}
    if name == "ScModal":  # whose cycle would draw the effects in the guide
        model = ScModal(mosaic, LINKS, linkage=None, cycle=0.0, **options)
    else:
        model = ContrastiveVI(mosaic, **options)
    model.train(1, progress_bar=False)
    assert {"modalities.rna.decoder.effect", "modalities.adt.decoder.effect"} == set(
        model.get_global_posterior(5).index.levels[0]
    )


# The guide against other inference


class Linear(nn.Module):
    def __init__(self, schema, predictors, n_latent, n_hidden, n_layers):
        super().__init__()
        self.loc = nn.Linear(n_latent, schema.n_features)

    def start(self, biases):
        self.loc.bias.copy_(biases["loc"])

    def forward(self, z, view):
        return {"loc": self.loc(z)}


@pytest.mark.slow
def test_the_guide_agrees_with_nuts_and_with_the_formula():
    values, _ = simulate(200, {"x": 15}, likelihoods={"x": "normal"}, n_latent=2, n_batches=1, seed=0)
    mosaic = Mosaic.from_mudata(values, {"x": "normal"})
    model = MultiVI(mosaic, n_latent=2, n_hidden=64, decoder=Linear, dropout=0.0)
    model.train(80, batch_size=32, kl_warmup_epochs=0, validation=0.0, progress_bar=False)
    minibatch = measured(mosaic, mosaic.find(None))
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model.model, max_tree_depth=4), num_samples=100, warmup_steps=30, disable_progbar=True)
    mcmc.run(minibatch)
    sampled = mcmc.get_samples()["z"][:, :, 0].detach()
    with torch.no_grad():  # x = W z + b + noise
        w, b = model.model.modalities["x"].decoder.loc.weight, model.model.modalities["x"].decoder.loc.bias
        precision = model.model.modalities["x"].likelihood.log_sigma.mul(-2).exp()
        covariance = torch.linalg.inv(torch.eye(2) + (w.T * precision) @ w)
        mean = (minibatch.observed["x"].dense_counts() - b) * precision @ w @ covariance
        encoded = poutine.trace(model.guide).get_trace(minibatch).nodes["z"]["fn"]
        inferred, spread = encoded.mean[:, 0], encoded.stddev[:, 0].mean(0)
    sd = covariance.diagonal().sqrt()
    assert (sampled.mean(0) - mean).abs().mean() < 0.25 * sd.mean()
    assert torch.allclose(sampled.std(0).mean(0), sd, rtol=0.1)
    assert (inferred - mean).abs().mean() < 0.6 * sd.mean()
    assert np.corrcoef(inferred.ravel(), sampled.mean(0).ravel())[0, 1] > 0.98
    # Independent normals are at most as wide as the margins, and as wide as the conditionals.
    conditional = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert torch.allclose(spread, conditional, rtol=0.15)


class CellTypes(nn.Module):
    """The components of a mixture, with the component as a site."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, minibatch):
        known = self.mixture.labels(minibatch)
        told = nn.functional.one_hot(known.clamp_min(0), len(self.mixture.logits)) * (known >= 0).unsqueeze(-1)
        logits = (self.mixture.logits + 100.0 * told).unsqueeze(1)
        c = pyro.sample("celltype", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
        return dist.Normal(self.mixture.loc[c], self.mixture.log_scale.exp()[c] + 1e-4).to_event(1)


def test_summing_out_types_is_the_mixture(data):
    for adata in data.mod.values():
        types = adata.obs["celltype"].astype(str)
        adata.obs["known"] = np.where(np.arange(len(types)) % 2, types, "unknown")
    mosaic = Mosaic.from_mudata(data, batch_key="batch", label_key="known")
    mixture = GaussianMixture(3, labels=Labels(mosaic.schema))
    options = {"n_latent": 3, "n_hidden": 16, "mmd": 0.0, "jeffreys": 0.0}
    losses = []
    for prior, bound in (
        (mixture, Trace_ELBO(max_plate_nesting=2)),
        (CellTypes(mixture), TraceEnum_ELBO(max_plate_nesting=2)),
    ):
        model = MultiVI(mosaic, prior=prior, **options)
        pyro.set_rng_seed(1)
        svi = SVI(model.model, model.guide, optim.Adam({"lr": 1e-3}), bound)
        losses.append(svi.evaluate_loss(measured(mosaic, mosaic.find(None))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert np.isfinite(svi.step(measured(mosaic, mosaic.find(None))))


# Several programs in one process, and the same numbers again


def user_program():
    """Of the user's own, with Pyro's global parameters, one of a name that models use too."""
    loc = pyro.param("modalities.rna.decoder$$$hidden.0.weight", torch.zeros(()))
    pyro.sample("z", dist.Normal(loc, 1.0), obs=torch.tensor(2.0))


def test_models_of_different_classes_and_a_users_program_do_not_disturb_each_other(data):
    def alone(name):
        model = build(name, data)
        model.train(1, progress_bar=False)
        return parameters(model.model, model.guide)

    expected = {name: alone(name) for name in MODELS[:3]}
    svi = SVI(user_program, lambda: None, optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step()
    built = {name: build(name, data) for name in MODELS[:3]}  # all there before the first is trained
    for name, model in built.items():
        model.train(1, progress_bar=False)
        svi.step()
        found = parameters(model.model, model.guide)
        assert all(torch.equal(found[k], expected[name][k]) for k in found)
    assert list(pyro.get_param_store()) == ["modalities.rna.decoder$$$hidden.0.weight"]
    assert pyro.param("modalities.rna.decoder$$$hidden.0.weight").item() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_numbers(name, data):
    runs = []
    for noise in range(2):
        torch.manual_seed(noise)  # what the caller did before does not matter
        model = build(name, data)
        model.train(2, batch_size=32, seed=5, progress_bar=False)
        draws = model.posterior_predictive_sample("adt", n_samples=2)
        runs.append((parameters(model.model, model.guide), model.history, draws))
    (first, history, draws), (second, again, more) = runs
    assert all(torch.equal(first[k], second[k]) for k in first)
    pd.testing.assert_frame_equal(history, again, check_exact=True)
    assert np.array_equal(draws, more)
    other = build(name, data)
    other.train(2, batch_size=32, seed=6, progress_bar=False)
    assert not all(torch.equal(v, first[k]) for k, v in parameters(other.model, other.guide).items())


# Sparse measurements


@pytest.fixture(scope="module")
def sparse_model():
    """A model whose chromatin is sparse in minibatches, and all its cells."""
    mosaic = Mosaic.from_mudata(simulate(60, {"rna": 30, "atac": 100}, seed=3)[0])
    minibatch = measured(mosaic, mosaic.find(None))
    assert minibatch.observed["atac"].counts.is_sparse
    return MultiVI(mosaic, n_latent=3, n_hidden=16), minibatch


def test_sparse_measurements_are_strided_at_the_sites(sparse_model):
    model, minibatch = sparse_model
    site = poutine.trace(model.model).get_trace(minibatch).nodes["atac"]
    assert not site["value"].is_sparse and torch.equal(site["value"], minibatch.decoded["atac"].dense_counts())
    assert minibatch.decoded["atac"].counts.is_sparse  # the minibatch stays as it was
    with unannounced():  # as in training by Lightning
        assert poutine.trace(model.model).get_trace(minibatch).nodes["atac"]["value"].is_sparse


@pytest.mark.parametrize("parallel", [False, True])
def test_pyros_tools_take_a_sparse_minibatch_as_it_is(sparse_model, parallel):
    model, minibatch = sparse_model
    assert "atac" in pyro.render_model(model.model, model_args=(minibatch,), render_distributions=True).source
    found = []
    for given in (minibatch, minibatch.dense()):
        pyro.set_rng_seed(0)
        prior = Predictive(model.model, num_samples=3, parallel=parallel)(given)
        posterior = Predictive(model.model, guide=model.guide, num_samples=3, parallel=parallel)(given)
        particles = {"num_particles": 4, "vectorize_particles": parallel, "max_plate_nesting": 2}
        svi = SVI(model.model, model.guide, optim.Adam({}), Trace_ELBO(**particles))
        found.append((prior, posterior, svi.evaluate_loss(given)))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert one.keys() == other.keys() >= {"z", "rna", "atac"}
        for name in one:
            torch.testing.assert_close(one[name], other[name])
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=1e-5)


def test_arviz_takes_what_predictive_gives_for_a_sparse_minibatch(sparse_model):
    arviz = pytest.importorskip("arviz", exc_type=ImportError)
    if not hasattr(arviz, "from_pyro"):
        pytest.skip("ArviZ 1 has no from_pyro")
    model, minibatch = sparse_model
    posterior = Predictive(model.model, guide=model.guide, num_samples=3)(minibatch)
    data = arviz.from_pyro(posterior_predictive=posterior, prior=Predictive(model.model, num_samples=3)(minibatch))
    np.testing.assert_array_equal(data.posterior_predictive["atac"][0], posterior["atac"])
    assert data.prior["rna"].shape[:2] == (1, 3)
