"""Penalties for models that contrast a background with a target cohort."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyromosaic.accepted import Count, Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.penalties.divergence import MMD
from pyromosaic.penalties.kernels import dependence
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class CohortMMD(MMD):
    """Squared maximum mean discrepancy between the cohorts' posterior means, over pairs of groups; see `MMD`.

    It assumes that the cohorts have the same mixture of cells. If the treatment removes or adds a cell type, a large
    weight forces unrelated cells together.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    n_cells
        Number of cells of each cohort to compare, the first in the minibatch.
    """

    name = "cohort_mmd"


class Wasserstein(Penalty):
    """Squared 2-Wasserstein distance of posteriors to a point mass at the origin.

    It is ``||mu||^2 + sum(sigma^2)``, summed over the given cells and divided by the number of cells of the minibatch.
    It keeps the salient variables of background cells, which the model never uses, near their true value 0
    (contrastiveVI).

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    """

    name = "wasserstein"
    warms_up = True

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar."""
        terms = [q.loc.square().sum() + q.scale.square().sum() for q in posteriors.values()]
        return torch.stack(terms).sum() / len(minibatch)


class Dependence(Penalty):
    """Dependence between two representations of the same cells: centred kernel alignment of their posterior means.

    It is 0 for independent representations, and 1 for representations with the same geometry. Kernels are Gaussian;
    their squared width is the mean squared distance, through which no gradient flows. Under the prior of the model,
    background and salient variables are independent; the penalty favours posteriors with the same property.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    n_cells
        Number of cells to use, the first in the minibatch; time grows with its square.

    References
    ----------
    Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms, 2005; Cortes et al., Algorithms for
    learning kernels based on centered alignment, JMLR 2012.
    """

    name = "dependence"
    warms_up = True

    @checked
    def __init__(self, weight: Weight = 1.0, n_cells: Count = 256) -> None:
        super().__init__(weight, n_cells)

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with fewer than three cells."""
        first, second = (q.loc for q in posteriors.values())
        return dependence(first, second)
