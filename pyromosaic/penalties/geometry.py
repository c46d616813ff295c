"""Geometry: cells with similar measurements should be near each other in the latent space."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyromosaic.accepted import Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.kernels import kernel_alignment, row_cosine
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior

LIKENESS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"alignment": kernel_alignment, "cosine": row_cosine}


class Geometry(Penalty):
    """Negative similarity of two kernels between the cells of a modality: of measurements and of posterior means.

    It is summed over modalities. Measurements are compared as the encoders see them. Distances come from inner
    products, so that no matrix is larger than cells × cells.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    encoders
        Encoders of the guide, whose ``scaling`` prepares the measurements; None uses those of the guide to which the
        penalty is added.
    likeness
        ``"alignment"`` (`kernel_alignment`), ``"cosine"`` (`row_cosine`) as in scMODAL, or a function of (cells,
        features) and (cells, latent).

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.data import measured
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50})[0])
    >>> model, minibatch = MultiVI(mosaic), measured(mosaic, mosaic.find(None))
    >>> scaled = model.guide.modalities["rna"].encoder.scaling(minibatch.observed["rna"])
    >>> q = Posterior(torch.arange(60), scaled, torch.ones_like(scaled))  # the very geometry of the measurements
    >>> round(Geometry(1.0, {"rna": model.guide.modalities["rna"].encoder})({"rna": q}, minibatch).item(), 3)
    -1.0
    """

    name = "geometry"

    @checked
    def __init__(
        self,
        weight: Weight = 1.0,
        encoders: Mapping[str, Any] | None = None,
        likeness: str | Callable[[Tensor, Tensor], Tensor] = "alignment",
    ) -> None:
        super().__init__(weight)
        self.encoders, self.found = dict(encoders or {}), encoders is None  # the guide owns their parameters
        if isinstance(likeness, str) and likeness not in LIKENESS:
            raise ValueError(
                f"likeness must be a function or one of {', '.join(map(repr, LIKENESS))}; found {likeness!r}"
            )
        self.likeness = LIKENESS[likeness] if isinstance(likeness, str) else likeness

    def attach(self, modalities: Mapping[str, Any]) -> None:
        """Use the guide's encoders, unless others were given."""
        if self.found:
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
