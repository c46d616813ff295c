"""Real and non-negative values."""

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyromosaic.data import TRAITS, ModalitySchema, View
from pyromosaic.distributions import (
    Log1pNormal,
    ZeroInflatedGamma,
    ZeroInflatedLogNormal,
)
from pyromosaic.likelihoods.likelihood import Likelihood, Predictors, logit


class Normal(Likelihood):
    """Real values: ``x ~ Normal(loc, sigma)``, sigma per feature.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "normal"
    traits = TRAITS["normal"]
    pointwise = True
    predictors = ("loc",)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_sigma = nn.Parameter(torch.zeros(schema.n_features))

    def transform(self, x: Tensor) -> Tensor:
        """The scale on which the values are normal."""
        return x

    def start(self, view: View) -> dict[str, Tensor]:
        """Mean and standard deviation of each feature."""
        x = self.transform(view.dense_counts())
        with torch.no_grad():
            self.log_sigma.copy_(view.spread(x).clamp_min(1e-3).log())
        return {"loc": view.over_cells(x)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Normal of every cell and feature."""
        return dist.Normal(predictors["loc"], self.log_sigma.exp())


class Log1pNormalLikelihood(Normal):
    """Non-negative values: ``log(1 + x) ~ Normal(loc, sigma)``.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "log1p_normal"
    traits = TRAITS["log1p_normal"]
    pointwise = True

    def transform(self, x: Tensor) -> Tensor:
        """``log(1 + x)``."""
        return torch.log1p(x)

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Log1p-normal of every cell and feature."""
        return Log1pNormal(predictors["loc"], self.log_sigma.exp())


class ZILN(Likelihood):
    """Non-negative values with exact zeros: 0 with probability ``sigmoid(gate)``, else ``LogNormal(loc, sigma)``.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "ziln"
    traits = TRAITS["ziln"]
    pointwise = True
    predictors = ("loc", "gate")

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_sigma = nn.Parameter(torch.zeros(schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Share of zeros, and mean and standard deviation of the logarithm of the other values, per feature."""
        x = view.dense_counts()
        positive = (x > 0).to(x.dtype)
        n = positive.sum(0).clamp_min(1.0)
        log_x = torch.where(x > 0, x.clamp_min(1e-30).log(), torch.zeros_like(x))
        loc = log_x.sum(0) / n
        sd = ((positive * (log_x - loc)).square().sum(0) / n).sqrt()
        with torch.no_grad():
            self.log_sigma.copy_(sd.clamp_min(1e-2).log())
        return {"loc": loc, "gate": logit(1 - view.over_cells(positive)).clamp(-5.0, 5.0)}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated log-normal of every cell and feature."""
        return ZeroInflatedLogNormal(predictors["loc"], self.log_sigma.exp(), gate_logits=predictors["gate"])


class ZIG(Likelihood):
    """Non-negative values with exact zeros, of probability ``sigmoid(gate)``; else ``Gamma(softplus(shape), rate)``.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "zig"
    traits = TRAITS["zig"]
    pointwise = True
    predictors = ("shape", "gate")

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_rate = nn.Parameter(torch.zeros(schema.n_features))

    def start(self, view: View) -> dict[str, Tensor]:
        """Share of zeros, and shape and rate of the other values by the method of moments, per feature."""
        x = view.dense_counts()
        positive = (x > 0).to(x.dtype)
        n = positive.sum(0).clamp_min(1.0)
        mean = (x.sum(0) / n).clamp_min(1e-6)
        variance = ((positive * (x - mean)).square().sum(0) / n).clamp_min(1e-6)
        shape = (mean.square() / variance).clamp(0.1, 100.0)
        with torch.no_grad():
            self.log_rate.copy_((shape / mean).log())
        return {
            "shape": shape + torch.log(-torch.expm1(-shape)),
            "gate": logit(1 - view.over_cells(positive)).clamp(-5.0, 5.0),
        }

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Zero-inflated gamma of every cell and feature."""
        concentration = softplus(predictors["shape"]) + 1e-8
        return ZeroInflatedGamma(concentration, self.log_rate.exp(), gate_logits=predictors["gate"])
