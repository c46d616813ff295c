"""The sleep phase: a trained guide is fitted to cells drawn from its model, whose latent variables are known."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from pyromosaic.accepted import Positive, Seed, Whole, checked
from pyromosaic.data import Minibatch
from pyromosaic.program import AtMean
from pyromosaic.progress import Bar, shown
from pyromosaic.train.drawn import (
    cell_sites,
    draw_prior,
    drawn_minibatch,
    shared_variables,
    trace,
    without_penalties,
)
from pyromosaic.train.plan import NonFiniteLossError
from pyromosaic.train.steps import minimise


@checked
def sleep(
    model: nn.Module,
    guide: nn.Module,
    minibatches: Iterable[Minibatch],
    n_steps: Whole = 200,
    learning_rate: Positive = 3e-3,
    *,
    means: bool = True,
    seed: Seed = 0,
    progress_bar: bool | Bar = False,
) -> np.ndarray:
    """Fit a trained guide to cells drawn from the trained model, so that its posteriors are as wide as they should be.

    Each step draws latent variables and measurements from the model for the cells of a minibatch, and minimises
    ``-log q(latent variables | measurements)``. This is the forward Kullback-Leibler divergence from the posterior to
    the guide; the ELBO has the reverse divergence, which makes posteriors too narrow. The drawn cells have the
    modalities, covariates and sizes of the real ones. The parameters of the model do not change. If means may change,
    the penalties of the guide stay in the loss, on the measured cells, so that the modalities stay aligned.

    Parameters
    ----------
    model, guide
        The trained Pyro program; parameters of the guide that are also the model's stay as they are. The sites of cells
        are those in the plates ``cells`` and ``<modality>_cells``.
    minibatches
        Measured cells, repeated as often as needed.
    n_steps
        Number of steps; 0 does nothing.
    learning_rate
        Learning rate of Adam at the first step; it falls to 0 along a cosine.
    means
        Whether the means of the posteriors may change too. If not, only those parameters are fitted that set widths and
        no mean: latent representations stay as they are.
    seed
        Seed of all draws; the caller's random numbers do not change.
    progress_bar
        Whether to show a progress bar; or the bar of a larger task, to be advanced by these steps.

    Returns
    -------
    numpy.ndarray
        ``-log q`` per drawn cell at each step. It is empty if no latent variable of cells has a density in the guide,
        for example if the guide gives points, or, with a warning, if the model does not explain a modality; then
        nothing changes.

    Raises
    ------
    NonFiniteLossError
        If parameters of the model or the loss are not finite. After an error or Ctrl-C, the guide is as before.

    References
    ----------
    Hinton, Dayan, Frey and Neal, The wake-sleep algorithm for unsupervised neural networks, Science 1995; Papamakarios
    and Murray, Fast epsilon-free inference of simulation models with Bayesian conditional density estimation, 2016.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import loader
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0])
    >>> model = MultiVI(mosaic, n_latent=3)
    >>> model.train(n_epochs=2, sleep_steps=0, progress_bar=False)
    >>> losses = sleep(model.model, model.guide, loader(mosaic, mosaic.find(None), 32, seed=0), n_steps=5)
    >>> len(losses)
    5
    """
    known = {id(parameter) for parameter in model.parameters()}
    parts: Any = guide
    own: list[torch.optim.Optimizer] = [part.optimiser() for part in parts.modules() if hasattr(part, "optimiser")]
    known |= {id(parameter) for optimiser in own for group in optimiser.param_groups for parameter in group["params"]}
    parameters = [p for p in guide.parameters() if id(p) not in known and p.requires_grad]
    if n_steps == 0 or not parameters:
        return np.zeros(0)
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise NonFiniteLossError("the model has parameters that are not finite; train it with a lower learning rate")
    if not means:
        parameters = _of_widths(guide, minibatches, parameters)
        if not parameters:
            return np.zeros(0)
    device, before = parameters[0].device, {k: v.clone() for k, v in guide.state_dict().items()}
    values: list[Tensor] = []

    def losses() -> Iterator[Tensor]:
        with shown(progress_bar, "Widths of posteriors", n_steps) as bar:
            if bar is not None:
                bar.say("Training, widths of posteriors")
            for minibatch in chain.from_iterable(repeat(minibatches)):
                minibatch = minibatch.to(device)
                value = _surprise(model, guide, minibatch)
                if value is None:
                    return
                values.append(value.detach())
                if not torch.isfinite(value):
                    raise NonFiniteLossError(f"the loss of the sleep phase is not finite at step {len(values)}")
                if bar is not None:
                    bar.advance()
                yield value + _penalties(guide, minibatch) if means else value
                for optimiser in own:
                    optimiser.step()
                    optimiser.zero_grad()

    with torch.random.fork_rng(), pyro.validation_enabled(False), torch.enable_grad(), _settled(model, guide):
        torch.manual_seed(seed)
        try:
            minimise(losses(), parameters, learning_rate, n_steps, gradient_clip=10.0)
        except BaseException:
            guide.load_state_dict(before)
            raise
    return np.array([float(value) for value in values[:n_steps]])


@contextmanager
def _settled(model: nn.Module, guide: nn.Module) -> Iterator[None]:
    """Networks without dropout, as in use; the guide itself leaves modalities out as in training."""
    modes = [(module, module.training) for program in (model, guide) for module in program.modules()]
    fixed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    guide.eval()
    guide.training = True
    for parameter, _ in fixed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, free in fixed:
            parameter.requires_grad_(free)


def _surprise(model: Any, guide: Any, minibatch: Minibatch) -> Tensor | None:
    """Minus the log density, per cell, that the guide gives to what cells were drawn with; None if it has none."""
    with without_penalties(guide):
        shared = shared_variables(guide, minibatch)
        drawn = draw_prior(model, minibatch, shared)
        missing = minibatch.decoded.keys() - drawn.nodes.keys()
        if missing:
            names = ", ".join(map(repr, sorted(missing)))
            warnings.warn(f"no sleep phase: the model has no site {names}, so that cells cannot be drawn", stacklevel=2)
            return None
        simulated = drawn_minibatch(model, minibatch, drawn)
        inferred = trace(poutine.replay(guide, trace=drawn), simulated)
    total = None
    for name, site, _ in cell_sites(inferred, simulated):
        if name in drawn.nodes and not isinstance(site["fn"], dist.Delta):
            density = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]).sum()
            total = -density if total is None else total - density
    return None if total is None else total / len(minibatch)


def _of_widths(guide: Any, minibatches: Iterable[Minibatch], parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that change the width of a posterior of cells and the mean of none."""
    changing: dict[str, set[int]] = {"stddev": set(), "mean": set()}
    for minibatch in islice(minibatches, 20):  # not every one has a rare modality
        minibatch = minibatch.to(parameters[0].device)
        with torch.enable_grad(), without_penalties(guide), AtMean():
            sites = [site["fn"] for _, site, _ in cell_sites(trace(guide, minibatch), minibatch)]
        for moment, found in changing.items():
            values = [getattr(fn, moment) for fn in sites if not isinstance(fn, dist.Delta)]
            values = [value.sum() for value in values if value.requires_grad]
            if values:
                slopes = torch.autograd.grad(values, parameters, retain_graph=True, allow_unused=True)
                found |= {id(p) for p, slope in zip(parameters, slopes, strict=True) if slope is not None}
    return [p for p in parameters if id(p) in changing["stddev"] - changing["mean"]]


def _penalties(guide: Any, minibatch: Minibatch) -> Tensor:
    """Penalties on the measured cells, per cell."""
    total = torch.zeros((), device=minibatch.index.device)
    for site in trace(guide, minibatch).nodes.values():
        if site["type"] == "sample" and isinstance(site["fn"], dist.Unit):
            # a factor of a guide enters a loss with a plus
            total = total + scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()
    return total / minibatch.n_cells
