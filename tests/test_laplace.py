"""The posterior of a trained decoder's weights."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from torch import nn

from pyromosaic import Mosaic, MultiVI, ScModal, simulate
from pyromosaic.data import measured
from pyromosaic.laplace import UncertainLinear, draw_weights, learn_weights, weights_set
from pyromosaic.penalties import Anchors
from pyromosaic.tasks import inference_mode


@pytest.fixture(scope="module")
def model():
    mosaic = Mosaic.from_mudata(simulate(200, {"rna": 30, "adt": 8}, seed=0)[0], batch_key="batch")
    model = MultiVI(mosaic, n_latent=3, n_hidden=16)
    model.train(5, batch_size=64, progress_bar=False)
    return model


def test_draws_have_the_posterior_covariance():
    torch.manual_seed(0)
    layer, x = UncertainLinear(3, 2), torch.randn(50, 4)
    products, information = x.T @ x, torch.tensor([0.5, 4.0])
    layer.learn(products, information)
    draws = []
    for seed in range(4000):
        ((weight, bias),) = draw_weights(layer, seed)
        draws.append(torch.cat([weight, bias[:, None]], dim=1))
    found = torch.stack(draws)  # draws × out × in + 1
    assert_allclose(found.mean(0), 0, atol=0.02)
    for f in range(2):
        prior = torch.eye(4) / layer.weight.detach().square().mean()
        expected = torch.linalg.inv(information[f] * products + prior)
        assert_allclose(torch.cov(found[:, f].T), expected, atol=0.06 * float(expected.diag().max()))
    assert abs(np.corrcoef(found[:, 0, 0], found[:, 1, 0])[0, 1]) < 0.06  # outputs are independent


def test_regression_with_known_noise_is_exact():
    """The empirical Fisher information is the true one on average: the posterior is that of Bayesian regression."""
    torch.manual_seed(0)
    x, sd = torch.randn(20_000, 3), 0.5
    y = x @ torch.tensor([[1.0, -2.0, 0.5]]).T + 0.3 + sd * torch.randn(20_000, 1)
    layer = UncertainLinear(3, 1)
    inputs = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, y).solution.T
    with torch.no_grad():
        layer.weight.copy_(solution[:, :3])
        layer.bias.copy_(solution[:, 3])
    slope = (y - layer(x)) / sd**2
    layer.learn(inputs.T @ inputs, slope.square().mean(0).detach())
    exact = torch.linalg.inv(inputs.T @ inputs / sd**2)
    precision = layer.products * layer.information + layer.precision * torch.eye(4)
    assert_allclose(torch.linalg.inv(precision), exact, rtol=0.05, atol=1e-7)


def test_what_is_learnt_is_products_of_inputs_and_squared_slopes(model):
    """Against derivatives of each cell's log-likelihood, taken one by one."""
    head = model.model.modalities["rna"].decoder.heads["rate"]
    minibatch = measured(model.mosaic, np.arange(40))
    with inference_mode(model.model, model.guide, seed=1):
        learn_weights(model.model, model.guide, "rna", [minibatch], 400)
    products, information = head.products.clone(), head.information.clone()
    calls = []
    hook = head.register_forward_hook(lambda layer, x, y: calls.append((x[0], y)))
    with inference_mode(model.model, model.guide, seed=1), torch.enable_grad():
        guide_trace = poutine.trace(model.guide).get_trace(minibatch)
        trace = poutine.trace(poutine.replay(model.model, trace=guide_trace)).get_trace(minibatch)
        log_prob = trace.nodes["rna"]["fn"].log_prob(trace.nodes["rna"]["value"]).sum(-1).flatten()
        (x, y), squares = calls[0], 0
        for value in log_prob:
            slope = torch.autograd.grad(value, y, retain_graph=True)[0].reshape(-1, 30)
            squares = squares + slope.square().sum(0)
    hook.remove()
    n = len(minibatch.decoded["rna"].rows)
    assert_allclose(information, squares / n, rtol=1e-4)
    x = torch.cat([x.detach().flatten(0, -2), torch.ones(n, 1)], dim=1)
    assert_allclose(products, x.T @ x * 400 / n, rtol=1e-4, atol=1e-3)
    model.finish(model.mosaic)


