"""Divergences between the posteriors from different modalities."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyromosaic.accepted import Count, Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.kernels import discrepancy
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Jeffreys(Penalty):
    """Symmetric Kullback-Leibler divergence between the posteriors of every pair of modalities that a cell has.

    It is ``KL(q_1 || q_2) + KL(q_2 || q_1)``, summed over latent dimensions and pairs, and averaged over the cells of
    the minibatch (MultiVI, Methods).

    Parameters
    ----------
    weight
        Factor of the penalty in the loss; 1 in the paper.
    """

    name = "jeffreys"

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 if no cell of the minibatch has two modalities."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in in_common(posteriors):
            if a.factor is not None or b.factor is not None:
                p, q = (MultivariateNormal(each.loc, scale_tril=each.scale_tril) for each in (a, b))
                total = total + (kl_divergence(p, q) + kl_divergence(q, p)).sum()
                continue
            difference, variance_a, variance_b = (a.loc - b.loc).square(), a.scale.square(), b.scale.square()
            terms = (variance_a + difference) / variance_b + (variance_b + difference) / variance_a - 2
            total = total + 0.5 * terms.sum()
        return total / len(minibatch)


class MeanDistance(Penalty):
    """Euclidean distance between the posterior means of every pair of modalities that a cell has.

    It is summed over pairs and averaged over the cells of the minibatch. The reference implementation of MultiVI uses
    it in place of `Jeffreys` and calls it a maximum mean discrepancy, which it is not; see `MMD`.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    """

    name = "mean_distance"

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 if no cell of the minibatch has two modalities."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in in_common(posteriors):
            total = total + torch.linalg.vector_norm(a.loc - b.loc, dim=-1).sum()
        return total / len(minibatch)


def in_common(posteriors: Mapping[str, Posterior]) -> Iterator[tuple[Posterior, Posterior]]:
    """Every pair of modalities, with the posteriors of the cells that have both."""
    for a, b in combinations(posteriors.values(), 2):
        in_a = torch.isin(a.rows, b.rows, assume_unique=True)
        in_b = torch.isin(b.rows, a.rows, assume_unique=True)
        yield a.of(in_a), b.of(in_b)


class MMD(Penalty):
    """Squared maximum mean discrepancy between the modalities' representations, over pairs of modalities.

    It compares the posterior means of all cells that have one modality with those of all cells that have the other.
    Therefore it also uses cells with a single modality. It assumes that both modalities were measured in the same
    mixture of cells. If they were not, a large weight forces unrelated cells together.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    n_cells
        Number of cells of each modality to compare, the first in the minibatch; time grows with its square.

    References
    ----------
    Gretton et al., A kernel two-sample test, JMLR 2012.
    """

    name = "mmd"
    warms_up = True  # uninformative representations aligned early stay uninformative

    @checked
    def __init__(self, weight: Weight = 1.0, n_cells: Count = 256) -> None:
        super().__init__(weight, n_cells)

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with a single modality."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations([q.loc for q in posteriors.values()], 2):
            if len(a) > 1 and len(b) > 1:
                total = total + discrepancy(a, b)
        return total
