"""Training: stochastic variational inference under Lightning, a sleep phase after it; a few steps without it."""

from pyromosaic.train.elbo import MosaicELBO
from pyromosaic.train.fitting import check_trainer, fit
from pyromosaic.train.plan import NonFiniteLossError, Optimisation, Plan, Schedule
from pyromosaic.train.sleep import sleep
from pyromosaic.train.steps import minimise

__all__ = [
    "MosaicELBO",
    "NonFiniteLossError",
    "Optimisation",
    "Plan",
    "Schedule",
    "check_trainer",
    "fit",
    "minimise",
    "sleep",
]
