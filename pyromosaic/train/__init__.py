"""Training: stochastic variational inference under Lightning; a few steps without it."""

from pyromosaic.train.elbo import MosaicELBO
from pyromosaic.train.plan import NonFiniteLossError, Optimisation, Plan, Schedule, fit
from pyromosaic.train.steps import minimise

__all__ = ["MosaicELBO", "NonFiniteLossError", "Optimisation", "Plan", "Schedule", "fit", "minimise"]
