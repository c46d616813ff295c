"""Known models are points in one space: each term of their objectives against the formula, at the same draws."""

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from scipy.special import expit, log_softmax, logsumexp, softmax

from pyromosaic import ContrastiveVI, DiagVI, ModalitySpec, Mosaic, MultiVI, ScModal, simulate
from pyromosaic.data import measured
from pyromosaic.distributions import Multinomial
from pyromosaic.labels import Labels
from pyromosaic.measurement import encoded
from pyromosaic.penalties import MMD, Adversary, Classifier, Jeffreys, MeanDistance, Sinkhorn
from pyromosaic.train import MosaicELBO

pytestmark = pytest.mark.filterwarnings("ignore:the guidance graph has few links")
BARE = {"jeffreys": 0.0, "mmd": 0.0, "left_out": 0.0}
ALONE = BARE | {"prior": "normal"}
SIZE = {"n_latent": 4, "n_hidden": 16}


@pytest.fixture(scope="module")
def data():
    return simulate(
        60, {"rna": 30, "atac": 40, "adt": 6}, patterns={"rna+atac+adt": 1.0}, treated=0.5, links={"atac": 0.5}, seed=0
    )


def evaluated(model, n=40):
    """The terms of the loss, and the draws and views they were made with."""
    mosaic = model._data(None)
    minibatch = measured(mosaic, mosaic.find(None)[:n], n)
    bound = MosaicELBO()
    pyro.set_rng_seed(0)
    bound.loss(model.model, model.guide, minibatch)
    pyro.set_rng_seed(0)
    drawn = poutine.trace(model.guide).get_trace(minibatch)
    made = poutine.trace(poutine.replay(model.model, trace=drawn)).get_trace(minibatch)
    return {k: float(v) for k, v in bound.terms.items()}, drawn.nodes, made.nodes, minibatch


def predictors(model, name, drawn, view):
    """What the decoder says at the draws, as arrays."""
    with torch.no_grad():
        found = model.model.modalities[name].decoder(drawn["z"]["value"][view.rows, 0], view)
    return {k: v.numpy().astype(float) for k, v in found.items()}


def divergence(site, loc=0.0, scale=1.0):
    """KL of independent normals from others, summed."""
    q = site["fn"]
    m, s = q.mean.detach().numpy(), q.stddev.detach().numpy()
    return (np.log(scale / s) + (s**2 + (m - loc) ** 2) / (2 * scale**2) - 0.5).sum()


def nb(x, mu, theta):
    return stats.nbinom(theta, theta / (theta + mu)).logpmf(x)


def counts(view):
    return view.dense_counts().numpy()


# MultiVI and its relatives


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_on_rna_it_is_scvi(data, likelihood):
    mosaic = Mosaic.from_mudata(data[0], {"rna": likelihood}, batch_key="batch")
    model = MultiVI(mosaic, library="latent", **ALONE, **SIZE)
    terms, drawn, _, minibatch = evaluated(model)
    assert terms.keys() == {"z", "rna_library", "rna"}
    view = minibatch.observed["rna"]
    p, x = predictors(model, "rna", drawn, view), counts(view)
    theta = model.model.modalities["rna"].likelihood.log_theta.exp().detach().numpy()
    mu = np.exp(drawn["rna_library"]["value"].detach().numpy()) * softmax(p["rate"], axis=-1)
    log_p = nb(x, mu, theta)
    if likelihood == "zinb":
        zero = expit(p["gate"])
        log_p = np.where(x == 0, np.log(zero + (1 - zero) * np.exp(log_p)), np.log1p(-zero) + log_p)
    assert terms["rna"] == pytest.approx(-log_p.sum(), rel=1e-4)
    assert terms["z"] == pytest.approx(divergence(drawn["z"]), rel=1e-4)
    logs, codes = np.log(mosaic.modalities["rna"].library), mosaic.modalities["rna"].codes[:, 0]
    loc, scale = (np.array([f(logs[codes == b]) for b in (0, 1)])[view.codes[:, 0], None] for f in (np.mean, np.std))
    assert terms["rna_library"] == pytest.approx(divergence(drawn["rna_library"], loc, scale), rel=1e-3)


