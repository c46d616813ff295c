"""Divergences between what different modalities say of cells."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from pyromosaic.data import Minibatch
from pyromosaic.penalties.kernels import discrepancy
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Jeffreys(Penalty):
    """Symmetric Kullback-Leibler divergence between the posteriors of every pair of modalities that a cell has.

    ``KL(q_1 || q_2) + KL(q_2 || q_1)``, summed over latent dimensions and pairs, mean over the cells of the minibatch
    (MultiVI, Methods).

    Parameters
    ----------
    weight
        What it is multiplied by; 1 in the paper.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mdata, _ = simulate(10, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
    >>> minibatch = measured(Mosaic.from_mudata(mdata), np.arange(10))
    >>> rna = Posterior(torch.arange(10), torch.zeros(10, 2), torch.ones(10, 2))
    >>> adt = Posterior(torch.arange(10), torch.ones(10, 2), torch.ones(10, 2))
    >>> Jeffreys()({"rna": rna, "adt": adt}, minibatch)  # two dimensions, 1 apart
    tensor(2.)
    """

    name = "jeffreys"

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 when no cell of the minibatch has two modalities."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in in_common(posteriors):
            difference, variance_a, variance_b = (a.loc - b.loc).square(), a.scale.square(), b.scale.square()
            terms = (variance_a + difference) / variance_b + (variance_b + difference) / variance_a - 2
            total = total + 0.5 * terms.sum()
        return total / len(minibatch)


class MeanDistance(Penalty):
    """Euclidean distance between the posterior means of every pair of modalities that a cell has.

    Summed over pairs, mean over the cells of the minibatch. It takes the place of `Jeffreys` in the reference
    implementation of MultiVI under the name of a maximum mean discrepancy, which it is not; that is `MMD`.

    Parameters
    ----------
    weight
        What it is multiplied by.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mdata, _ = simulate(10, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
    >>> minibatch = measured(Mosaic.from_mudata(mdata), np.arange(10))
    >>> rna = Posterior(torch.arange(10), torch.zeros(10, 2), torch.ones(10, 2))
    >>> adt = Posterior(torch.arange(10), torch.ones(10, 2), torch.ones(10, 2))
    >>> MeanDistance()({"rna": rna, "adt": adt}, minibatch)
    tensor(1.4142)
    """

    name = "mean_distance"

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 when no cell of the minibatch has two modalities."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in in_common(posteriors):
            total = total + torch.linalg.vector_norm(a.loc - b.loc, dim=-1).sum()
        return total / len(minibatch)


def in_common(posteriors: Mapping[str, Posterior]) -> Iterator[tuple[Posterior, Posterior]]:
    """Every pair of modalities, each with its posteriors of the cells that have both."""
    for a, b in combinations(posteriors.values(), 2):
        in_a = torch.isin(a.rows, b.rows, assume_unique=True)
        in_b = torch.isin(b.rows, a.rows, assume_unique=True)
        yield (
            Posterior(a.rows[in_a], a.loc[in_a], a.scale[in_a]),
            Posterior(b.rows[in_b], b.loc[in_b], b.scale[in_b]),
        )


class MMD(Penalty):
    """Squared maximum mean discrepancy between the modalities' representations, over pairs of modalities.

    Compares the posterior means of all cells that have one modality with those of all that have the other, so that
    cells with a single modality take part. It assumes that both see the same mixture of cells: where they do not, a
    large weight forces strangers together.

    Parameters
    ----------
    weight
        What it is multiplied by.
    n_cells
        So many cells of each modality are compared, the first of the minibatch: time grows with their square.

    References
    ----------
    Gretton et al., A kernel two-sample test, JMLR 2012.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 10})[0])
    >>> model = MultiVI(mosaic, mmd=0, penalties=[MMD(10.0)])  # the same as mmd=10
    >>> model.train(n_epochs=1, progress_bar=False)
    >>> "train_penalty/mmd" in model.history
    True
    """

    name = "mmd"
    warms_up = True  # representations that are made alike before they say anything stay that way

    def __init__(self, weight: float = 1.0, n_cells: int = 256) -> None:
        super().__init__(weight, n_cells)

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with a single modality."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations([q.loc for q in posteriors.values()], 2):
            if len(a) > 1 and len(b) > 1:
                total = total + discrepancy(a, b)
        return total
