"""Uncertainty of the weights of a trained decoder, by Laplace's method."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

from pyromosaic.data import Minibatch


class UncertainLinear(nn.Linear):
    """A linear layer whose weights get a normal posterior after training.

    The posterior is normal around the trained weights. For output f its precision is ``F_f * A + 1 / s**2``. A is the
    sum over cells of the outer products of the inputs (with a 1 for the bias). F_f is the mean over cells of the
    squared derivative of the log-likelihood by output f, its empirical Fisher information. s**2 is the mean square of
    the weights of the layer, used as the variance of a prior. This is Laplace's approximation with a Kronecker
    factorisation (Ritter, Botev and Barber 2018) whose factor for the outputs is diagonal. A decoder computes with a
    draw as if it were linear in its weights (Immer, Korzepa and Bauer 2021), for which the approximation is made.
    Decoded with the drawn weights themselves, layer after layer, effects shrink towards 0.

    To include a decoder that you wrote, use such layers, with a bias, instead of `torch.nn.Linear`.

    Parameters
    ----------
    in_features, out_features
        Width of inputs and outputs.
    last
        Whether the outputs are those of the decoder: then value and derivative are added at once, which is faster.
    """

    products: Tensor
    information: Tensor
    precision: Tensor

    def __init__(self, in_features: int, out_features: int, last: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.last = last
        self.register_buffer("products", torch.zeros(in_features + 1, in_features + 1))
        self.register_buffer("information", torch.zeros(out_features))
        self.register_buffer("precision", torch.tensor(torch.inf))  # sure, as long as nothing was learnt
        self.drawn: tuple[Tensor, Tensor] | None = None

    def learn(self, products: Tensor, information: Tensor) -> None:
        """Set the posterior from A, shape (in + 1, in + 1), and F, shape (out,)."""
        self.products.copy_(products)
        self.information.copy_(information)
        self.precision.copy_(1 / self.weight.detach().square().mean())

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Deviations of weights and bias from the trained ones, drawn from the posterior."""
        spectrum, basis = torch.linalg.eigh(self.products)
        noise = torch.randn(len(spectrum), len(self.information), generator=generator).to(basis)
        precision = spectrum.clamp_min(0.0).unsqueeze(-1) * self.information + self.precision
        deviation = (basis @ (noise * precision.rsqrt())).T
        return deviation[:, :-1], deviation[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape (..., out), of inputs of shape (..., in); with a draw, a dual number (see `weights_set`)."""
        if self.drawn is None:
            return super().forward(x)
        if self.last:
            value, slope = forward_ad.unpack_dual(x)
            return self.moved(value, slope, self.drawn)
        trained = self.weight.detach(), self.bias.detach()
        return linear(x, *map(forward_ad.make_dual, trained, self.drawn))

    def moved(
        self, x: Tensor, slope: Tensor | None, drawn: tuple[Tensor, Tensor] | None, columns: Any = slice(None)
    ) -> Tensor:
        """Outputs plus their derivative in the direction of a draw.

        Parameters
        ----------
        x, slope
            Inputs, and their derivative in that direction; None for 0.
        drawn
            Deviations of weights and bias, from `draw`; None for none.
        columns
            The outputs to compute.
        """
        weight, bias = self.weight.detach()[columns], self.bias.detach()[columns]
        if drawn is None:
            return linear(x, weight, bias)
        bias = bias + drawn[1][columns]
        y = linear(x if slope is None else x + slope, weight, bias)
        y.flatten(0, -2).addmm_(x.flatten(0, -2), drawn[0][columns].T)
        return y


def _layers(module: nn.Module) -> list[UncertainLinear]:
    return [part for part in module.modules() if isinstance(part, UncertainLinear)]


#: Deviations of weights and bias of each `UncertainLinear` layer of a decoder from the trained ones.
Weights = Sequence[tuple[Tensor, Tensor]]


def draw_weights(module: nn.Module, seed: int) -> Weights:
    """Draw the weights of a decoder from their posterior.

    Parameters
    ----------
    module
        The decoder; its `UncertainLinear` layers are drawn.
    seed
        Seed of the draw; equal seeds give equal weights. The random state of the caller does not change.

    Returns
    -------
    Weights
        Needs as much memory as these layers.
    """
    generator = torch.Generator().manual_seed(seed)
    return [layer.draw(generator) for layer in _layers(module)]


@contextmanager
def weights_set(*decoders: tuple[nn.Module, Weights]) -> Iterator[None]:
    """Context in which decoders compute with weights from `draw_weights`, as if they were linear in them."""
    hooks = [decoder.register_forward_hook(lambda module, x, y: _linearised(y)) for decoder, _ in decoders]
    layers = [each for decoder, weights in decoders for each in zip(_layers(decoder), weights, strict=True)]
    try:
        for layer, drawn in layers:
            layer.drawn = drawn
        with forward_ad.dual_level():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, _ in layers:
            layer.drawn = None


def _linearised(output: Any) -> Any:
    """The value at the trained weights plus its derivative in the direction of the draw."""
    if not isinstance(output, Tensor):
        return {name: _linearised(value) for name, value in output.items()}
    value, derivative = forward_ad.unpack_dual(output)
    return value if derivative is None else value + derivative


def learn_weights(model: nn.Module, guide: nn.Module, name: str, minibatches: Iterable[Minibatch], n: int) -> None:
    """Fit the posterior of the weights of a modality's decoder.

    Parameters
    ----------
    model, guide
        The trained Pyro program.
    name
        The modality.
    minibatches
        Measured cells, on the device.
    n
        Total number of cells that have the modality; the minibatches are a sample of them.
    """
    story: Any = model
    layers = _layers(story.modalities[name].decoder)
    inputs: dict[Any, Tensor] = {}
    outputs: dict[Any, Tensor] = {}
    n_seen = 0
    for minibatch in minibatches if layers else ():
        calls: dict[Any, tuple[Tensor, Tensor]] = {}

        def note(layer: nn.Module, x: tuple[Tensor, ...], y: Tensor, calls: Any = calls) -> Tensor:
            y = y if y.requires_grad else y.requires_grad_()  # weights may be frozen
            calls[layer] = (x[0], y)
            return y

        with ExitStack() as hooks, torch.enable_grad():
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(note))
            guide_trace = poutine.trace(guide).get_trace(minibatch)
            trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(minibatch)
            log_prob = sum(
                scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"]).sum()
                for site in prune_subsample_sites(trace).nodes.values()
                if site["type"] == "sample"
            )
            if not calls:  # the program does not use the decoder
                return
            slopes = torch.autograd.grad(log_prob, [y for _, y in calls.values()], allow_unused=True)
        for (layer, (x, _)), slope in zip(calls.items(), slopes, strict=True):
            if slope is None:
                continue
            x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1).detach().flatten(0, -2)
            inputs[layer] = inputs.get(layer, torch.zeros(())) + x.T @ x
            outputs[layer] = outputs.get(layer, torch.zeros(())) + slope.flatten(0, -2).square().sum(0)
        n_seen += len(minibatch.decoded[name].rows)
    for layer, products in inputs.items():
        layer.learn(products * (n / n_seen), outputs[layer] / n_seen)
