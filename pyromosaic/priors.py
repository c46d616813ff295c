"""Priors of the latent variable: callables from a minibatch to a distribution.

Any `torch.nn.Module` whose call returns a distribution with batch shape (B, 1) or () and event shape (latent,) can
take their place.
"""

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import Minibatch


class StandardNormal(nn.Module):
    """Independent standard normal in every latent dimension.

    Parameters
    ----------
    n_latent
        Width of the latent space.
    """

    zero: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(n_latent), persistent=False)

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return dist.Normal(self.zero, 1.0).expand([len(minibatch), 1, len(self.zero)]).to_event(1)
