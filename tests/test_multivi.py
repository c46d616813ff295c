import copy
import json
import subprocess
import sys
import warnings
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

from pyromosaic import ContrastiveVI, ModalitySpec, Mosaic, MultiVI, hide, metrics, pbmc_mosaic
from pyromosaic.data import loader, measured, split, to_predict
from pyromosaic.data import simulate as simulate_mosaic
from pyromosaic.fusion import Posterior
from pyromosaic.measurement import encoded
from pyromosaic.nn import Dropout
from pyromosaic.penalties import Jeffreys, MeanDistance, discrepancy
from pyromosaic.program import AtMean
from pyromosaic.sizes import Size
from pyromosaic.tasks import Question
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


def nb(mu, theta, counts):
    """Log-probabilities of the negative binomial as torch has it."""
    return torch.distributions.NegativeBinomial(theta, logits=(mu / theta).log()).log_prob(counts)


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
    posteriors = {name: model.guide.modalities[name].encoder(view) for name, view in minibatch.observed.items()}
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
        return view, side.modalities[name].decoder(z[view.rows], view)

    view, predictors = decode(model.model, "rna")
    theta = model.model.modalities["rna"].likelihood.log_theta.exp()
    mu = view.counts.to_dense().sum(1, keepdim=True) * predictors["rate"].softmax(-1)
    expected["rna"] = -scale * nb(mu, theta, view.counts.to_dense()).sum()

    view, predictors = decode(model.model, "atac")
    likelihood = model.model.modalities["atac"].likelihood
    p = predictors["accessibility"].sigmoid() * likelihood.region_logits.sigmoid()
    p = p * likelihood.cell_logits(view).sigmoid()
    opened = (view.counts.to_dense() > 0).float()
    expected["atac"] = -scale * (opened * p.log() + (1 - opened) * torch.log1p(-p)).sum()

    view, predictors = decode(model.model, "adt")
    likelihood = model.model.modalities["adt"].likelihood
    loc, log_scale = likelihood.background_loc, likelihood.background_log_scale
    batch = view.codes[:, 0]
    size = view.library / mosaic.modalities["adt"].schema.library
    low, counts, theta = size * background.exp(), view.counts.to_dense(), likelihood.log_theta.exp()
    high, share = low * (1 + predictors["foreground"].exp()), predictors["mixing"].sigmoid()
    mixture = share * nb(low, theta, counts).exp() + (1 - share) * nb(high, theta, counts).exp()
    expected["adt"] = -scale * mixture.log().sum()
    _, posterior = decode(model.guide, "adt")
    q = torch.distributions.Normal(posterior["loc"], posterior["log_scale"].exp())
    prior = torch.distributions.Normal(loc[batch], log_scale[batch].exp())
    expected["adt_background"] = beta * scale * torch.distributions.kl_divergence(q, prior).sum()

    assert set(elbo.terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(elbo.terms[name], value.detach(), rtol=2e-4, atol=1e-2, msg=name)
    torch.testing.assert_close(loss.detach(), sum(expected.values()).detach(), rtol=2e-4, atol=1e-2)


def test_terms_of_the_options_equal_the_formulas(data):
    """Private variables, a latent size, dispersion by batch, and the weights of an adversary."""
    spec = ModalitySpec("zinb", batch_key="batch", dispersion="gene-batch")
    mosaic = Mosaic.from_mudata(data, {"rna": spec, "atac": ModalitySpec("bernoulli", batch_key="batch")})
    model = small(
        mosaic,
        n_private={"rna": 2, "atac": 3},
        private_kl=2.5,
        library="latent",
        adversary=3.0,
        left_out=0.0,
        penalties=[MeanDistance(1.5)],
    )
    with torch.no_grad():
        model.model.modalities["rna"].likelihood.log_theta.normal_()
    minibatch = measured(mosaic, np.arange(0, mosaic.n_cells, 5))
    beta, scale = 0.3, mosaic.n_cells / len(minibatch)
    elbo = MosaicELBO()
    torch.manual_seed(1)
    elbo.loss(model.model, model.guide, minibatch, beta)
    torch.manual_seed(1)
    sites = poutine.trace(model.guide).get_trace(minibatch, beta).nodes
    shared, private = encoded(model.guide.modalities, minibatch)
    standard = torch.distributions.Normal(0.0, 1.0)
    for name, width in (("rna", 2), ("atac", 3)):
        view = minibatch.observed[name]
        loc, sd = model.guide.modalities[name].encoder(view)
        torch.testing.assert_close(shared[name].loc, loc[:, :4])
        q = torch.distributions.Normal(loc[:, 4:], sd[:, 4:])
        assert sites[f"z_{name}"]["value"].shape == (len(view.rows), 1, width)
        expected = 2.5 * beta * scale * torch.distributions.kl_divergence(q, standard).sum()
        torch.testing.assert_close(elbo.terms[f"z_{name}"], expected.detach(), msg=name)

    view = minibatch.observed["rna"]
    batch, totals = view.codes[:, 0], mosaic.modalities["rna"]
    logs = np.log(totals.library[totals.present])
    prior = [logs[totals.codes[totals.present, 0] == b] for b in (0, 1)]
    moments = torch.tensor([[x.mean(), x.std()] for x in prior])[batch]
    loc, sd = model.guide.modalities["rna"].size_encoder(view)
    q = torch.distributions.Normal(view.library.log() + loc, sd)
    p = torch.distributions.Normal(moments[:, :1], moments[:, 1:])
    expected = scale * torch.distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(elbo.terms["rna_library"], expected.detach(), rtol=1e-3, atol=1e-3)

    own = torch.cat([sites["z"]["value"][view.rows, 0], sites["z_rna"]["value"][:, 0]], dim=-1)
    predictors = model.model.modalities["rna"].decoder(own, view)
    mu = sites["rna_library"]["value"].exp() * predictors["rate"].softmax(-1)
    theta, gate, counts = (
        model.model.modalities["rna"].likelihood.log_theta[batch].exp(),
        predictors["gate"].sigmoid(),
        view.dense_counts(),
    )
    density = (counts == 0) * gate + (1 - gate) * nb(mu, theta, counts).exp()
    torch.testing.assert_close(elbo.terms["rna"], -scale * density.log().sum().detach(), rtol=1e-4, atol=1e-2)

    distance = MeanDistance()(shared, minibatch) * mosaic.n_cells
    torch.testing.assert_close(elbo.terms["penalty/mean_distance"], 1.5 * distance.detach())
    adversary = model.guide.adversaries[0]
    joint = sites["z"]["fn"]
    whole = Posterior(torch.arange(len(minibatch)), joint.mean[:, 0], joint.stddev[:, 0])
    torch.manual_seed(1)
    misled = poutine.trace(adversary).get_trace({"z": whole}, minibatch).nodes["_RETURN"]["value"]
    torch.testing.assert_close(elbo.terms["penalty/adversary"], 3.0 * mosaic.n_cells * misled.detach())


def test_elbo_and_gradients_are_those_of_pyro(mosaic):
    model = small(mosaic, n_private=1, adversary=1.0)
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
    posteriors = torch.stack([p.loc for p in encoded(model.guide.modalities, minibatch)[0].values()])
    matches = torch.isclose(posteriors, z, atol=1e-6).all(-1)
    assert (matches.sum(0) == 1).all(), "each cell is represented by exactly one of its modalities"
    assert matches.any(1).all(), "and each modality by some cell"
    model.guide.eval()
    z = poutine.trace(model.guide).get_trace(minibatch).nodes["z"]["fn"].mean[:, 0]
    torch.testing.assert_close(z, posteriors.mean(0))


def test_discrepancy_and_its_gradient_are_those_of_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator).double().requires_grad_() for n in (7, 5))

    def plain(x, y):
        pooled = torch.cat([x, y])
        squared = (pooled.unsqueeze(1) - pooled).square().sum(-1)
        kernel = sum(torch.exp(-k * squared / squared.detach().mean()) for k in (1, 2, 4, 8)) / 4
        within = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (kernel[:7, :7], kernel[7:, 7:])]
        return sum(within) - 2 * kernel[:7, 7:].mean()

    torch.testing.assert_close(discrepancy(x, y), plain(x, y))
    torch.testing.assert_close(torch.autograd.grad(discrepancy(x, y), (x, y)), torch.autograd.grad(plain(x, y), (x, y)))


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
    posteriors, _ = encoded(model.guide.modalities, minibatch)
    forward = Jeffreys()(posteriors, minibatch)
    backward = Jeffreys()(dict(reversed(posteriors.items())), minibatch)
    torch.testing.assert_close(forward, backward)
    assert forward > 0
    with pytest.raises(ValueError, match="at least 0"):
        Jeffreys(-1.0)


