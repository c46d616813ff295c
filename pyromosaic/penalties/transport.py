"""Alignment of whole populations of cells by unbalanced optimal transport."""

from collections.abc import Mapping
from itertools import combinations
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from pyromosaic.accepted import Count, Length, Positive, Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class Sinkhorn(Penalty):
    """Debiased unbalanced Sinkhorn divergence between modalities, summed over pairs or from a reference (DiagVI).

    It compares the posterior means of the cells that have one modality with those of the cells that have the other.
    Mass may stay unmatched at a cost. Therefore cell types that differ in proportion, or occur in one modality only,
    are not forced together.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    p
        Exponent of the cost, ``|x - y|^p / p``: 1 or 2.
    blur
        Distance below which the transport plan is blurred; None adapts it to the minibatch: ``blur^p`` is half of the
        mean cost.
    reach
        Distance beyond which it is cheaper to leave mass unmatched; None means three times the blur; infinity means
        that all mass is matched.
    sampled
        Compare draws from the posteriors instead of their means, as the reference implementation does. Draws can
        overlap where means do not.
    reference
        Modality to which all others are aligned; None aligns all pairs. With a reference, the cost grows with the
        number of modalities, not of pairs, and a modality that is hard to align affects only the reference.
    n_cells
        Number of cells of each modality to compare, the first in the minibatch; time grows with its square.

    References
    ----------
    Feydy et al., Interpolating between optimal transport and MMD using Sinkhorn divergences, AISTATS 2019. It is
    computed by their package geomloss; the adaptive blur is that of OTT-JAX.
    """

    name = "sinkhorn"
    warms_up = True  # aligned early, representations stay uninformative

    @checked
    def __init__(
        self,
        weight: Weight = 1.0,
        p: Literal[1, 2] = 2,
        blur: Positive | None = None,
        reach: Length | None = None,
        sampled: bool = False,
        reference: str | None = None,
        n_cells: Count = 256,
    ) -> None:
        super().__init__(weight, n_cells)
        self.p, self.blur, self.reach, self.sampled, self.reference = p, blur, reach, sampled, reference

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with a single modality, or if the reference is absent."""
        points = {k: torch.normal(q.loc, q.scale) if self.sampled else q.loc for k, q in posteriors.items()}
        total = next(iter(points.values())).new_zeros(())
        for a, b in combinations(points, 2):
            if self.reference in (None, a, b):
                total = total + sinkhorn_divergence(points[a], points[b], self.p, self.blur, self.reach)
        return total


def sinkhorn_divergence(
    x: Tensor, y: Tensor, p: int = 2, blur: float | None = None, reach: float | None = None
) -> Tensor:
    """Debiased unbalanced Sinkhorn divergence of two samples, (n, d) and (m, d); see `Sinkhorn`.

    With an adaptive blur, nothing is copied from the device: the divergence is homogeneous, so that the points can be
    divided by the blur, compared at blur 1, and the result multiplied by ``blur^p``.

    Parameters
    ----------
    x, y
        The two samples.
    p, blur, reach
        As in `Sinkhorn`.

    Returns
    -------
    Tensor
        A scalar, about 0 for equal samples.

    Raises
    ------
    ValueError
        If a finite `reach` is given without a `blur`.
    """
    if blur is not None:
        reach = 3 * blur if reach is None else reach
        return _divergence(x, y, p, blur, reach, None)
    if reach is not None and reach != inf:
        raise ValueError("a fixed reach needs a fixed blur; found blur=None, which adapts to the minibatch")
    with torch.no_grad():
        cost = torch.cdist(x, y).square().mean() / 2 if p == 2 else torch.cdist(x, y).mean()
        unit = (0.5 * cost).clamp_min(1e-12) ** (1 / p)
    # This blur is large: starting at it is as exact as annealing from a larger one, in fewer iterations.
    return unit**p * _divergence(x / unit, y / unit, p, 1.0, reach or 3.0, diameter=1.0)


def _divergence(x: Tensor, y: Tensor, p: int, blur: float, reach: float, diameter: float | None) -> Tensor:
    from geomloss import SamplesLoss  # imports slowly

    loss: Any = SamplesLoss(
        "sinkhorn",
        p=p,
        blur=blur,
        reach=None if reach == inf else reach,
        diameter=diameter,
        backend="tensorized",
    )
    tracking = torch.is_grad_enabled()
    with torch.set_grad_enabled(tracking):  # geomloss leaves it on
        value: Tensor = loss(x, y)
    return value if tracking else value.detach()
