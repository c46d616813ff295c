"""Training: stochastic variational inference under Lightning, a sleep phase after it; a few steps without it."""

from pyromosaic.train.elbo import MosaicELBO
from pyromosaic.train.fitting import check_trainer, fit, has_bar
from pyromosaic.train.length import SMALLEST, epochs_for, minibatch_for, said, settings_for
from pyromosaic.train.plan import NonFiniteLossError, Optimisation, Plan, Schedule
from pyromosaic.train.processes import Processes
from pyromosaic.train.sleep import sleep
from pyromosaic.train.steps import minimise

__all__ = [
    "MosaicELBO",
    "NonFiniteLossError",
    "Optimisation",
    "Plan",
    "Processes",
    "SMALLEST",
    "Schedule",
    "check_trainer",
    "epochs_for",
    "fit",
    "has_bar",
    "minibatch_for",
    "minimise",
    "said",
    "settings_for",
    "sleep",
]