# Alone it is scVI, PeakVI, totalVI


@pytest.mark.parametrize(
    ("modalities", "sites"),
    [
        (["rna"], {"z": (60, 1, 4), "rna": (60, 30)}),
        (["atac"], {"z": (60, 1, 4), "atac": (60, 50)}),
        (["rna", "adt"], {"z": (60, 1, 4), "rna": (60, 30), "adt_background": (60, 8), "adt": (60, 8)}),
    ],
)
def test_fewer_modalities_are_the_same_program(data, modalities, sites):
    cells = data[modalities[0]].obs_names.intersection(data[modalities[-1]].obs_names)[:60]
    mosaic = Mosaic.from_anndata(
        {name: data[name][cells].copy() for name in modalities}, match_cells=True, batch_key="batch"
    )
    model = small(mosaic)
    trace = poutine.trace(model.model).get_trace(measured(mosaic, np.arange(60)))
    shapes = {
        name: tuple(site["fn"].batch_shape + site["fn"].event_shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not name.endswith(("cells", "features"))
    }
    assert shapes == sites
    elbo = MosaicELBO()
    elbo.loss(model.model, model.guide, measured(mosaic, np.arange(60)))
    assert {name for name in elbo.terms if not name.startswith("penalty/")} == set(sites)
    if len(modalities) == 1:
        assert all(elbo.terms[name] == 0 for name in elbo.terms if name.startswith("penalty/"))
    model.train(1, **QUIET)


def test_a_fourth_modality_of_another_kind(data):
    image = anndata.AnnData(
        np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32),
        obs=pd.DataFrame(index=data["rna"].obs_names[:40]),
        var=pd.DataFrame(index=[f"feature{i}" for i in range(6)]),
    )
    mosaic = Mosaic.from_anndata(
        {**data.mod, "image": image},
        {"rna": "nb", "atac": "bernoulli", "adt": "nb_mixture", "image": "normal"},
        match_cells=True,
    )
    model = small(mosaic, fusion="product", adversary=1.0)
    model.train(2, **QUIET)
    assert np.isfinite(model.get_imputed_values("image", n_samples=2).mean).all().all()


