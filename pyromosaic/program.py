"""What a Pyro model or guide over a mosaic shares: its parameters are its own, and its plates have one form."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn

from pyromosaic.data import Minibatch


class weighted(Messenger):
    """Effect handler: the log densities of sites inside count this many times.

    Beyond what `pyro.poutine.scale` does it remembers the weight, so that `pyromosaic.train.MosaicELBO` can say what
    the bound is without it. As there, a latent site needs the same weight in model and guide.

    Parameters
    ----------
    weight
        How many times.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Message) -> None:
        msg["scale"] = msg["scale"] * self.weight
        msg["infer"]["weight"] = msg["infer"].get("weight", 1.0) * self.weight


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


def _itself(parameter: Tensor) -> Tensor:
    return parameter


class Program(PyroModule):
    """A model or a guide: a `pyro.nn.PyroModule` called with a minibatch and a KL weight.

    Parameters stay local to the module whatever Pyro's ``module_local_params`` setting is elsewhere in the process, so
    several models, and a user's own programs, never share parameters by accident.
    """

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""
        for parameter in self.parameters():
            # pyro.infer.SVI asks each parameter for the tensor to optimise, and plain ones do not answer in local mode.
            if not hasattr(parameter, "unconstrained"):
                parameter.unconstrained = partial(_itself, parameter)
        with pyro.settings.context(module_local_params=True):
            return super().__call__(*args, **kwargs)

    @staticmethod
    def container(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
        """A dictionary of modules in which Pyro finds priors and parameters."""
        return PyroModule[nn.ModuleDict](modules)

    @staticmethod
    @contextmanager
    def cells(name: str, minibatch: Minibatch) -> Iterator[None]:
        """Plate of the cells that have a modality (dim -2), scaled to all cells."""
        n_cells = len(minibatch.decoded[name].rows)
        with poutine.scale(scale=minibatch.scale), pyro.plate(f"{name}_cells", n_cells, dim=-2):
            yield

    @staticmethod
    @contextmanager
    def plates(name: str, minibatch: Minibatch, n_features: int) -> Iterator[None]:
        """Plates of the cells that have a modality (dim -2) and of its features (dim -1), scaled to all cells."""
        with Program.cells(name, minibatch), pyro.plate(f"{name}_features", n_features, dim=-1):
            yield
