"""Fusion: from the posteriors of the modalities that a cell has to one posterior of the cell."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Posterior:
    """Diagonal normal posterior of the latent variable given one modality.

    Parameters
    ----------
    rows
        Positions in the minibatch of the b cells that have the modality, shape (b,).
    loc, scale
        Mean and standard deviation, shape (b, latent).
    """

    rows: Tensor
    loc: Tensor
    scale: Tensor


class MeanFusion(nn.Module):
    """Mean of the representations of the modalities that a cell has (MultiVI, Methods).

    With weights w that are 1, or 0 for a modality that is left out, the mean of independent normals has mean
    ``sum(w mu) / sum(w)`` and variance ``sum(w^2 sigma^2) / sum(w)^2``.
    """

    def forward(self, posteriors: Mapping[str, Posterior], used: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every cell of the minibatch, each of shape (B, latent).

        Parameters
        ----------
        posteriors
            By modality.
        used
            Which modality is used in which cell, shape (B, modalities), 0 or 1; at least one in each cell.
        """
        loc = variance = torch.zeros(())
        for weight, q in zip(used.unbind(-1), posteriors.values(), strict=True):
            w = weight[q.rows].unsqueeze(-1)
            empty = q.loc.new_zeros(len(used), q.loc.shape[-1])
            loc = loc.to(empty) + empty.index_add(0, q.rows, w * q.loc)
            variance = variance.to(empty) + empty.index_add(0, q.rows, (w * q.scale).square())
        total = used.sum(-1, keepdim=True)
        return loc / total, variance.sqrt() / total


def presence(posteriors: Mapping[str, Posterior], n_cells: int) -> Tensor:
    """Which cell has which modality, shape (n_cells, modalities), 0 or 1."""
    first = next(iter(posteriors.values())).loc
    columns = [first.new_zeros(n_cells).index_fill(0, q.rows, 1.0) for q in posteriors.values()]
    return torch.stack(columns, dim=-1)


def leave_out(present: Tensor, share: float) -> Tensor:
    """In a random share of the cells use one random modality of those present, and leave the others out.

    The model still has to explain all that was measured: so the posterior given one modality learns to predict the
    others, and how well it can. The objective stays a lower bound of the evidence, as it is for any posterior.
    """
    chosen = (torch.rand_like(present) + present).argmax(-1)
    single = torch.nn.functional.one_hot(chosen, present.shape[-1]).to(present.dtype)
    return torch.where(torch.rand_like(present[:, :1]) < share, single, present)
