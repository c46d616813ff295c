"""Every slot takes an object of the user's own, and what does not fit is refused in one sentence."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from mudata import MuData
from pyro import distributions as dist
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from scipy import stats
from torch import nn

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.data import Schema, Traits, measured, to_predict
from pyromosaic.fusion import MeanFusion
from pyromosaic.likelihoods import NB, Likelihood, logit
from pyromosaic.nn import Decoder, Encoder, InnerProductDecoder
from pyromosaic.penalties import Penalty
from pyromosaic.priors import StudentT, VampPrior
from pyromosaic.program import SiteError, check

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")
LINKS = pd.DataFrame({"rna": [f"rna_{i}" for i in range(6)], "adt": [f"adt_{i}" for i in range(6)]})
MODELS = ("MultiVI", "DiagVI", "ContrastiveVI", "ScModal")


@pytest.fixture(scope="module")
def data():
    return simulate(90, {"rna": 30, "adt": 6}, treated=0.5, seed=3)[0]


def build(name, data, specs=None, **options):
    mosaic = Mosaic.from_mudata(data, specs) if specs else Mosaic.from_mudata(data, batch_key="batch")
    options = {"n_latent": 4, "n_hidden": 16} | options
    if name == "MultiVI":
        return MultiVI(mosaic, **options)
    if name == "ContrastiveVI":
        return ContrastiveVI(mosaic.with_cohorts("condition", background="control"), n_salient=3, **options)
    return {"DiagVI": DiagVI, "ScModal": ScModal}[name](mosaic, LINKS, linkage=None, **options)


# Slots of every model


class Laplace(nn.Module):
    def forward(self, minibatch):
        return dist.Laplace(0.0, 1.0).expand([len(minibatch), 1, 4]).to_event(1)


class TrustRna(MeanFusion):
    def weights(self, names, used, index):
        return used * torch.tensor([3.0 if name == "rna" else 1.0 for name in names])


class Signs(Encoder):
    def posterior(self, x, view):
        return super().posterior(x.sign(), view)


class Plain(Decoder):
    pass


class PlainInner(InnerProductDecoder):
    pass


class Poisson(Likelihood):
    data_kind = "count"
    predictors = ("rate",)

    def distribution(self, predictors, view):
        return dist.Poisson(view.library * predictors["rate"].softmax(-1))


class Moments(Penalty):
    name = "moments"

    def forward(self, posteriors, minibatch):
        means = torch.stack([q.loc.mean(0) for q in posteriors.values()])
        return (means - means.mean(0)).square().sum()


@pytest.mark.parametrize("name", MODELS)
def test_every_slot_takes_an_object(name, data, tmp_path):
    objects = {
        "prior": Laplace(),
        "encoder": Signs,
        "decoder": PlainInner if name == "DiagVI" else Plain,
        "penalties": [Moments(2.0)],
    }
    if name != "ScModal":  # whose cells have one modality
        objects["fusion"] = TrustRna()
    specs = {"rna": ModalitySpec(Poisson, batch_key="batch"), "adt": ModalitySpec("nb_mixture", batch_key="batch")}
    model = build(name, data, specs, **objects)
    model.train(1, progress_bar=False)
    mosaic = model._data(None)
    minibatch = measured(mosaic, mosaic.find(None))
    made = poutine.trace(model.model).get_trace(minibatch).nodes
    drawn = poutine.trace(model.guide).get_trace(minibatch).nodes
    assert isinstance(made["z"]["fn"].base_dist, dist.Laplace | torch.distributions.Laplace)
    assert isinstance(model.model.modalities["rna"].likelihood, Poisson)
    assert isinstance(model.model.modalities["rna"].decoder, objects["decoder"])
    assert any(isinstance(m, Signs) for m in model.guide.modalities.modules())
    assert "penalty/moments" in drawn and model.history["train_penalty/moments"].iloc[0] > 0
    if name != "ScModal":
        assert isinstance(model.guide.fusion, TrustRna)
    model.save(tmp_path)
    with pytest.raises(ValueError, match="pass Poisson=<object> to load"):
        type(model).load(tmp_path, **objects)
    again = type(model).load(tmp_path, **objects, Poisson=Poisson)
    assert again.schema == model.schema
    z = again.get_latent_representation(data=mosaic) if name in ("MultiVI", "ContrastiveVI") else None
    assert z is None or np.array_equal(z, model.get_latent_representation())


@pytest.mark.parametrize("name", MODELS)
def test_the_programs_themselves_can_be_replaced(name, data):
    kind = type(build(name, data))

    class Story(kind.Model):
        def forward(self, minibatch, kl_weight=1.0):
            z = super().forward(minibatch, kl_weight)
            pyro.deterministic("norm", z.detach().norm())
            return z

    class Own(kind):
        Model = Story

    model = Own(build(name, data).mosaic, *([LINKS] if name in ("DiagVI", "ScModal") else []), n_latent=4)
    mosaic = model._data(None)
    assert "norm" in poutine.trace(model.model).get_trace(measured(mosaic, mosaic.find(None))).nodes


def test_a_vamp_prior_is_the_mixture_of_the_encoders_posteriors(data):
    model = build("MultiVI", data)
    prior = model.model.prior = VampPrior(model.guide.modalities["rna"].encoder, 4, 7)
    minibatch = measured(model.mosaic, model.mosaic.find(None))
    z = torch.randn(len(minibatch), 1, 4)
    with torch.no_grad():
        loc, scale = model.guide.modalities["rna"].encoder.posterior(
            prior.inputs, to_predict(model.mosaic, np.zeros(7, int), ("rna",), batch=None).decoded["rna"]
        )
        found = prior(minibatch).log_prob(z)
    batch = model.guide.modalities["rna"].encoder.scaling.schema.n_covariates
    assert batch  # the pseudo-cells are of no batch, so of all of them alike
    design = torch.full((7, batch), 1 / batch)
    hidden = model.guide.modalities["rna"].encoder.hidden(torch.cat([prior.inputs, design], -1))
    loc = model.guide.modalities["rna"].encoder.loc(hidden).detach().numpy()
    scale = (0.5 * model.guide.modalities["rna"].encoder.log_variance(hidden)).exp().detach().numpy()
    densities = stats.norm(loc, scale).logpdf(z.numpy()).sum(-1)  # cells × components
    expected = np.log(np.exp(densities).mean(-1, keepdims=True))
    assert np.allclose(found.numpy(), expected, atol=1e-4)
    before = prior.inputs.detach().clone()
    model.train(1, progress_bar=False)
    assert not torch.equal(before, prior.inputs)


def test_students_t_has_its_tails(data):
    model = build("MultiVI", data, prior=StudentT(4, df=3.0))
    minibatch = measured(model.mosaic, model.mosaic.find(None))
    z = 4 * torch.randn(len(minibatch), 1, 4)
    expected = stats.t(3).logpdf(z.numpy()).sum(-1)
    assert np.allclose(model.model.prior(minibatch).log_prob(z), expected, atol=1e-4)
    model.train(1, progress_bar=False)


# A likelihood that reads a further layer


class BetaBinomial(Likelihood):
    data_kind = "count"
    predictors = ("level",)

    def __init__(self, schema):
        super().__init__(schema)
        self.log_concentration = nn.Parameter(torch.full((schema.n_features,), 3.0))

    def start(self, view):
        return {"level": logit((view.dense_counts().sum(0) + 0.5) / (view.exposure.sum(0) + 1))}

    def distribution(self, predictors, view):
        level, concentration = predictors["level"].sigmoid(), self.log_concentration.exp()
        return dist.BetaBinomial(level * concentration, (1 - level) * concentration, view.exposure)

    def normalized(self, distribution):
        return distribution.concentration1 / (distribution.concentration1 + distribution.concentration0)


@pytest.fixture(scope="module")
def methylation():
    """Three types of cells, methylated at random sites; the first 80 of 120 have methylation, all but 30 RNA."""
    rng = np.random.default_rng(1)
    types = rng.integers(3, size=120)
    level = np.where(rng.random((3, 15)) < 0.5, 0.1, 0.9)[types]
    coverage = rng.poisson(10, (120, 15)) * (rng.random((120, 15)) < 0.8)
    names = np.array([f"cell{i}" for i in range(120)])
    counts = rng.poisson(np.exp(rng.normal(0.5, 1.0, (3, 25)))[types]) + np.eye(120, 25)
    obs = pd.DataFrame({"batch": "one"}, index=names)
    meth = anndata.AnnData(rng.binomial(coverage, level).astype(np.float32), obs, layers={"coverage": coverage})
    rna = anndata.AnnData(counts.astype(np.float32), obs)
    meth.var_names, rna.var_names = [f"site{i}" for i in range(15)], [f"gene{i}" for i in range(25)]
    return MuData({"rna": rna[30:].copy(), "meth": meth[:80].copy()}), level


SPECS = {"rna": ModalitySpec("nb"), "meth": ModalitySpec(BetaBinomial, exposure_layer="coverage")}


def test_an_exposure_layer_travels_with_its_modality(methylation):
    mdata, _ = methylation
    mosaic = Mosaic.from_mudata(mdata, SPECS)
    coverage = mdata["meth"].layers["coverage"]
    index = np.array([5, 100, 60])
    view = measured(mosaic, index).observed["meth"]
    cells = mosaic.obs_names[index[view.rows]]
    assert np.array_equal(view.exposure, coverage[mdata["meth"].obs_names.get_indexer(cells)])
    typical = mosaic.schema["meth"].exposure
    assert typical == np.sort(coverage[coverage > 0])[(np.sum(coverage > 0) - 1) // 2]
    asked = to_predict(mosaic, mosaic.find(["cell100"]), ("meth",)).decoded["meth"]
    assert (asked.exposure == typical).all() and asked.counts is None
    turned = MuData({"meth": mdata["meth"][:, ::-1].copy(), "rna": mdata["rna"]})
    again = Mosaic.from_mudata(turned, schema=mosaic.schema)  # features in another order
    first = measured(again, again.find(["cell7"])).observed["meth"]
    assert np.array_equal(first.exposure[0], coverage[7])
    assert measured(mosaic, index).observed["rna"].exposure is None
    assert Schema.from_json(mosaic.schema.to_json(), {"BetaBinomial": BetaBinomial}) == mosaic.schema


def test_bad_exposures_are_refused(methylation):
    mdata, _ = methylation
    with pytest.raises(ValueError, match="modality 'meth': there is no layer 'depth'; it has 'coverage'"):
        Mosaic.from_mudata(mdata, {**SPECS, "meth": ModalitySpec(BetaBinomial, exposure_layer="depth")})
    bad = mdata["meth"].copy()
    bad.layers["coverage"] = bad.layers["coverage"] - 1.0
    with pytest.raises(ValueError, match="meth, layer coverage.*is negative"):
        Mosaic.from_mudata(MuData({"meth": bad, "rna": mdata["rna"]}), SPECS)
    with pytest.raises(ValueError, match="has no layer"):
        Mosaic.from_obsm(
            anndata.AnnData(np.ones((3, 2), np.float32), obsm={"m": np.ones((3, 2))}),
            {"meth": "m"},
            {"meth": ModalitySpec(BetaBinomial, exposure_layer="coverage")},
        )


def test_a_likelihood_of_the_users_own_is_learnt_and_saved(methylation, tmp_path):
    mdata, level = methylation
    mosaic = Mosaic.from_mudata(mdata, SPECS)
    model = MultiVI(mosaic, n_latent=4, n_hidden=32)
    model.train(40, batch_size=40, learning_rate=5e-3, progress_bar=False)
    found = model.get_normalized_expression("meth")
    truth = pd.DataFrame(level, [f"cell{i}" for i in range(120)]).loc[found.index].to_numpy()
    unmeasured = ~mosaic.presence["meth"].to_numpy()
    assert np.corrcoef(found.to_numpy()[unmeasured].ravel(), truth[unmeasured].ravel())[0, 1] > 0.8
    assert np.abs(found.to_numpy()[~unmeasured] - truth[~unmeasured]).mean() < 0.15
    counts = model.posterior_predictive_sample("meth", ["cell3"], n_samples=200)[:, 0]
    coverage = mdata["meth"].layers["coverage"][3]
    expected = model.get_imputed_values("meth", ["cell3"], n_samples=200).mean.to_numpy()[0]
    assert (counts <= coverage).all() and np.allclose(counts.mean(0), expected, atol=1.5)
    model.save(tmp_path)
    again = MultiVI.load(tmp_path, mdata, BetaBinomial=BetaBinomial)
    pd.testing.assert_frame_equal(again.get_normalized_expression("meth"), found)
    with pytest.raises(ValueError, match="pass BetaBinomial=<object> to load"):
        MultiVI.load(tmp_path)


@pytest.mark.parametrize("kind", [DiagVI, ScModal])
def test_the_same_likelihood_in_models_of_unpaired_modalities(kind, methylation):
    mdata, _ = methylation
    links = pd.DataFrame({"rna": ["gene0", "gene1"], "meth": ["site0", "site1"]})
    model = kind(Mosaic.from_mudata(mdata, SPECS), links, n_latent=4, n_hidden=16, linkage=None)
    model.train(1, progress_bar=False)
    assert np.isfinite(model.get_imputed_values("meth", n_samples=2).mean.to_numpy()).all()


def test_a_likelihood_derived_from_one_of_the_packages_is_treated_like_it(data):
    class Own(NB):
        pass

    spec = ModalitySpec(Own, batch_key="batch", dispersion="gene-batch")
    assert (spec.family, spec.data_kind, spec.needs_library) == ("nb", "count", True)
    model = build("MultiVI", data, {"rna": spec})
    assert np.allclose(model.get_normalized_expression().sum(axis=1), 1, atol=1e-4)
    assert "Own" in repr(model.mosaic)


class Student(Likelihood):
    predictors = ("loc",)

    def distribution(self, predictors, view):
        return dist.StudentT(4.0, predictors["loc"], 1.0)


class Levels(BetaBinomial):
    traits = Traits("count", effect="difference")


def test_traits_say_how_a_likelihood_of_the_users_own_is_compared(methylation):
    assert (Student.traits, BetaBinomial.traits) == (Traits("real"), Traits("count"))
    assert type("Shares", (NB,), {"data_kind": "nonnegative"}).traits == replace(NB.traits, kind="nonnegative")
    with pytest.raises(ValueError, match="the kind of data must be .*found 'counts'"):
        type("Wrong", (Likelihood,), {"data_kind": "counts"})
    values, _ = simulate(60, {"x": 15}, likelihoods={"x": "normal"}, types=2, seed=0)
    model = MultiVI(Mosaic.from_mudata(values, {"x": ModalitySpec(Student)}), n_latent=3, n_hidden=16)
    table = model.differential("celltype", "type0", modality="x", n_samples=20)
    assert "difference_mean" in table  # values below 0 have no fold change
    for kind, column in ((BetaBinomial, "lfc_mean"), (Levels, "difference_mean")):
        spec = ModalitySpec(kind, exposure_layer="coverage")
        model = MultiVI(Mosaic.from_mudata(methylation[0], {"rna": "nb", "meth": spec}), n_latent=3, n_hidden=16)
        cells = np.arange(20)
        assert column in model.differential(cells1=cells, modality="meth", n_samples=20)


def test_a_number_is_no_likelihood():
    with pytest.raises(ValueError, match="likelihood must be text or a class; found 3"):
        ModalitySpec(3)


@pytest.mark.parametrize("wrong", ["gaussian", int, Poisson.__name__])
def test_what_is_no_likelihood_is_refused(wrong):
    with pytest.raises(
        ValueError,
        match="there is no likelihood .*accepted: nb, .*or a subclass of",
    ):
        ModalitySpec(wrong)


# What does not fit


class Narrow(nn.Module):
    def forward(self, minibatch):
        return dist.Normal(0.0, 1.0).expand([len(minibatch), 1, 3]).to_event(1)


class Batched(nn.Module):
    def forward(self, minibatch):
        return dist.Normal(0.0, 1.0).expand([len(minibatch), 1, 4])


class Positive(nn.Module):
    def forward(self, minibatch):
        return dist.LogNormal(0.0, 1.0).expand([len(minibatch), 1, 4]).to_event(1)


class Noise(Poisson):
    """Has a latent variable of its own, and no posterior."""

    def forward(self, name, predictors, view, kl_weight=1.0):
        pyro.sample(f"{name}_noise", dist.Gamma(torch.ones_like(predictors["rate"]), 1.0))
        super().forward(name, predictors, view, kl_weight)


class Beta(Poisson):
    def distribution(self, predictors, view):
        return dist.Beta(predictors["rate"].exp(), 1.0)


class OneShort(Poisson):
    def distribution(self, predictors, view):
        return dist.Poisson(predictors["rate"][..., 1:].exp())


class WrongHead(Poisson):
    def distribution(self, predictors, view):
        return dist.Poisson(predictors["scale"].exp())


class Vector(Moments):
    def forward(self, posteriors, minibatch):
        return torch.zeros(3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": Narrow()}, r"site 'z' of the model has shape \(\d+, 1, 3\); the draws of the guide have .*, 1, 4\)"),
        ({"prior": Batched()}, r"site 'z' of the model has batch shape \(\d+, \d+, 4\).*\.to_event"),
        ({"prior": Positive()}, r"site 'z' of the model, LogNormal.*among the draws of the guide is -"),
        ({"likelihood": Noise}, r"site 'rna_noise' of the model, of shape \(\d+, 30\), is latent and missing"),
        ({"likelihood": Beta}, r"site 'rna' of the model, Beta of shape \(\d+, 30\), accepts Interval.*is \d"),
        ({"likelihood": OneShort}, r"site rna dim -1, 30 vs 29"),
        ({"likelihood": WrongHead}, r"the model fails after site .*: KeyError: 'scale'"),
        ({"penalties": [Moments(), Moments()]}, "site 'penalty/moments' of the guide occurs twice"),
        ({"penalties": [Vector()]}, r"site 'penalty/moments' of the guide must be a scalar; found shape \(3,\)"),
    ],
)
def test_a_wrong_extension_is_refused_by_its_site_before_training(name, options, message, data):
    likelihood = options.get("likelihood", "nb")
    specs = {"rna": ModalitySpec(likelihood, batch_key="batch"), "adt": ModalitySpec("nb_mixture", batch_key="batch")}
    model = build(name, data, specs, **{k: v for k, v in options.items() if k != "likelihood"})
    with pytest.raises(SiteError, match=message) as found:
        model.train(1, progress_bar=False)
    assert "\n" not in str(found.value) and len(model.history) == 0


def test_a_site_of_the_guide_alone_is_refused(data):
    model = build("MultiVI", data)

    class Guide(type(model.guide)):
        def forward(self, minibatch, kl_weight=1.0):
            super().forward(minibatch, kl_weight)
            pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    model.guide.__class__ = Guide
    with pytest.raises(SiteError, match=r"site 'w' of the guide, of shape \(2,\), is not in the model"):
        model.train(1, progress_bar=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_check_changes_nothing(name, data):
    model = build(name, data)
    mosaic = model._data(None)
    before = {k: v.clone() for p in (model.model, model.guide) for k, v in p.state_dict().items()}
    torch.manual_seed(0)
    check(model.model, model.guide, measured(mosaic, mosaic.find(None)))
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())
    after = {k: v for p in (model.model, model.guide) for k, v in p.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_prior_with_a_global_latent_variable_made_outside():
    class Hierarchical(PyroModule):
        def __init__(self):
            super().__init__()
            self.spread = PyroSample(dist.LogNormal(0.0, 0.5))

        def forward(self, minibatch):
            return dist.Normal(0.0, self.spread).expand([len(minibatch), 1, 4]).to_event(1)

    mdata, _ = simulate(200, {"rna": 30}, seed=0)
    model = MultiVI(Mosaic.from_mudata(mdata), n_latent=4, n_hidden=16, prior=Hierarchical())
    model.train(2, progress_bar=False)
    assert model.get_global_posterior(50).loc[("prior.spread", 0), "mean"] > 0
