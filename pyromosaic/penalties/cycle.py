"""Latent cycle: a cell that is decoded in another modality and encoded again should keep its latent value."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyromosaic.accepted import Dimensions, Weight, checked
from pyromosaic.data import Minibatch, ModalitySchema, View
from pyromosaic.data.minibatch import across_batches
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior
from pyromosaic.program import AtMean


class Cycle(Penalty):
    """Mean squared distance, per latent dimension, between z and z after decoding and encoding in another modality.

    The posterior mean z is decoded in the other modality, for a cell of median size without a known batch. The expected
    measurements are encoded again. Both directions are summed (scMODAL; Wang et al. 2025).

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    schema
        The modalities.
    encoders, decoders, likelihoods
        Encoders of the guide, and decoders and likelihoods of the model, by modality. If a likelihood has a method
        ``seen(predictors)``, it returns the expected measurements as an encoder sees them.
    n_private
        Dimension of the private latent variables, which are set to 0 in decoding.
    """

    name = "cycle"

    @checked
    def __init__(
        self,
        weight: Weight,
        schema: Mapping[str, ModalitySchema],
        encoders: Mapping[str, Any],
        decoders: Mapping[str, Any],
        likelihoods: Mapping[str, Any],
        n_private: Dimensions = 0,
    ) -> None:
        super().__init__(weight)
        self.schema, self.n_private = schema, n_private
        # model and guide own their parameters
        self.encoders, self.decoders, self.likelihoods = dict(encoders), dict(decoders), dict(likelihoods)

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar, for two modalities."""
        (a, q), (b, r) = posteriors.items()
        return (q.loc - self.there(b, q.loc)).square().mean() + (r.loc - self.there(a, r.loc)).square().mean()

    def there(self, name: str, z: Tensor) -> Tensor:
        """Posterior means given the expected measurements of a modality at z, shape (n, latent)."""
        loc, *_ = self.encoders[name].posterior(self.expected(name, z), View.typical(self.schema[name], z))
        return loc[:, : z.shape[-1]]

    def expected(self, name: str, z: Tensor) -> Tensor:
        """Expected measurements of a modality at z, as its encoder sees them, shape (n, features)."""
        likelihood, view = self.likelihoods[name], View.typical(self.schema[name], z)
        latent = torch.nn.functional.pad(z, (0, self.n_private))
        predictors = across_batches(lambda view: self.decoders[name](latent, view), view, likelihood)
        if hasattr(likelihood, "seen"):
            own: Tensor = likelihood.seen(predictors)
            return own
        with poutine.block(), AtMean():
            mean = poutine.trace(likelihood).get_trace(name, predictors, view).nodes[name]["value"]
        seen: Tensor = self.encoders[name].scaling.expected(mean, view)
        return seen
