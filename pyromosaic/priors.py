"""Priors of the latent variable: callables from a minibatch to a distribution.

Any `torch.nn.Module` whose call returns a distribution with batch shape (B, 1) or () and event shape (latent,) can
take their place.
"""

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyromosaic.data import Minibatch
from pyromosaic.labels import Labels


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


class ARD(nn.Module):
    """Automatic relevance determination: ``Normal(0, scale_k)`` in latent dimension k, its scale learnt.

    A dimension that the data do not need ends with a scale near 0, provided that what decodes it cannot make up for a
    small scale by large weights (`pyromosaic.nn.unit_columns`).

    Parameters
    ----------
    n_latent
        Width of the latent space, an upper bound of what is needed.

    References
    ----------
    MacKay, Bayesian methods for backpropagation networks, 1994; Bishop, Bayesian PCA, 1999.
    """

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(n_latent))

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        return dist.Normal(0.0, self.log_scale.exp()).expand([len(minibatch), 1, len(self.log_scale)]).to_event(1)


class GaussianMixture(nn.Module):
    """Mixture of diagonal normals, ``sum_l pi_l Normal(m_l, diag(s_l^2))``, its parameters learnt (DiagVI).

    With labels there is a component a label. A cell whose label is known belongs to its component all but surely; a
    cell without a label may belong to any, so partly labelled data are the normal case.

    Parameters
    ----------
    n_latent
        Width of the latent space.
    n_components
        Number of components, if there are no labels.
    labels
        The labels to which components are tied.
    """

    def __init__(self, n_latent: int, n_components: int = 10, labels: Labels | None = None) -> None:
        super().__init__()
        self.labels = labels if labels is not None and len(labels) else None
        n = n_components if self.labels is None else len(self.labels)
        self.logits = nn.Parameter(torch.zeros(n))
        self.loc = nn.Parameter(torch.randn(n, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n, n_latent))

    def forward(self, minibatch: Minibatch) -> dist.TorchDistribution:
        """The prior of every cell of the minibatch."""
        logits = self.logits.expand(len(minibatch), 1, -1)
        if self.labels is not None:
            known = self.labels(minibatch)
            one_hot = torch.nn.functional.one_hot(known.clamp_min(0), len(self.labels)) * (known >= 0).unsqueeze(-1)
            logits = logits + 100.0 * one_hot.unsqueeze(1)
        components = dist.Normal(self.loc, self.log_scale.exp() + 1e-4).to_event(1)
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits), components.expand([len(minibatch), 1, len(self.logits)])
        )
