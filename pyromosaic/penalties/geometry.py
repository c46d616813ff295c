"""Geometry: cells with similar measurements should be near each other in the latent space."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyromosaic.data import Minibatch
from pyromosaic.penalties.kernels import kernel_alignment
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