def test_decoders_are_linear_in_what_is_drawn(model):
    """Against the derivative along the draw by central differences; twice the draw, twice the change."""
    decoder = model.model.modalities["adt"].decoder
    view = measured(model.mosaic, np.arange(20)).decoded["adt"]
    z, drawn = torch.randn(len(view.rows), 3), draw_weights(decoder, 2)
    trained = decoder(z, view)
    layers = [part for part in decoder.modules() if isinstance(part, UncertainLinear)]

    def moved(step):
        with torch.no_grad():
            for layer, (weight, bias) in zip(layers, drawn, strict=True):
                layer.weight += step * weight
                layer.bias += step * bias
            found = decoder.double()(z.double(), view)
            decoder.float()
            for layer, (weight, bias) in zip(layers, drawn, strict=True):
                layer.weight -= step * weight
                layer.bias -= step * bias
        return found

    ahead, behind = moved(0.001), moved(-0.001)  # small, so that no unit turns on or off
    with weights_set((decoder, drawn)):
        once = decoder(z, view)
    with weights_set((decoder, [(2 * weight, 2 * bias) for weight, bias in drawn])):
        twice = decoder(z, view)
    for name, value in trained.items():
        slope = (ahead[name] - behind[name]) / 0.002
        assert slope.abs().max() > 0.1
        assert_allclose((once[name] - value).detach(), slope.detach(), atol=0.005 * float(slope.abs().max()))
        assert_allclose((twice[name] - value).detach(), 2 * (once[name] - value).detach(), atol=1e-4)


def test_untrained_layers_are_sure():
    layer, x = UncertainLinear(4, 3), torch.randn(5, 4)
    with weights_set((layer, draw_weights(layer, 0))):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_draws_are_reproducible_and_leave_the_weights(model):
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    first, again = (model.get_imputed_values("adt", n_samples=4, seed=5) for _ in range(2))
    assert torch.equal(torch.randn(2), expected)  # the caller's random numbers are left alone
    assert first.mean.equals(again.mean)
    assert not first.mean.equals(model.get_imputed_values("adt", n_samples=4, seed=6).mean)
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    assert all(m.drawn is None for m in model.model.modules() if isinstance(m, UncertainLinear))


def test_all_cells_share_a_draw_of_weights(model):
    """With z at hand, a cell's value does not depend on which other cells are asked for."""
    decoder = model.model.modalities["rna"].decoder
    view = measured(model.mosaic, np.arange(20)).decoded["rna"]
    z = torch.randn(len(view.rows), 3)
    with weights_set((decoder, draw_weights(decoder, 1))):
        whole = decoder(z, view)["rate"]
    with weights_set((decoder, draw_weights(decoder, 1))):
        again = decoder(z, view)["rate"]
    assert torch.equal(whole, again)
    assert not torch.equal(whole, decoder(z, view)["rate"])


def test_the_uncertainty_of_weights_is_part_of_intervals_and_saved(model, tmp_path):
    wide = model.get_imputed_values("rna", n_samples=100).sd.to_numpy()
    model.save(tmp_path)
    again = MultiVI.load(tmp_path, data=model.mosaic)
    assert_allclose(again.get_imputed_values("rna", n_samples=100).sd, wide, rtol=1e-5)
    for layer in again.model.modules():
        if isinstance(layer, UncertainLinear):
            layer.precision.fill_(torch.inf)  # sure
    narrow = again.get_imputed_values("rna", n_samples=100).sd.to_numpy()
    assert np.median(wide / narrow) > 1.05


def test_more_cells_make_surer():
    spread = []
    for n in (100, 3000):
        mosaic = Mosaic.from_mudata(simulate(n, {"rna": 30}, seed=0)[0], batch_key="batch")
        model = MultiVI(mosaic, n_latent=3, n_hidden=16)
        model.train(max_steps=60, n_epochs=60, batch_size=64, progress_bar=False)
        layer = model.model.modalities["rna"].decoder.heads["rate"]
        spectrum = torch.linalg.eigvalsh(layer.products)
        spread.append(float((spectrum[:, None] * layer.information + layer.precision).rsqrt().mean()))
    assert spread[1] < 0.8 * spread[0]


def test_a_deterministic_program_stays_sure():
    mdata, truth = simulate(60, {"rna": 50, "adt": 25}, patterns=["rna", "adt"], links={"adt": 1.0})
    links = truth.links.rename(columns={"gene": "rna", "feature": "adt"})[["rna", "adt"]]
    options, training = ScModal.presets["reference"]
    model = ScModal(Mosaic.from_mudata(mdata), links, **options | {"anchors": Anchors(1.0, n_neighbors=5)})
    model.train(**training | {"max_steps": 2}, progress_bar=False)
    assert_allclose(model.get_imputed_values("adt", n_samples=3).sd, 0, atol=1e-6)