def test_on_chromatin_it_is_peakvi(data):
    model = MultiVI(Mosaic.from_mudata(data[0], {"atac": "bernoulli"}, batch_key="batch"), **ALONE, **SIZE)
    terms, drawn, _, minibatch = evaluated(model)
    assert terms.keys() == {"z", "atac"}
    view, likelihood = minibatch.observed["atac"], model.model.modalities["atac"].likelihood
    with torch.no_grad():
        cell = likelihood.depth(torch.log1p(view.library) - np.log1p(model.schema["atac"].library)).numpy()
    region = likelihood.region_logits.detach().numpy()
    p = expit(predictors(model, "atac", drawn, view)["accessibility"]) * expit(cell) * expit(region)
    assert terms["atac"] == pytest.approx(-stats.bernoulli(p).logpmf(counts(view) > 0).sum(), rel=1e-4)
    assert terms["z"] == pytest.approx(divergence(drawn["z"]), rel=1e-4)


def test_on_rna_and_protein_it_is_totalvi(data):
    specs = {
        "rna": ModalitySpec("nb", batch_key="batch"),
        "adt": ModalitySpec("nb_mixture", batch_key="batch", background="latent"),
    }
    model = MultiVI(Mosaic.from_mudata(data[0], specs), **ALONE, **SIZE)
    terms, drawn, made, minibatch = evaluated(model)
    assert terms.keys() == {"z", "rna", "adt_background", "adt"}
    rna, adt = minibatch.observed["rna"], minibatch.observed["adt"]
    theta = {k: model.model.modalities[k].likelihood.log_theta.exp().detach().numpy() for k in specs}
    mu = rna.library.numpy() * softmax(predictors(model, "rna", drawn, rna)["rate"], axis=-1)
    assert terms["rna"] == pytest.approx(-nb(counts(rna), mu, theta["rna"]).sum(), rel=1e-4)
    p = predictors(model, "adt", drawn, adt)
    background = np.exp(drawn["adt_background"]["value"].detach().numpy()) * adt.library.numpy()
    background = background / model.schema["adt"].library
    parts = [nb(counts(adt), background * m, theta["adt"]) for m in (1.0, 1 + np.exp(p["foreground"]))]
    weights = np.log(expit(p["mixing"])), np.log(expit(-p["mixing"]))  # of background, and of foreground
    log_p = logsumexp([w + part for w, part in zip(weights, parts, strict=True)], axis=0)
    assert terms["adt"] == pytest.approx(-log_p.sum(), rel=1e-4)
    prior = made["adt_background"]["fn"]
    loc, scale = prior.mean.detach().numpy(), prior.stddev.detach().numpy()
    assert loc.shape == (40, 6) and len(np.unique(loc.round(5), axis=0)) == 2  # one prior a batch
    assert terms["adt_background"] == pytest.approx(divergence(drawn["adt_background"], loc, scale), rel=1e-4)


