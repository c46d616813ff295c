"""Alignment of single cells by scores computed before training, in one space for all modalities.

Scores come from linkage: canonical correlation between modalities, or linked features smoothed over neighbours. Cells
of different modalities with similar scores are probably similar.
"""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from pyromosaic.accepted import Count, Share, Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Scores(nn.Module):
    """Scores of the cells of a mosaic, indexed by cell position; empty until they are set.

    They are used only in training and are not saved.
    """

    values: Tensor
    mean_square: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.empty(0, 0), persistent=False)
        self.register_buffer("mean_square", torch.ones(()), persistent=False)  # mean squared norm of a cell's scores

    def __bool__(self) -> bool:
        return len(self.values) > 0

    def set(self, values: Tensor) -> None:
        """Scores of all cells of the training data, shape (N, c); NaN in cells without scores."""
        self.values = values.to(self.values)
        mean_square = float(values.square().sum(-1).nanmean()) or 1.0
        self.mean_square = self.mean_square.new_tensor(mean_square)

    def of(self, posterior: Posterior, minibatch: Minibatch) -> Tensor:
        """Scores of the cells of a posterior, shape (b, c)."""
        return self.values[minibatch.index[posterior.rows]]


class Anchors(Penalty):
    """Mean squared distance between cells of two modalities that are mutual nearest neighbours by their scores.

    Neighbours are found within the minibatch, by cosine similarity. Distances are between posterior means, per latent
    dimension, and are summed over pairs of modalities (scMODAL; Wang et al. 2025).

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    scores
        Scores of the cells; leave them out in an option of a model.
    n_neighbors
        Two cells are mutual neighbours if each is among the `n_neighbors` nearest of the other.
    """

    name = "anchors"

    needed = ("scores",)

    @checked
    def __init__(self, weight: Weight = 1.0, scores: Scores | None = None, n_neighbors: Count = 5) -> None:
        super().__init__(weight)
        self.complete = scores is not None
        self.scores, self.n_neighbors = Scores() if scores is None else scores, n_neighbors

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 if no cells are mutual neighbours."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for a, b in combinations(posteriors.values(), 2):
            if not self.scores:
                break
            mutual = mutual_neighbors(self.scores.of(a, minibatch), self.scores.of(b, minibatch), self.n_neighbors)
            rows, columns = mutual.nonzero(as_tuple=True)  # a small part of all pairs
            total = total + (a.loc[rows] - b.loc[columns]).square().mean(-1).sum() / max(len(rows), 1)
        return total


def mutual_neighbors(x: Tensor, y: Tensor, n_neighbors: int) -> Tensor:
    """Indicator of mutual nearest neighbours by cosine similarity among rows of (n, c) and (m, c): shape (n, m).

    Parameters
    ----------
    x, y
        Scores of the cells of two modalities, shapes (n, c) and (m, c).
    n_neighbors
        Two cells are mutual neighbours if each is among the `n_neighbors` nearest of the other.

    Returns
    -------
    Tensor
        1 for mutual neighbours, 0 otherwise.
    """
    similarity = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).T
    n, m = similarity.shape
    near_x = torch.zeros_like(similarity).scatter(1, similarity.topk(min(n_neighbors, m), dim=1).indices, 1.0)
    near_y = torch.zeros_like(similarity).scatter(0, similarity.topk(min(n_neighbors, n), dim=0).indices, 1.0)
    return near_x * near_y


class Pull(Penalty):
    """Squared distance between the posterior means and the scores, relative to the mean square of the scores.

    It is the mean over cells, summed over modalities; cells without scores count as 0. Modalities that share less have
    smaller scores; dividing by the mean square makes the pull equally strong for all modalities.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    scores
        Scores of the cells, at most as many as latent dimensions; they act on the first dimensions. Leave them out in
        an option of a model.
    fades
        Share of the weight that fades while the weight of the divergences increases; 1 makes the pull a start only. In
        an option of a model, as the model has it by default.

    Raises
    ------
    ValueError
        If there are more scores than latent dimensions.
    """

    name = "pull"

    needed = ("scores",)

    @checked
    def __init__(self, weight: Weight = 1.0, scores: Scores | None = None, fades: Share = 0.0) -> None:
        super().__init__(weight)
        self.complete = scores is not None
        self.scores, self.fades = Scores() if scores is None else scores, fades

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 without scores."""
        total = next(iter(posteriors.values())).loc.new_zeros(())
        for q in posteriors.values():
            if self.scores:
                scores = self.scores.of(q, minibatch)
                if scores.shape[1] > q.loc.shape[1]:
                    raise ValueError(
                        f"the linkage has {scores.shape[1]} scores per cell, but the shared latent space has only "
                        f"{q.loc.shape[1]} dimensions; raise n_latent, or use fewer scores"
                    )
                total = total + (q.loc[:, : scores.shape[1]] - scores).nan_to_num().square().sum(-1).mean()
        return total / self.scores.mean_square