def test_counts_of_fragments_are_binarised_by_the_likelihood(data):
    counts = data["atac"].copy()
    binary = counts.copy()
    binary.X = (counts.X > 0).astype(np.float32)
    assert counts.X.max() > 1
    cell_sizes = np.asarray(counts.X.sum(1)).ravel()
    losses = []
    for adata in (counts, binary):
        adata.obs["size"] = cell_sizes
        mosaic = Mosaic.from_anndata({"atac": adata}, size_factor_key="size")
        model = small(mosaic)
        torch.manual_seed(0)
        losses.append(MosaicELBO().loss(model.model, model.guide, measured(mosaic, np.arange(50))))
    assert losses[0] == losses[1]
    assert counts.X.max() > 1


# Private variables


def test_without_private_dimensions_nothing_changes(mosaic):
    minibatch = measured(mosaic, np.arange(60))
    losses = []
    for options in ({}, {"n_private": 0, "private_kl": 7.0}, {"n_private": {"rna": 0}}):
        model = small(mosaic, **options)
        torch.manual_seed(0)
        losses.append(MosaicELBO().loss(model.model, model.guide, minibatch))
        sites = poutine.trace(model.guide).get_trace(minibatch).nodes
        assert not any(name.startswith("z_") for name in sites)
        assert model.get_shared_share().empty
    assert losses[0] == losses[1] == losses[2]


