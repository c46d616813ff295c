"""Running a trained program without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import nn

from pyromosaic.threads import one_thread


@contextmanager
def inference_mode(*modules: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Context without dropout, gradients, validation and other threads; with a seed, the caller's random state stays.

    Parameters
    ----------
    *modules
        Modules to set to evaluation mode; their mode is restored afterwards.
    seed
        Seed of PyTorch's random numbers; None continues the caller's.

    Examples
    --------
    >>> network = nn.Dropout(0.5)
    >>> with inference_mode(network, seed=0):
    ...     network(torch.ones(3))
    tensor([1., 1., 1.])
    >>> network.training
    True
    """
    with one_thread:
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
