"""Penalties on posteriors; a guide adds each as one named `pyro.factor`.

A penalty is a function of what the guide infers, not of how data come about. It therefore stands in the guide: the
model stays a proper joint density, and prior or posterior predictive samples and held-out likelihoods never contain it.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyromosaic.data import Minibatch
from pyromosaic.fusion import Posterior


class Penalty(nn.Module):
    """A term that is added to the loss.

    Subclasses define `forward(posteriors, minibatch)`, a scalar: the penalty's mean over the cells of the minibatch.

    Parameters
    ----------
    weight
        What it is multiplied by.
    """

    name: str
    warms_up = False  # whether it is multiplied by the weight of the divergences, which rises during training

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"a penalty's weight is at least 0; found {weight}")
        self.weight = weight


def apply(
    penalties: Iterable[Any], posteriors: Mapping[str, Posterior], minibatch: Minibatch, kl_weight: float
) -> None:
    """Add each penalty to the guide, scaled from the mean over the minibatch to all cells; outside every plate."""
    if all(view.counts is None for view in minibatch.decoded.values()):
        return  # nothing is explained, so nothing is trained
    for penalty in penalties:
        if penalty.weight:
            weight = penalty.weight * (kl_weight if penalty.warms_up else 1.0)
            value = weight * minibatch.n_cells * penalty(posteriors, minibatch)
            # In a guide a factor enters the ELBO with a minus.
            pyro.factor(f"penalty/{penalty.name}", value, has_rsample=True)


class Jeffreys(Penalty):
    """Symmetric Kullback-Leibler divergence between the posteriors of every pair of modalities that a cell has.

    ``KL(q_1 || q_2) + KL(q_2 || q_1)``, summed over latent dimensions and pairs, mean over the cells of the minibatch
    (MultiVI, Methods).

    Parameters
    ----------
    weight
        What it is multiplied by; 1 in the paper.
    """

    name = "jeffreys"

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 when no cell of the minibatch has two modalities."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations(posteriors.values(), 2):
            in_a, in_b = (
                torch.isin(a.rows, b.rows, assume_unique=True),
                torch.isin(b.rows, a.rows, assume_unique=True),
            )
            difference = (a.loc[in_a] - b.loc[in_b]).square()
            variance_a, variance_b = a.scale[in_a].square(), b.scale[in_b].square()
            terms = (variance_a + difference) / variance_b + (variance_b + difference) / variance_a - 2
            total = total + 0.5 * terms.sum()
        return total / len(minibatch)


class MMD(Penalty):
    """Squared maximum mean discrepancy between the modalities' representations, over pairs of modalities.

    Compares the posterior means of all cells that have one modality with those of all that have the other, so that
    cells with a single modality take part. It assumes that both see the same mixture of cells: where they do not, a
    large weight forces strangers together.

    Parameters
    ----------
    weight
        What it is multiplied by.

    References
    ----------
    Gretton et al., A kernel two-sample test, JMLR 2012.
    """

    name = "mmd"
    warms_up = True  # representations that are made alike before they say anything stay that way

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with a single modality."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations(posteriors.values(), 2):
            if len(a.loc) > 1 and len(b.loc) > 1:
                total = total + discrepancy(a.loc, b.loc)
        return total


def discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of two samples, (n, d) and (m, d), by Gaussian kernels of four widths.

    The squared widths are 1, 1/2, 1/4 and 1/8 of the mean squared distance in the pooled sample, through which no
    gradient flows.
    """
    pooled = torch.cat([x, y])
    squares = pooled.square().sum(-1)
    distances = (squares.unsqueeze(-1) + squares - 2 * pooled @ pooled.T).clamp_min(0.0)
    width = distances.detach().mean().clamp_min(1e-12)  # representations may all be the same
    kernels = [torch.exp(-distances / width)]
    for _ in range(3):
        kernels.append(kernels[-1].square())  # the kernel of half the squared width
    kernel = torch.stack(kernels).mean(0)
    n, m = len(x), len(y)
    within_x = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_y = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel[:n, n:].mean()
