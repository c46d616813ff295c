"""Penalties on posteriors; a guide adds each as one named `pyro.factor`.

A penalty is a function of the posteriors and does not describe how the data are generated. Therefore it is part of the
guide: the model stays a proper joint density, and prior and posterior predictive samples and held-out likelihoods never
contain it.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import pyro
from torch import nn

from pyromosaic.accepted import Count, Weight, checked
from pyromosaic.data import Minibatch
from pyromosaic.described import Described
from pyromosaic.posterior import Posterior
from pyromosaic.program import own


class Penalty(Described):
    """A term that is added to the loss.

    Subclasses define `forward(posteriors, minibatch)`. It returns a scalar, the mean of the penalty over the cells of
    the minibatch.

    Parameters
    ----------
    weight
        Factor of the penalty in the loss.
    n_cells
        Number of cells to use from each population, the first in the (shuffled) minibatch; None for all.
    """

    name: str
    warms_up = False  # whether it is multiplied by the weight of the divergences, which increases during training
    fades = 0.0  # share of its weight that fades as that weight increases

    @checked
    def __init__(self, weight: Weight = 1.0, n_cells: Count | None = None) -> None:
        super().__init__()
        self.weight, self.n_cells = weight, n_cells

    def attach(self, modalities: Mapping[str, Any]) -> None:
        """Receive the parts of the guide for each modality, if the penalty uses them."""

    def __call__(self, posteriors: Mapping[str, Posterior], minibatch: Minibatch) -> Any:
        """The penalty for the cells in use."""
        if self.n_cells is not None:
            posteriors = {name: q.of(slice(self.n_cells)) for name, q in posteriors.items()}
        return super().__call__(posteriors, minibatch)


P = TypeVar("P", bound=Penalty)


def chosen(option: str, given: Any, kind: type[P], **known: Any) -> P:
    """The penalty for an option of a model, which is a weight or a penalty with more arguments.

    Parameters
    ----------
    option
        Name of the option.
    given
        Its value.
    kind
        Class of the penalty.
    **known
        Values from the model for arguments that were left out.

    Raises
    ------
    ValueError
        If it is neither a number nor a penalty of this class.

    Examples
    --------
    >>> from pyromosaic.penalties import MMD
    >>> [(p.weight, p.n_cells) for p in (chosen("mmd", given, MMD) for given in (2.0, MMD(2.0, n_cells=64)))]
    [(2.0, 256), (2.0, 64)]
    """
    if isinstance(given, kind):
        return given.completed(**known) if known else given
    if not isinstance(given, Real):
        raise ValueError(f"{option} must be a weight or a pyromosaic.penalties.{kind.__name__}; found {given!r}")
    return kind(weight=float(given), **known)


def with_given(defaults: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The default penalties of a model and the user's, which replace defaults of the same name.

    Examples
    --------
    >>> from pyromosaic.penalties import MMD, Jeffreys
    >>> [(p.name, p.weight) for p in with_given([Jeffreys(0.2), MMD(50.0)], [MMD(1.0)])]
    [('jeffreys', 0.2), ('mmd', 1.0)]
    """
    names = {penalty.name for penalty in given}
    return [*(penalty for penalty in defaults if penalty.name not in names), *given]


def attached(penalties: Iterable[Any], modalities: Mapping[str, Any]) -> nn.ModuleList:
    """The penalties as a part of a guide for these modalities.

    Examples
    --------
    >>> from pyromosaic.penalties import MMD
    >>> attached([MMD(1.0)], {})
    ModuleList(
      (0): MMD()
    )
    """
    owned = [own(penalty) for penalty in penalties]
    for penalty in owned:
        if not getattr(penalty, "complete", True):
            raise ValueError(
                f"{type(penalty).__name__} takes {' and '.join(penalty.needed)}, unless it is passed as an option of a "
                "model that has one"
            )
        penalty.attach(modalities)
    return nn.ModuleList(owned)


def apply(
    penalties: Iterable[Any], posteriors: Mapping[str, Posterior], minibatch: Minibatch, kl_weight: float
) -> None:
    """Add each penalty to the guide, scaled from the minibatch mean to all cells; call it outside every plate.

    Parameters
    ----------
    penalties
        Instances of `Penalty`; those with weight 0 are skipped.
    posteriors
        The posteriors to compare, by name.
    minibatch
        The cells.
    kl_weight
        Weight of the divergences, which multiplies penalties that warm up, and reduces those that fade.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from pyromosaic import Mosaic, simulate
    >>> from pyromosaic.data import measured
    >>> from pyromosaic.penalties import Wasserstein
    >>> minibatch = measured(Mosaic.from_mudata(simulate(20, {"rna": 50})[0]), np.arange(20))
    >>> q = Posterior(torch.arange(20), torch.ones(20, 2), torch.ones(20, 2))
    >>> with pyro.poutine.trace() as tracer:
    ...     apply([Wasserstein(0.5)], {"s": q}, minibatch, kl_weight=1.0)
    >>> tracer.trace.nodes["penalty/wasserstein"]["fn"].log_factor  # half of 4, for 20 cells
    tensor(40.)
    """
    if all(view.counts is None for view in minibatch.decoded.values()):
        return  # nothing is explained, so nothing is trained
    for penalty in penalties:
        if penalty.weight:
            weight = penalty.weight * (kl_weight if penalty.warms_up else 1.0) * (1 - kl_weight * penalty.fades)
            value = weight * minibatch.n_cells * penalty(posteriors, minibatch)
            # In a guide, a factor enters the ELBO with a minus sign.
            pyro.factor(f"penalty/{penalty.name}", value, has_rsample=True)
