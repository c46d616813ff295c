"""Training: stochastic variational inference under Lightning."""

from pyromosaic.train.elbo import MosaicELBO
from pyromosaic.train.plan import NonFiniteLossError, Optimisation, Plan, Schedule, fit

__all__ = ["MosaicELBO", "NonFiniteLossError", "Optimisation", "Plan", "Schedule", "fit"]
