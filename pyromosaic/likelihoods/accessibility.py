"""Chromatin accessibility: open or closed."""

import numpy as np
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pyromosaic.data import TRAITS, ModalitySchema, View
from pyromosaic.distributions import (
    AccessibilityBernoulli,
)
from pyromosaic.likelihoods.likelihood import Likelihood, Predictors, logit


class Bernoulli(Likelihood):
    """Accessibility: ``P(x > 0) = d * r * sigmoid(accessibility)``, cell factor d, region factor r (PeakVI; MultiVI).

    The region factor is the ``sigmoid`` of a free parameter. The cell factor is the ``sigmoid`` of a small network
    whose input is the cell's depth: the log of its fragment count relative to that of the median cell.

    Parameters
    ----------
    schema
        The modality.
    """

    family = "bernoulli"
    traits = TRAITS["bernoulli"]
    pointwise = True
    predictors = ("accessibility",)

    def __init__(self, schema: ModalitySchema) -> None:
        super().__init__(schema)
        self.region_logits = nn.Parameter(torch.zeros(schema.n_features))
        self.depth = nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def start(self, view: View) -> dict[str, Tensor]:
        """Initialise at the share of cells in which each region is open.

        Cell and region factors start at one half, or higher if a region is open in more cells than that allows: up to
        the cube root of the share, so that each of the three factors has an equal part of it.
        """
        is_open = view.dense_counts() > 0
        share = view.over_cells(is_open.to(torch.float32)).clamp(max=1 - 0.5 / len(is_open))
        equal = share.pow(1 / 3).clamp_min(0.5)
        cell = equal.max()
        region = torch.minimum(equal, (share / (0.9 * cell)).clamp_min(0.5))  # then the accessibility is at most 0.9
        with torch.no_grad():
            self.region_logits.copy_(logit(region))
            self.depth[-1].bias += logit(cell) - self.depth(share.new_zeros(1))  # of the median cell
        return {"accessibility": logit((share / (cell * region)).clamp_min(1e-4))}

    def cell_logits(self, view: View) -> Tensor:
        """Log odds of the cell factor, shape (b, 1)."""
        return self.depth(torch.log1p(view.library) - np.log1p(self.schema.library))

    def cell_factor(self, view: View) -> Tensor:
        """The cell factor, between 0 and 1, shape (b, 1)."""
        return self.cell_logits(view).sigmoid()

    def region_factor(self) -> Tensor:
        """The region factors, between 0 and 1, shape (regions,)."""
        return self.region_logits.sigmoid()

    def distribution(self, predictors: Predictors, view: View) -> dist.TorchDistribution:
        """Bernoulli of every cell and region."""
        return AccessibilityBernoulli(
            predictors["accessibility"], region_logits=self.region_logits, cell_logits=self.cell_logits(view)
        )

    def normalized(self, distribution: dist.TorchDistribution) -> Tensor:
        """Accessibility without the cell and region factors."""
        return logsigmoid(distribution.logits).exp()