def test_private_variables_follow_their_modality_or_the_prior(mosaic):
    model = small(mosaic, n_private={"rna": 2, "adt": 1}, left_out=1.0)
    cells = np.arange(0, 240, 4)
    minibatch = to_predict(mosaic, cells, ("rna", "adt"))
    sites = poutine.trace(model.guide).get_trace(minibatch).nodes
    for name in ("rna", "adt"):
        q = sites[f"z_{name}"]["fn"]
        present = torch.from_numpy(mosaic.modalities[name].present[cells])
        assert (q.mean[~present] == 0).all() and (q.stddev[~present] == 1).all()
        assert (q.stddev[present] != 1).all()
    # of two decoders, each sees its own private variable alone
    inputs = [model.model.modalities[name].decoder.hidden[0].in_features - 2 for name in ("rna", "adt", "atac")]
    assert inputs == [6, 5, 4]
    encoded = to_predict(mosaic, np.flatnonzero(mosaic.patterns == "rna+adt"), ("adt",), encode=("rna",))
    q = poutine.trace(model.guide).get_trace(encoded).nodes["z_adt"]["fn"]
    assert (q.mean == 0).all() and (q.stddev == 1).all()
    # a modality that is left out in training is left out here too
    model.guide.train()
    both = measured(mosaic, np.flatnonzero(mosaic.patterns == "rna+adt"))
    sites = poutine.trace(model.guide).get_trace(both).nodes
    prior = [(sites[f"z_{name}"]["fn"].stddev == 1).all(-1).squeeze(-1) for name in ("rna", "adt")]
    assert (prior[0] ^ prior[1]).all() and prior[0].any() and prior[1].any()