def test_with_a_product_of_experts_and_multinomials_it_is_cobolt(data):
    specs = {"rna": "multinomial", "atac": "multinomial"}
    model = MultiVI(Mosaic.from_mudata(data[0], specs, batch_key="batch"), fusion="product", **ALONE, **SIZE)
    terms, drawn, made, minibatch = evaluated(model)
    assert terms.keys() == {"z", "rna", "atac"}
    precision, weighted = 1.0, 0.0
    for name, view in minibatch.observed.items():
        assert isinstance(made[name]["fn"], Multinomial)
        x, p = counts(view), predictors(model, name, drawn, view)["rate"]
        log_p = stats.multinomial(x.sum(-1), softmax(p, axis=-1)).logpmf(x)
        assert terms[name] == pytest.approx(-log_p.sum(), rel=1e-4)
        loc, scale = (part.detach().numpy() for part in model.guide.modalities[name].encoder(view))
        precision, weighted = precision + scale**-2, weighted + loc * scale**-2
    q = drawn["z"]["fn"]
    assert np.allclose(q.mean[:, 0].detach(), weighted / precision, atol=1e-4)
    assert np.allclose(q.stddev[:, 0].detach(), precision**-0.5, atol=1e-4)
    assert terms["z"] == pytest.approx(divergence(drawn["z"]), rel=1e-4)
    model.train(1, progress_bar=False)
    shares = model.get_normalized_expression("rna")
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-4)
    draw = model.posterior_predictive_sample("rna", n_samples=1)[0]
    assert np.array_equal(draw.sum(1), model.mosaic.modalities["rna"].library)  # the totals are given


def test_the_multinomial_has_its_mass_moments_and_draws():
    rng = np.random.default_rng(0)
    logits, totals = rng.normal(size=(3, 5)), np.array([[0.0], [7.0], [300.0]])
    d = Multinomial(torch.tensor(totals), torch.tensor(logits))
    shares = softmax(logits, axis=-1)
    x = np.stack([rng.multinomial(int(n), p) for (n,), p in zip(totals, shares, strict=True)]).astype(float)
    expected = stats.multinomial(totals[:, 0].astype(int), shares).logpmf(x)
    assert np.allclose(d.log_prob(torch.tensor(x)).sum(-1), expected)
    assert np.allclose(d.log_prob(torch.tensor(x).to_sparse()).sum(-1), expected)
    assert torch.equal(d.log_prob(torch.zeros(3, 5, dtype=torch.double)), torch.zeros(3, 5, dtype=torch.double))
    torch.manual_seed(0)
    draws = d.sample((4000,))
    assert torch.equal(draws.sum(-1), torch.tensor(totals[:, 0]).expand(4000, 3))
    sd = (d.variance / 4000).sqrt()
    assert ((draws.mean(0) - d.mean).abs() <= 4.5 * sd).all()
    assert torch.allclose(draws.var(0), d.variance, rtol=0.12)
    with pytest.raises(ValueError, match="non-negative integers"):
        Multinomial(torch.ones(1, 1), torch.zeros(1, 2), validate_args=True).log_prob(torch.tensor([[0.5, 0.5]]))


# DiagVI and GLUE


