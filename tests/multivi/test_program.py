"""The programs of MultiVI, its loss and its penalties."""

import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch
from mosaics import small
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pyromosaic import ContrastiveVI, ModalitySpec, Mosaic, MultiVI
from pyromosaic.data import measured
from pyromosaic.data import simulate as simulate_mosaic
from pyromosaic.fusion import Posterior
from pyromosaic.measurement import encoded
from pyromosaic.nn import Dropout
from pyromosaic.penalties import Jeffreys, MeanDistance, discrepancy
from pyromosaic.train import MosaicELBO

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
        "adt": (n["adt"], 8),
    }
    assert n == {"rna": 20, "atac": 20, "adt": 20}
    assert {site["scale"] for name, site in trace.nodes.items() if name in shapes} == {mosaic.n_cells / 35}
    assert trace.nodes["rna"]["is_observed"] and not trace.nodes["z"]["is_observed"]


def nb(mu, theta, counts):
    """Log-probabilities of the negative binomial as torch has it."""
    return torch.distributions.NegativeBinomial(theta, logits=(mu / theta).log()).log_prob(counts)


def test_loss_equals_the_formulas(data):
    """Negative log-likelihoods, analytic divergences and the Jeffreys penalty, each written out again."""
    specs = {name: ModalitySpec(kind, batch_key="batch") for name, kind in (("rna", "nb"), ("atac", "bernoulli"))}
    specs["adt"] = ModalitySpec("nb_mixture", batch_key="batch", background="latent")
    mosaic = Mosaic.from_mudata(data, specs)
    model = small(mosaic, left_out=0.0, jeffreys=3.0, mmd=7.0, prior="normal")
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
    model = small(mosaic, left_out=0.0, prior="normal")
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
    with pytest.raises(ValueError, match="from 0 to"):
        Jeffreys(-1.0)


# Encoders, the log, the import


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
