"""The deterministic program of scMODAL (Wang et al. 2025): plain networks, and a point instead of a posterior."""

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import Minibatch, ModalitySchema, View
from pyromosaic.likelihoods import Likelihood, Predictors
from pyromosaic.nn import InputScaling
from pyromosaic.priors import StandardNormal


class Flat(StandardNormal):
    """A prior that is the same everywhere; prior predictive draws are from a standard normal."""

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return super().forward(minibatch).mask(False)


class PlainEncoder(nn.Module):
    """One hidden layer of ReLU units, from scaled measurements to a point."""

    def __init__(self, schema: ModalitySchema, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.scaling = InputScaling(schema)
        self.network = nn.Sequential(nn.Linear(schema.n_features, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_latent))

    def start(self, view: View) -> None:
        """Learn the input scaling from the cells of a view."""
        self.scaling.start(view)

    def posterior(self, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """The point, and standard deviations of 0, given scaled measurements, shape (b, features)."""
        loc = self.network(x)
        return loc, torch.zeros_like(loc)

    def forward(self, view: View) -> tuple[Tensor, Tensor]:
        """The point, and standard deviations of 0, each of shape (b, latent)."""
        return self.posterior(self.scaling(view), view)


class PlainDecoder(nn.Module):
    """One hidden layer of ReLU units, from z to scaled measurements."""

    def __init__(self, schema: ModalitySchema, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(n_latent, n_hidden), nn.ReLU(), nn.Linear(n_hidden, schema.n_features))

    def forward(self, z: Tensor, view: View) -> dict[str, Tensor]:
        """The predictor ``loc``, shape (..., b, features)."""
        return {"loc": self.network(z)}


class MeanSquare(Likelihood):
    """Mean square over features of scaled measurements minus ``loc``, as a normal likelihood.

    A normal with a variance of half the number of features has this log-likelihood, up to constants. The variance is a
    weight rather than the spread of measurements: predictions are the point, on the scale of the measurements, that
    ``loc`` stands for.
    """

    predictors = ("loc",)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.scaling = InputScaling(schema)

    def start(self, view: View) -> dict[str, Tensor]:
        """Learn the scaling."""
        self.scaling.start(view)
        return {}

    def forward(self, name: str, predictors: Predictors, view: View, kl_weight: float = 1.0) -> None:
        """The observed site, or a point as prediction."""
        if view.counts is None:
            pyro.sample(name, self.distribution(predictors, view))
        else:
            n = self.schema.n_features if view.measured is None else view.measured.sum(-1, keepdim=True)
            scale = (n / 2) ** 0.5
            pyro.sample(name, dist.Normal(predictors["loc"], scale), obs=self.scaling(view))

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """The point, batch shape (..., b, features)."""
        return dist.Delta(self.scaling.measured(predictors["loc"], view))

    def seen(self, predictors: Predictors) -> Tensor:
        """Expected measurements as an encoder sees them: ``loc`` itself."""
        return predictors["loc"]
