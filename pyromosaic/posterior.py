"""Posteriors given one modality each, and the cells to which they belong."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from pyro import distributions as dist
from torch import Tensor


@dataclass
class Posterior:
    """Normal posterior of the latent variable given one modality.

    Parameters
    ----------
    rows
        Positions in the minibatch of the b cells that have the modality, shape (b,).
    loc, scale
        Mean and standard deviation, shape (b, latent).
    factor
        Lower Cholesky factor of the correlation matrix, shape (b, latent, latent); None for independent dimensions.
    """

    rows: Tensor
    loc: Tensor
    scale: Tensor
    factor: Tensor | None = None

    def first(self, n: int) -> "Posterior":
        """The posterior of the first latent dimensions."""
        factor = None if self.factor is None else self.factor[:, :n, :n]
        return Posterior(self.rows, self.loc[:, :n], self.scale[:, :n], factor)

    def after(self, n: int) -> "Posterior":
        """The posterior of the dimensions after the first `n`, as if they were independent."""
        return Posterior(self.rows, self.loc[:, n:], self.scale[:, n:])

    def of(self, cells: Tensor | slice) -> "Posterior":
        """The posterior in some of the cells."""
        factor = None if self.factor is None else self.factor[cells]
        return Posterior(self.rows[cells], self.loc[cells], self.scale[cells], factor)

    @property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance, shape (b, latent, latent)."""
        return torch.diag_embed(self.scale) if self.factor is None else self.scale.unsqueeze(-1) * self.factor

    @property
    def covariance(self) -> Tensor:
        """Covariance, shape (b, latent, latent)."""
        return self.scale_tril @ self.scale_tril.mT

    @classmethod
    def whole(cls, joint: dist.TorchDistribution) -> "Posterior":
        """The moments of every cell of a minibatch, from a distribution of batch shape (B, 1)."""
        loc, scale = joint.mean[:, 0], joint.stddev[:, 0]
        return cls(torch.arange(len(loc), device=loc.device), loc, scale)


def placed(parts: Iterable[tuple[Tensor, Tensor]], n_cells: int) -> Tensor:
    """Sum over parts (rows, values), each added to its rows of a tensor with `n_cells` rows.

    Parameters
    ----------
    parts
        Rows, shape (b,), and values, shape (b, width), of each part.
    n_cells
        Number of rows of the result.

    Returns
    -------
    Tensor
        Shape (n_cells, width); 0 in rows of no part.

    Examples
    --------
    >>> placed([(torch.tensor([0, 2]), torch.ones(2, 1)), (torch.tensor([2]), torch.ones(1, 1))], n_cells=3).T
    tensor([[1., 0., 2.]])
    """
    total = torch.zeros(())
    for rows, values in parts:
        total = total.to(values) + values.new_zeros(n_cells, values.shape[-1]).index_add(0, rows, values)
    return total


def alone(q: Posterior | None, used: Tensor, n_latent: int, rows: Tensor) -> dist.TorchDistribution:
    """Posterior of a private variable in the given rows; a standard normal in cells without the modality.

    Parameters
    ----------
    q
        Posterior given the modality; None if no cell has it.
    used
        Whether the modality is used in each cell of the minibatch, shape (B,), 0 or 1.
    n_latent
        Dimension of the variable.
    rows
        Positions of the b requested cells.

    Returns
    -------
    TorchDistribution
        Batch shape (b, 1), event shape (latent,).
    """
    loc, excess = used.new_zeros(2, len(used), n_latent)
    if q is not None:
        seen = used[q.rows].unsqueeze(-1)
        loc, excess = (loc.index_add(0, q.rows, seen * q.loc), excess.index_add(0, q.rows, seen * (q.scale - 1)))
    return dist.Normal(loc[rows].unsqueeze(-2), 1 + excess[rows].unsqueeze(-2)).to_event(1)


def presence(posteriors: Mapping[str, Posterior], n_cells: int) -> Tensor:
    """Which cell has which modality, shape (n_cells, modalities), 0 or 1.

    Parameters
    ----------
    posteriors
        Posteriors by modality.
    n_cells
        Number of cells in the minibatch.

    Returns
    -------
    Tensor
        Columns in the order of `posteriors`.
    """
    first = next(iter(posteriors.values())).loc
    columns = [first.new_zeros(n_cells).index_fill(0, q.rows, 1.0) for q in posteriors.values()]
    return torch.stack(columns, dim=-1)


def leave_out(present: Tensor, share: float) -> Tensor:
    """In a random share of the cells, use one random modality of those present, and leave the others out.

    The model still has to explain all measurements. Therefore the posterior given one modality learns to predict the
    others, with its uncertainty. The objective stays a lower bound of the evidence, as for any posterior.

    Parameters
    ----------
    present
        Which cell has which modality, shape (B, modalities), 0 or 1.
    share
        Share of the cells in which modalities are left out, from 0 to 1.

    Returns
    -------
    Tensor
        Which modality is used in which cell, shape of `present`, 0 or 1.

    Examples
    --------
    >>> import torch
    >>> leave_out(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), share=1.0).sum(-1)
    tensor([1., 1.])
    """
    chosen = (torch.rand_like(present) + present).argmax(-1)
    single = torch.nn.functional.one_hot(chosen, present.shape[-1]).to(present.dtype)
    return torch.where(torch.rand_like(present[:, :1]) < share, single, present)
