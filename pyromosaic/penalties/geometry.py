"""Geometry: cells with similar measurements should be near each other in the latent space."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Geometry(Penalty):
    """Minus the similarity of two kernels between the cells of a modality, of measurements and of posterior means.

    It is summed over modalities. Measurements are compared as the encoders see them. Distances come from inner
    products, so no matrix is larger than cells × cells.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    encoders
        The encoders of the guide, whose ``scaling`` prepares the measurements; None uses those of the guide that gets
        the penalty.
    likeness
        Function of (cells, features) and (cells, latent): `kernel_alignment`, or `row_cosine` as in scMODAL.
    """

    name = "geometry"

    def __init__(
        self,
        weight: float,
        encoders: Mapping[str, Any] | None = None,
        likeness: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(weight)
        self.encoders, self.given = dict(encoders or {}), encoders is not None  # the guide owns their parameters
        self.likeness = kernel_alignment if likeness is None else likeness

    def attach(self, modalities: Mapping[str, Any]) -> None:
        """Take the encoders of the guide, unless others were given."""
        if not self.given:
            self.encoders = {name: part.encoder for name, part in modalities.items()}

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar."""
        unknown = [name for name in posteriors if name not in self.encoders]
        if unknown:
            raise ValueError(
                f"a Geometry penalty compares modalities ({', '.join(map(repr, self.encoders))}); found posteriors "
                f"of {unknown[0]!r}. In ContrastiveVI, pass it as penalties={{'modalities': [...]}}"
            )
        likenesses = [
            self.likeness(self.encoders[name].scaling(minibatch.observed[name]), q.loc)
            for name, q in posteriors.items()
        ]
        return -torch.stack(likenesses).sum()


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances between the rows of (n, d), shape (n, n)."""
    squares = x.square().sum(-1)
    distances = (squares.unsqueeze(-1) + squares - 2 * x @ x.T).clamp_min(0.0)
    return distances * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def row_cosine(x: Tensor, z: Tensor, ceiling: float = 0.975) -> Tensor:
    """Mean cosine of the rows of two Gaussian kernels, each at most `ceiling` (scMODAL; Wang et al. 2025).

    The squared widths are the numbers of columns. In many standardised dimensions, all distances are about equal and
    every row is above the ceiling, whatever z is. Then the term only prevents collapse. See `kernel_alignment`.

    Parameters
    ----------
    x, z
        Two representations of the same cells, shapes (n, p) and (n, q).
    ceiling
        Largest cosine of a row; no gradient flows through rows above it.

    Returns
    -------
    Tensor
        A scalar, from 0 to `ceiling`.
    """
    a, b = (torch.exp(-squared_distances(values) / (2 * values.shape[-1])) for values in (x, z))
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp_max(ceiling).mean()


def kernel_alignment(x: Tensor, z: Tensor) -> Tensor:
    """Correlation of two Gaussian kernels over pairs of different cells, centred for every cell.

    The squared widths are the mean squared distance, through which no gradient flows. The value is 0 on average for
    unrelated representations, and 1 for representations that are equal up to scale, rotation and shift. It is 0 with
    fewer than four cells.

    Parameters
    ----------
    x, z
        Two representations of the same cells, shapes (n, p) and (n, q).

    Returns
    -------
    Tensor
        A scalar, at most 1.

    References
    ----------
    Song et al., Feature selection via dependence maximization, JMLR 2012 (the unbiased estimate); Cortes et al.,
    Algorithms for learning kernels based on centered alignment, JMLR 2012.
    """
    if len(x) < 4:
        return z.new_zeros(())
    a, b = _centred_pairs(x), _centred_pairs(z)
    return (a * b).sum() / (a.square().sum() * b.square().sum()).clamp_min(1e-24).sqrt()  # they may have collapsed


def _centred_pairs(x: Tensor) -> Tensor:
    """Gaussian kernel of pairs of different cells, diagonal and row sums zero (U-centring)."""
    n = len(x)
    distances = squared_distances(x)
    width = distances.detach().sum() / (n * (n - 1))
    others = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-distances / width.clamp_min(1e-12)) * others
    rows = kernel.sum(-1) / (n - 2)
    return (kernel - rows - rows.unsqueeze(-1) + kernel.sum() / ((n - 1) * (n - 2))) * others