def test_imputation_is_less_sure_for_lack_of_the_private_variable(mosaic):
    model = small(mosaic, n_private=3, private_kl=0.1)
    with pytest.warns(UserWarning, match="shared latent space explains only"):
        model.train(40, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    both = mosaic.obs_names[mosaic.patterns == "rna+adt"]
    sd = [
        np.log(model.get_imputed_values("rna", both, encode=encode, n_samples=30, library=100.0).sd).mean().mean()
        for encode in (None, ["adt"])
    ]
    assert sd[1] > sd[0] + 0.3


def test_share_of_the_shared_latent_variable(mosaic):
    """1 where the private variable is ignored, 0 where the shared one is."""
    model = small(mosaic, n_private={"rna": 2, "atac": 2}, private_kl=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(20, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    assert list(model.get_shared_share().index) == ["rna", "atac"]
    for ignored, share in ((slice(4, 6), 1.0), (slice(0, 4), 0.0)):
        other = copy.deepcopy(model)
        for name in ("rna", "atac"):
            with torch.no_grad():
                other.model.modalities[name].decoder.hidden[0].weight[:, ignored] = 0.0
        np.testing.assert_allclose(other.get_shared_share(), share, atol=1e-3)
    everyone = model.get_shared_share(model.split.validation)
    assert everyone.between(-1, 2).all()


def test_private_dimensions_are_checked(mosaic):
    with pytest.raises(ValueError, match="at least 0; found -1"):
        small(mosaic, n_private=-1)
    with pytest.raises(KeyError, match="no modality 'protein'"):
        small(mosaic, n_private={"protein": 2})


# Choices of the likelihood


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "nb_mixture"])
@pytest.mark.parametrize(("dispersion", "shape"), [("gene", (8,)), ("gene-batch", (2, 8)), ("gene-label", (4, 8))])
def test_dispersion_by_batch_and_label(data, likelihood, dispersion, shape, tmp_path):
    spec = ModalitySpec(likelihood, batch_key="batch", label_key="type", unlabelled="3", dispersion=dispersion)
    shape = (3, 8) if dispersion == "gene-label" else shape
    mosaic = Mosaic.from_mudata(data, {"adt": spec})
    model = small(mosaic)
    log_theta = model.model.modalities["adt"].likelihood.log_theta
    assert log_theta.shape == shape
    with torch.no_grad():
        log_theta.normal_()
    view = measured(mosaic, np.arange(20)).observed["adt"]
    theta = model.model.modalities["adt"].likelihood.theta(view).log().expand(20, 8)
    obs = data["adt"].obs.loc[mosaic.obs_names[:20]]
    for i, (batch, label) in enumerate(zip(obs["batch"], obs["type"], strict=True)):
        row = {"gene": None, "gene-batch": "ab".index(batch), "gene-label": int(label)}[dispersion]
        expected = log_theta if row is None else log_theta.mean(0) if row == 3 else log_theta[row]
        torch.testing.assert_close(theta[i], expected)
    model.train(1, **QUIET)
    model.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", {"adt": data["adt"]})
    draws = [m.posterior_predictive_sample("adt", list(obs.index), n_samples=2) for m in (model, loaded)]
    np.testing.assert_array_equal(*draws)


def test_dispersion_is_checked():
    for spec, message in [
        ({"likelihood": "nb", "dispersion": "cell"}, "found 'cell'"),
        ({"likelihood": "bernoulli", "dispersion": "gene-batch", "batch_key": "b"}, "'bernoulli' has no inverse"),
        ({"likelihood": "nb", "dispersion": "gene-batch"}, "takes a batch_key"),
        ({"likelihood": "nb", "dispersion": "gene-label"}, "takes a label_key"),
    ]:
        with pytest.raises(ValueError, match=message):
            ModalitySpec(**spec)


def test_cell_factors_of_rna_are_inferred_or_observed(data, mosaic, tmp_path):
    observed, latent = small(mosaic), small(mosaic, library="latent")
    latent.train(20, batch_size=64, learning_rate=5e-3, kl_warmup_epochs=0, **QUIET)
    counts = data["rna"].to_df().sum(axis=1)
    factors = latent.get_cell_factors()
    assert list(factors.columns) == ["rna", "atac", "adt"]
    assert (factors.notna() == mosaic.presence).all().all()
    np.testing.assert_allclose(
        observed.get_cell_factors()["rna"].dropna(), counts[factors["rna"].notna()[lambda x: x].index]
    )
    assert np.corrcoef(np.log(factors["rna"].dropna()), np.log(counts[factors["rna"].dropna().index]))[0, 1] > 0.9
    assert factors["atac"].dropna().between(0, 1).all()
    adt = factors["adt"].dropna()
    np.testing.assert_allclose(adt, data["adt"].to_df().sum(axis=1)[adt.index] / mosaic.schema["adt"].library)
    shares = latent.get_normalized_expression("rna")
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-4)
    latent.save(tmp_path / "model")
    loaded = MultiVI.load(tmp_path / "model", data)
    pd.testing.assert_frame_equal(loaded.get_cell_factors(), factors)
    with pytest.raises(ValueError, match='"observed" or "latent"; found \'network\''):
        small(mosaic, library="network")


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
    seen = history["validation_elbo"].notna()
    assert list(history.index[seen]) == list(range(2, 60, 3))  # some 20 times, and at the end
    assert history.loc[seen].notna().all(axis=None) and history["train_elbo"].notna().all()
    history = history[seen]
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
    with pytest.raises(ValueError, match='"elbo" or "reconstruction"; found \'loss\''):
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
    model.model.modalities["rna"].likelihood.register_forward_pre_hook(
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
    estimate = model.get_imputed_values("adt")
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
    purity = metrics.label_purity(joint, mosaic.labels(), n_neighbors=10)
    assert purity > 0.7  # 0.85 on average over seeds, 0.25 by chance


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
    size = Size("adt", mosaic.schema["adt"], 3)
    unknown = replace(view, library=torch.full_like(view.library, float("nan")))
    median = torch.full_like(view.library, mosaic.schema["adt"].library)
    torch.testing.assert_close(size(z, unknown).library, median, rtol=1e-4, atol=0.0)
    truth = (6 + z @ slope + view.one_hot() @ shift).exp()
    size.fit(z, replace(view, library=truth))
    torch.testing.assert_close(size(z, unknown).library, truth, rtol=0.05, atol=0.0)
    assert size(z, view) is view
    noise = torch.randn(truth.shape, generator=rng)
    size.fit(z, replace(view, library=truth * (0.4 * noise).exp()))
    assert abs(float(size.residual) - 0.4) < 0.05
    many = torch.stack([size(z, unknown).library for _ in range(2000)])
    torch.testing.assert_close(many.log().std(0), size.residual.expand_as(truth), rtol=0.1, atol=0.0)
    with AtMean():
        torch.testing.assert_close(size(z, unknown).library, many.mean(0), rtol=0.05, atol=0.0)


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
    chunks = list(trained._answers(Question("adt", lambda distribution: distribution.mean, n_samples=300)))
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
    monkeypatch.setattr("pyromosaic.models.asking.CHUNK_ENTRIES", 30 * 7)
    pd.testing.assert_frame_equal(trained.get_normalized_expression("rna"), whole, rtol=1e-4)


def test_batches_can_be_exchanged_and_averaged(trained, mosaic):
    a, b, own = (trained.get_normalized_expression("rna", batch=batch) for batch in ("a", "b", None))
    pd.testing.assert_frame_equal(trained.get_normalized_expression("rna", batch=["a", "b"]), (a + b) / 2)
    draws = [trained.get_accessibility_estimates(batch=batch, n_samples=3) for batch in ("a", "b", ["a", "b"])]
    pd.testing.assert_frame_equal(draws[2], (draws[0] + draws[1]) / 2)
    is_a = (trained.mosaic.modalities["rna"].codes[:, 0] == 0) & mosaic.presence["rna"].to_numpy()
    pd.testing.assert_frame_equal(own[is_a], a[is_a])
    assert not np.allclose(a, b)


def test_region_factors_and_foreground_probabilities(trained, mosaic, data):
    factors = trained.get_region_factors()
    assert list(factors.index) == list(data["atac"].var_names) and factors.between(0, 1).all()
    foreground = trained.get_protein_foreground_probability()
    assert foreground.shape == (240, 8) and ((foreground > 0) & (foreground < 1)).all().all()
    one = trained.get_protein_foreground_probability(batch=["b"], features=["adt2"], cells=["c3"], n_samples=2)
    assert one.shape == (1, 1)
    signal = trained.get_normalized_expression("adt")
    assert np.corrcoef(foreground.rank(axis=1).to_numpy().ravel(), signal.rank(axis=1).to_numpy().ravel())[0, 1] > 0.3
    lacking = MultiVI(Mosaic.from_mudata(data, {"rna": "nb"}))
    for call, message in [
        (lambda: trained.get_region_factors("rna"), "modality 'rna' has no region factors"),
        (lambda: trained.get_protein_foreground_probability("rna"), "modality 'rna' has no foreground"),
        (lambda: trained.get_normalized_expression(batch=[]), "list of batches to average over is empty"),
        (lambda: lacking.get_region_factors(), "none has a likelihood 'bernoulli'"),
        (lambda: lacking.get_protein_foreground_probability(), "none has a likelihood 'nb_mixture'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


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


def test_parameters_of_the_story_are_recovered():
    """Four types; every region is open for sure in one of them, so that its factor can be told from its accessibility.

    Cells have all three modalities or one, and their sizes are known.
    """
    rng = np.random.default_rng(0)
    n, n_genes, n_regions, n_proteins = 1500, 60, 80, 16
    kind = rng.integers(4, size=n)

    def counts(mu, theta):
        return rng.poisson(mu * rng.gamma(theta, 1 / theta, mu.shape))

    rate, theta = np.exp(rng.normal(0, 1, (4, n_genes))), np.exp(rng.normal(1, 0.7, n_genes))
    size = 1500 * np.exp(rng.normal(0, 0.4, n))
    rna = counts(size[:, None] * (rate / rate.sum(1, keepdims=True))[kind], theta)

    logits = np.where(rng.random((4, n_regions)) < 0.6, 4.0, -4.0)
    logits[rng.integers(4, size=n_regions), np.arange(n_regions)] = 4.0
    region, cell = rng.uniform(0.3, 1, n_regions), rng.beta(8, 4, n)
    opened = rng.random((n, n_regions)) < cell[:, None] * region / (1 + np.exp(-logits[kind]))

    proteins = np.exp(rng.normal(0, 0.3, n))
    loc, theta_proteins = rng.normal(1.5, 0.5, n_proteins), np.exp(rng.normal(1.8, 0.5, n_proteins))
    mixing = rng.choice([0.1, 0.35, 0.65, 0.9], (4, n_proteins))
    factor = np.where(rng.random((n, n_proteins)) < mixing[kind], 1, 1 + np.exp(rng.normal(2.5, 0.3, n_proteins)))
    background = proteins[:, None] * np.exp(loc + 0.3 * rng.normal(size=(n, n_proteins)))

    story = {
        "rna": (rna, size),
        "atac": (opened, 1000 * cell),
        "adt": (counts(background * factor, theta_proteins), 100 * proteins),
    }
    pattern = rng.permutation(np.resize([7, 7, 7, 1, 2, 4], n))
    data = {}
    for i, (name, (x, sizes)) in enumerate(story.items()):
        has = np.flatnonzero(pattern >> i & 1)
        obs = pd.DataFrame({"size": sizes[has]}, index=[f"c{j}" for j in has])
        data[name] = anndata.AnnData(x[has].astype(np.float32), obs=obs)
    mosaic = Mosaic.from_anndata(data, match_cells=True, size_factor_key="size")
    options = {"n_latent": 5, "n_hidden": 32, "dropout": 0.0, "left_out": 0.0, "mmd": 0.0, "jeffreys": 0.0}
    model = MultiVI(mosaic, **options)
    model.train(100, batch_size=128, learning_rate=6e-3, validation=0.0, **QUIET)

    def agreement(found, truth) -> float:
        return np.corrcoef(np.ravel(found), np.ravel(truth))[0, 1]

    likelihoods = {name: part.likelihood for name, part in model.model.modalities.items()}
    assert agreement(likelihoods["rna"].log_theta.detach(), np.log(theta)) > 0.9
    assert agreement(likelihoods["adt"].log_theta.detach(), np.log(theta_proteins)) > 0.9
    assert agreement(model.get_region_factors(), region) > 0.9
    assert agreement(likelihoods["adt"].background_loc.detach(), loc) > 0.9
    truth = mixing[kind[mosaic.obs_names.str[1:].astype(int)]]
    background = 1 - model.get_protein_foreground_probability().to_numpy()
    for cells in (mosaic.presence["adt"], ~mosaic.presence["adt"]):
        assert agreement(background[cells], truth[cells]) > 0.9


def test_sizes_of_unmeasured_cells_are_those_of_measured_ones():
    """Latent dimensions that say nothing are noise in a draw, however well their tiny means seem to explain sizes."""
    mdata, truth = simulate_mosaic(600, {"rna": 60, "adt": 10}, seed=0)
    mosaic = Mosaic.from_mudata(mdata)
    model = MultiVI(mosaic)
    model.train(40, **QUIET)
    for name in ("rna", "adt"):
        cells = mosaic.obs_names[~mosaic.presence[name]]
        imputed = model.get_imputed_values(name, cells, n_samples=50).mean.to_numpy()
        assert 0.8 < imputed.sum() / truth.mean[name][mdata.obs_names.get_indexer(cells)].sum() < 1.25


@pytest.mark.parametrize(
    ("n_cells", "features", "preset"),
    [(4000, (60, 80, 16), "calibrated"), (4000, (60, 80, 16), None), (3000, (500, 800, 100), None)],
)
def test_intervals_of_imputed_means_cover_the_truth(n_cells, features, preset):
    """Of cells in which the modality was not measured, at the median size: the intervals are not about sizes."""
    features = dict(zip(("rna", "atac", "adt"), features, strict=True))
    patterns = {"rna+atac+adt": 0.5, "rna": 0.17, "atac": 0.17, "adt": 0.16}
    mdata, truth = simulate_mosaic(n_cells, features, patterns=patterns, n_batches=1, seed=0)
    drawn = truth.parameters
    sizes = {
        "rna": drawn["rna"]["size"],
        "atac": drawn["atac"]["cell_factor"] * 1000,
        "adt": drawn["adt"]["size"] * 100,
    }
    for name, size in sizes.items():
        mdata[name].obs["size"] = size[mdata.obs_names.get_indexer(mdata[name].obs_names)]
    mosaic = Mosaic.from_mudata(mdata, size_factor_key="size")
    options = MultiVI.presets[preset].options if preset else {}
    model = MultiVI(mosaic, **options)
    model.train(40, **QUIET)
    covered = []
    for name, size in sizes.items():
        cells = mosaic.obs_names[~mosaic.presence[name]]
        rows, median = mdata.obs_names.get_indexer(cells), float(np.median(size))
        found = model.get_imputed_values(name, cells, library=median, n_samples=100, quantiles=(0.05, 0.95))
        expected = truth.mean[name][rows] / size[rows, None] * median
        covered.append((found.quantiles[0.05].to_numpy() <= expected) & (expected <= found.quantiles[0.95].to_numpy()))
    assert 0.85 < np.concatenate([c.ravel() for c in covered]).mean() < 0.95
    assert all(0.75 < c.mean() < 0.99 for c in covered)


@pytest.mark.parametrize("model_class", [MultiVI, ContrastiveVI])
def test_agreement_is_asked_in_proportion_to_the_features(model_class):
    """A ten-thousandth for each, with an upper end, and as the user says if so."""

    def of(n, **options):
        mosaic = Mosaic.from_mudata(simulate_mosaic(40, {"rna": n, "adt": 20}, seed=0)[0])
        if model_class is ContrastiveVI:
            mosaic = mosaic.with_cohorts(background=np.arange(20), target=np.arange(20, 40))
        guide = model_class(mosaic, **options).guide
        return next(p.weight for p in guide.modules() if isinstance(p, Jeffreys)), guide.left_out

    assert of(80) == (0.01, 0.01)
    assert of(1480) == (0.15, 0.1)
    assert of(4000) == (0.2, 0.1)
    assert of(80, jeffreys=0.5, left_out=0.0) == (0.5, 0.0)


def test_encoders_miss_some_features_beyond_250_in_training():
    mosaic = Mosaic.from_mudata(simulate_mosaic(60, {"rna": 1000, "adt": 200}, seed=0)[0])
    guide = MultiVI(mosaic, input_dropout=0.4).guide
    views = measured(mosaic, np.arange(60)).observed
    seen: dict[str, list[torch.Tensor]] = {"rna": [], "adt": []}
    for name, part in guide.modalities.items():
        encoder = part.encoder
        encoder.hidden.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
        scaled = encoder.scaling(views[name])
        for training in (True, False):
            encoder.train(training)(views[name])
        in_training, afterwards = (x[:, : scaled.shape[1]] for x in seen[name])
        torch.testing.assert_close(afterwards, scaled)
        missing = (in_training == 0) & (scaled != 0)
        assert abs(missing.float().mean() - (0.3 if name == "rna" else 0.0)) < 0.02  # 0.4 of 750 in a thousand
        torch.testing.assert_close(in_training[~missing], scaled[~missing] / (1 - (0.3 if name == "rna" else 0.0)))


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


def test_the_log_takes_weights_of_divergences_out(mdata):
    mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
    model = MultiVI(mosaic, n_latent=3, n_hidden=8, n_private=2, private_kl=3.0, library="latent")
    minibatch, elbo, parts = measured(mosaic, np.arange(mosaic.n_cells)), MosaicELBO(), []
    for kl_weight in (0.25, 1.0):
        torch.manual_seed(0)
        elbo.loss(model.model, model.guide, minibatch, kl_weight)
        assert elbo.latent["z"] == kl_weight and elbo.latent["z_rna"] == 3 * kl_weight
        assert elbo.latent["rna_library"] == 1.0
        parts.append({name: float(elbo.terms[name]) / weight for name, weight in elbo.latent.items()})
    assert parts[0] == pytest.approx(parts[1], rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.975, 1.0])
def test_dropout_leaves_out_its_share_and_keeps_the_expectation(p):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.full((203, 333), 2.0, requires_grad=True)  # of no round number of random words
    y = dropout(x)
    left = (y == 0).double().mean().item()
    assert abs(left - p) < 4 * (p * (1 - p) / x.numel()) ** 0.5 + 1e-5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 2 / (1 - p) if p < 1 else 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() / 2)  # by the same mask
    among_neighbours = (y[:, 1:] == 0) & (y[:, :-1] == 0)  # bits of one word are independent
    assert abs(among_neighbours.double().mean().item() - p**2) < 0.01
    assert torch.equal(dropout.eval()(x), x)
