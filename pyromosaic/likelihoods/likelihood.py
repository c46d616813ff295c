"""Base classes of likelihoods."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import ClassVar, Self

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyromosaic.data import DataKind, ModalitySchema, Traits, View

Predictors = Mapping[str, Tensor]


def logit(p: Tensor) -> Tensor:
    """Log odds of a probability, kept away from 0 and 1.

    Parameters
    ----------
    p
        Probabilities, of any shape.

    Returns
    -------
    Tensor
        Log odds in nats, of the same shape.
    """
    return torch.logit(p, eps=1e-6)


class Likelihood(PyroModule):
    """Base class of likelihoods; a subclass defines `distribution` and names its `predictors`.

    Parameters
    ----------
    schema
        The modality.

    Attributes
    ----------
    data_kind
        Kind of values that registration accepts: ``"count"``, ``"nonnegative"`` or ``"real"``.
    traits
        Use it in place of `data_kind` to set more, e.g. whether sizes of cells matter, and how groups of cells are
        compared; see `pyromosaic.data.Traits`.
    pointwise
        Whether a feature's distribution depends on its own predictors and parameters alone, unlike with proportions.
        Then many features are decoded block by block. A subclass that is pointwise says so again.
    predictors
        Names of the decoder's outputs, each of shape (..., cells, features).
    posterior_predictors
        Names of the outputs of a decoder in the guide, for the `posterior` of the likelihood's own latent variables.
    """

    family: ClassVar[str] = ""  # the name that `pyromosaic.ModalitySpec` accepts; empty for a user's likelihood
    traits: ClassVar[Traits] = Traits()  # properties of the measurement
    data_kind: ClassVar[DataKind]  # usually the only trait that a user's likelihood has to set
    pointwise: ClassVar[bool] = False
    predictors: tuple[str, ...] = ()  # heads of the model's decoder
    posterior_predictors: tuple[str, ...] = ()  # heads of the guide's decoder, for the likelihood's latent variables

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "data_kind" in vars(cls) and "traits" not in vars(cls):
            cls.traits = replace(cls.traits, kind=cls.data_kind)
        if "pointwise" not in vars(cls):  # it may have changed the distribution
            cls.pointwise = False

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__()
        self.schema = schema

    def start(self, view: View) -> dict[str, Tensor]:
        """Set feature-level parameters from data and return initial biases of the decoders by predictor."""
        return {}

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Distribution of the measurements, batch shape (..., b, features)."""
        raise TypeError(f"{type(self).__name__} does not define distribution()")

    def narrowed(self, columns: slice | Tensor) -> Self:
        """The same likelihood with the parameters of some features, for `distribution` of these; see `pointwise`."""
        part = copy(self)
        for kind in ("_parameters", "_buffers"):
            found = {k: v for k, v in vars(self)[kind].items() if v is not None}
            wide = [k for k, v in found.items() if v.shape[-1:] == (self.schema.n_features,)]
            part.__dict__[kind] = found | {k: found[k].detach()[..., columns] for k in wide}
        return part

    def forward(self, name: str, predictors: Predictors, view: View, kl_weight: float = 1.0) -> None:
        """The generative model of the modality: its observed site, named after the modality."""
        pyro.sample(name, self.distribution(predictors, view), obs=view.counts)

    def level(self, predictors: Predictors, features: Tensor, share: Tensor) -> dict[str, Tensor]:
        """Constants by which predictors of different batches differ without meaning, shape (..., b, 1).

        Parameters
        ----------
        predictors
            Outputs of the decoder.
        features, share
            Features that both batches have, shape (b, features), and their expected share of the counts, (b, 1).
        """
        return {}

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """Biological signal in a distribution, for a cell of size 1."""
        return distribution.mean

    def cell_factor(self, view: View) -> Tensor:
        """Factor that multiplies the signal of each cell, shape (b, 1)."""
        return torch.ones_like(view.library)


class CountLikelihood(Likelihood):
    """Base class of negative binomial likelihoods, with sizes of cells and inverse dispersion theta.

    theta has one value per feature, or one per feature and batch or label. If a cell's batch or label is unknown, theta
    is the geometric mean over them.

    Parameters
    ----------
    schema
        The modality.
    """

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.log_theta = nn.Parameter(torch.zeros(*schema.dispersion_shape))

    def theta(self, view: View) -> Tensor:
        """Inverse dispersion, of a shape that broadcasts with (b, features)."""
        if self.schema.spec.dispersion == "gene":
            return self.log_theta.exp()
        if self.schema.spec.dispersion == "gene-batch":
            return view.by_batch(self.log_theta).exp()
        return (view.one_hot_label(len(self.schema.labels)) @ self.log_theta).exp()

    def cell_factor(self, view: View) -> Tensor:
        """Size of each cell, shape (b, 1)."""
        return view.library
