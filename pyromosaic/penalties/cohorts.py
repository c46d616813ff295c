"""Penalties for models that contrast a background with a target cohort."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyromosaic.data import Minibatch
from pyromosaic.penalties.divergence import MMD
from pyromosaic.penalties.kernels import dependence
from pyromosaic.penalties.penalty import Penalty
from pyromosaic.posterior import Posterior


class CohortMMD(MMD):
    """Squared maximum mean discrepancy between the cohorts' posterior means, over pairs of groups; see `MMD`.

    It assumes that the cohorts hold the same mixture of cells: where treatment removes or adds a cell type, a large
    weight forces strangers together.

    Parameters
    ----------
    weight
        What it is multiplied by.
    n_cells
        So many cells of each cohort are compared, the first of the minibatch.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> control = Posterior(torch.arange(10), torch.randn(10, 2), torch.ones(10, 2))
    >>> treated = Posterior(torch.arange(10, 20), control.loc + 5, torch.ones(10, 2))
    >>> bool(CohortMMD()({"control": control, "treated": treated}, minibatch) > 0.5)
    True
    """

    name = "cohort_mmd"


class Wasserstein(Penalty):
    """Squared 2-Wasserstein distance of posteriors to a point mass at the origin.

    ``||mu||^2 + sum(sigma^2)``, summed over the cells that are given and divided by the cells of the minibatch. Keeps
    the salient variables of background cells, which the model never uses, near their true value 0 (contrastiveVI).

    Parameters
    ----------
    weight
        What it is multiplied by.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> mdata, _ = simulate(10, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
    >>> minibatch = measured(Mosaic.from_mudata(mdata), np.arange(10))
    >>> adt = Posterior(torch.arange(10), torch.ones(10, 2), torch.ones(10, 2))
    >>> Wasserstein()({"s": adt}, minibatch)  # mean 1 and variance 1 in each of two dimensions
    tensor(4.)
    """

    name = "wasserstein"
    warms_up = True

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar."""
        terms = [q.loc.square().sum() + q.scale.square().sum() for q in posteriors.values()]
        return torch.stack(terms).sum() / len(minibatch)


class Dependence(Penalty):
    """Dependence between two representations of the same cells: centred kernel alignment of their posterior means.

    0 for independent representations, 1 for representations with the same geometry. Gaussian kernels; the squared
    width is the mean squared distance, through which no gradient flows. The model's prior says that background and
    salient variables are independent; this asks the same of what is inferred.

    Parameters
    ----------
    weight
        What it is multiplied by.
    n_cells
        So many cells are looked at, the first of the minibatch: time grows with their square.

    References
    ----------
    Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms, 2005; Cortes et al., Algorithms for
    learning kernels based on centered alignment, JMLR 2012.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> z = Posterior(torch.arange(20), torch.randn(20, 2), torch.ones(20, 2))
    >>> s = Posterior(torch.arange(20), 3 * z.loc, torch.ones(20, 2))  # of the same geometry
    >>> round(Dependence()({"z": z, "s": s}, minibatch).item(), 3)
    1.0
    """

    name = "dependence"
    warms_up = True

    def __init__(self, weight: float = 1.0, n_cells: int = 256) -> None:
        super().__init__(weight, n_cells)

    def forward(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Tensor:
        """The penalty, a scalar; 0 with fewer than three cells."""
        first, second = (q.loc for q in posteriors.values())
        return dependence(first, second)
