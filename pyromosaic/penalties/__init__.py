"""Penalties on posteriors: terms that a guide adds to the loss, each as one named `pyro.factor`."""

from pyromosaic.penalties.divergence import MMD, Jeffreys, discrepancy
from pyromosaic.penalties.penalty import Penalty, apply

__all__ = ["MMD", "Jeffreys", "Penalty", "apply", "discrepancy"]