def test_with_an_adversary_diagvi_is_glue(data):
    mdata, truth = data
    mosaic = Mosaic.from_mudata(mdata, {"rna": "nb", "atac": "nb"}, batch_key="batch")
    links = truth.links.rename(columns={"gene": "rna", "feature": "atac"})[["rna", "atac"]]
    off = {"alignment": 0.0, "anchors": 0.0, "pull": 0.0, "linkage": None, "n_private": 0}
    adversary = Adversary(mosaic.schema, 4, weight=3.0)
    model = DiagVI(mosaic, links, penalties=[adversary], graph_weight=2.0, **off, **SIZE)
    terms, drawn, made, minibatch = evaluated(model, n=120)
    assert terms.keys() == {
        "v", "edges", "z", "rna", "atac", "penalty/adversary", "penalty/adversary_classifier"
    }  # fmt: skip
    n, v = 120, drawn["v"]["value"].detach().numpy()
    # x ~ NB(l softmax(scale <z, v> + bias), theta), each modality counting alike
    for name, view in minibatch.observed.items():
        decoder, likelihood = model.model.modalities[name].decoder, model.model.modalities[name].likelihood
        scale, bias = (part["rate"].detach().numpy()[view.codes[:, 0]] for part in (decoder.scale, decoder.bias))
        own = v[model.model.nodes[name]]
        signal = drawn["z"]["value"].detach().numpy()[view.rows, 0] @ own.T
        mu = view.library.numpy() * softmax(np.log1p(np.exp(scale)) * signal + bias, axis=-1)
        log_p = nb(counts(view), mu, likelihood.log_theta.exp().detach().numpy())
        assert terms[name] == pytest.approx(-log_p.sum() * n / len(view.rows), rel=1e-3)
    # v and the graph: KL over features, and the log-likelihood of edges and of as many pairs that are none
    features = len(v)
    assert terms["v"] == pytest.approx(2.0 * n * divergence(drawn["v"]) / features**2, rel=1e-3)
    first, second = model.model.edges.numpy()
    linked = np.log(expit((v[first] * v[second]).sum(-1)))
    site = made["edges"]
    logits = site["fn"].logits.detach().numpy()
    assert np.allclose(np.log(expit(logits[: len(first)])), linked, atol=1e-4)
    assert site["value"].sum() == len(first) and len(logits) == 2 * len(first)
    found = site["scale"].numpy()[len(first) :] > 0
    unlinked = np.log(expit(-logits[len(first) :]))[found]
    assert terms["edges"] == pytest.approx(-2.0 * n * (linked.sum() + unlinked.sum()) / (2 * len(first)), rel=1e-3)
    # the discriminator: its own loss, and what the encoders are to make small
    posteriors, _ = encoded(model.guide.modalities, minibatch)
    with torch.no_grad():
        torch.manual_seed(5)
        misled = float(poutine.trace(adversary).get_trace(posteriors, minibatch).nodes["_RETURN"]["value"])
        torch.manual_seed(5)
        expected = []
        for i, q in enumerate(posteriors.values()):
            z = q.loc + q.scale * torch.randn_like(q.scale)
            guess = log_softmax(adversary.classifier(z).numpy()[:, [1, 2]], axis=-1)  # patterns 1 and 2 are there
            expected.append(-guess[:, 1 - i].sum() / n)
    assert misled == pytest.approx(sum(expected), rel=1e-4)  # cross-entropy with the other modality


# Any model takes any penalty


@pytest.fixture(scope="module")
def penalties(data):
    mdata = data[0]
    schema = Mosaic.from_mudata(mdata, {"rna": "nb", "atac": "nb"}, batch_key="batch", label_key="celltype").schema
    return {
        "mmd": lambda: MMD(1.0),
        "jeffreys": lambda: Jeffreys(1.0),
        "mean_distance": lambda: MeanDistance(1.0),
        "sinkhorn": lambda: Sinkhorn(1.0),
        "adversary": lambda: Adversary(schema, 4, "batch"),
        "classifier": lambda: Classifier(1.0, Labels(schema), 4),
    }


@pytest.mark.parametrize("penalty", ["mmd", "jeffreys", "mean_distance", "sinkhorn", "adversary", "classifier"])
@pytest.mark.parametrize("name", ["MultiVI", "DiagVI", "ContrastiveVI", "ScModal"])
def test_any_model_takes_any_penalty(name, penalty, penalties, data):
    mdata, truth = data
    mosaic = Mosaic.from_mudata(mdata, {"rna": "nb", "atac": "nb"}, batch_key="batch", label_key="celltype")
    links = truth.links.rename(columns={"gene": "rna", "feature": "atac"})[["rna", "atac"]]
    given = {**SIZE, "penalties": [penalties[penalty]()]}
    if name in ("DiagVI", "ScModal"):
        off = {"alignment": 0.0, "classifier": 0.0} if name == "DiagVI" else {"adversary": 0.0}
        model = {"DiagVI": DiagVI, "ScModal": ScModal}[name](mosaic, links, linkage=None, **off, **given)
    elif name == "ContrastiveVI":
        cohorts = mosaic.with_cohorts("condition", background="control")
        model = ContrastiveVI(cohorts, cohort_mmd=0.0, **BARE, **given)
    else:
        model = MultiVI(mosaic, **ALONE, **given)
    model.train(1, progress_bar=False)
    assert np.isfinite(model.history[f"train_penalty/{penalty}"]).all()
