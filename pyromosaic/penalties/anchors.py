"""Alignment of single cells to what is known of them before training: scores that all modalities share.

Scores come from linkage: canonical correlation between modalities, or linked features smoothed over neighbours. Cells
of different modalities with like scores are probably alike.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Scores(nn.Module):
    """Scores of the cells of a mosaic, looked up by a cell's number; empty until they are set.

    They serve training alone and are not saved.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> scores = Scores()
    >>> bool(scores)
    False
    >>> scores.set(torch.zeros(20, 3))
    >>> scores.of(Posterior(torch.arange(5), torch.zeros(5, 2), torch.ones(5, 2)), minibatch).shape
    torch.Size([5, 3])
    """

    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.empty(0, 0), persistent=False)
        self.mean_square = 1.0  # of a cell's scores, summed

    def __bool__(self) -> bool:
        return len(self.values) > 0

    def set(self, values: Tensor) -> None:
        """Scores of all cells of the training data, shape (N, c)."""
        self.values = values.to(self.values)
        self.mean_square = float(values.square().sum(-1).mean()) or 1.0

    def of(self, posterior: Posterior, minibatch: Minibatch) -> Tensor:
        """Scores of the cells that a posterior is about, shape (b, c)."""
        return self.values[minibatch.index[posterior.rows]]


class Anchors(Penalty):
    """Mean squared distance between cells of two modalities that are mutual nearest neighbours by their scores.

    Neighbours are sought within the minibatch, by cosine; distances are between posterior means, per latent dimension;
    the sum is over pairs of modalities (scMODAL; Wang et al. 2025).

    Parameters
    ----------
    weight
        What it is multiplied by.
    scores
        Scores of the cells; left out where this is the option of a model.
    n_neighbors
        Each of two mutual neighbours is among so many nearest of the other.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5}, patterns=["rna", "adt"])[0])
    >>> minibatch, scores = measured(mosaic, mosaic.find(None)), Scores()
    >>> scores.set(torch.randn(60, 3))
    >>> rna = Posterior(minibatch.observed["rna"].rows, torch.zeros(30, 2), torch.ones(30, 2))
    >>> adt = Posterior(minibatch.observed["adt"].rows, torch.ones(30, 2), torch.ones(30, 2))
    >>> Anchors(1.0, scores)({"rna": rna, "adt": adt}, minibatch)  # whoever the neighbours are, they are 1 apart
    tensor(1.)
    """

    name = "anchors"

    needed = ("scores",)

    def __init__(self, weight: float = 1.0, scores: Scores | None = None, n_neighbors: int = 5) -> None:
        super().__init__(weight)
        self.complete = scores is not None
        self.scores, self.n_neighbors = Scores() if scores is None else scores, n_neighbors

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 where no cells are mutual neighbours."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations(posteriors.values(), 2):
            if not self.scores:
                break
            mutual = mutual_neighbors(self.scores.of(a, minibatch), self.scores.of(b, minibatch), self.n_neighbors)
            rows, columns = mutual.nonzero(as_tuple=True)  # a small part of all pairs
            total = total + (a.loc[rows] - b.loc[columns]).square().mean(-1).sum() / max(len(rows), 1)
        return total


def mutual_neighbors(x: Tensor, y: Tensor, n_neighbors: int) -> Tensor:
    """Which rows of (n, c) and (m, c) are among each other's nearest by cosine: shape (n, m), 0 or 1.

    Parameters
    ----------
    x, y
        Scores of the cells of two modalities, shapes (n, c) and (m, c).
    n_neighbors
        Each of two mutual neighbours is among so many nearest of the other.

    Returns
    -------
    Tensor
        1 where cells are mutual neighbours.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.1, 1.0], [1.0, 0.1]])
    >>> mutual_neighbors(x, y, n_neighbors=1)
    tensor([[0., 1.],
            [1., 0.]])
    """
    similarity = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).T
    n, m = similarity.shape
    near_x = torch.zeros_like(similarity).scatter(1, similarity.topk(min(n_neighbors, m), dim=1).indices, 1.0)
    near_y = torch.zeros_like(similarity).scatter(0, similarity.topk(min(n_neighbors, n), dim=0).indices, 1.0)
    return near_x * near_y


class Pull(Penalty):
    """Squared distance between the posterior means and the scores, relative to the mean square of the scores.

    Mean over cells, sum over modalities. Scores that modalities share less of are smaller: relative to their own size
    all are held equally firmly.

    Parameters
    ----------
    weight
        What it is multiplied by.
    scores
        Scores of the cells, at most as many as there are latent dimensions: they pull the first ones. Left out where
        this is the option of a model.

    Raises
    ------
    ValueError
        If there are more scores than latent dimensions.

    Examples
    --------
    >>> import numpy as np
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> scores = Scores()
    >>> scores.set(torch.ones(20, 3))
    >>> q = Posterior(torch.arange(20), torch.zeros(20, 5), torch.ones(20, 5))
    >>> Pull(1.0, scores)({"rna": q}, minibatch)  # as far from the scores as these are from 0
    tensor(1.)
    """

    name = "pull"

    needed = ("scores",)

    def __init__(self, weight: float = 1.0, scores: Scores | None = None) -> None:
        super().__init__(weight)
        self.complete = scores is not None
        self.scores = Scores() if scores is None else scores

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 without scores."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for q in posteriors.values():
            if self.scores:
                scores = self.scores.of(q, minibatch)
                if scores.shape[1] > q.loc.shape[1]:
                    raise ValueError(
                        f"the linkage has {scores.shape[1]} scores a cell and the shared latent space "
                        f"{q.loc.shape[1]} dimensions; take as many dimensions, or fewer scores"
                    )
                total = total + (q.loc[:, : scores.shape[1]] - scores).square().sum(-1).mean()
        return total / self.scores.mean_square
