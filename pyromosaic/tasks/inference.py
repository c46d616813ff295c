"""Running a trained program without changing it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import nn


class AtMean(Messenger):
    """Effect handler: unobserved sites take the mean of their distribution instead of a draw.

    Parameters
    ----------
    which
        Says by a site's name whether it is to take its mean; by default all do.
    """

    def __init__(self, which: Callable[[str], bool] = lambda name: True) -> None:
        super().__init__()
        self.which = which

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and isinstance(msg["fn"], TorchDistributionMixin) and self.which(msg["name"] or ""):
            msg["value"] = msg["fn"].mean
            msg["done"] = True


@contextmanager
def inference_mode(*modules: nn.Module, seed: int | None = None) -> Iterator[None]:
    """No dropout, no gradients, no validation; with a seed, random numbers that leave the caller's stream alone."""
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.random.fork_rng(enabled=seed is not None), torch.no_grad(), pyro.validation_enabled(False):
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
