"""Penalties on posteriors: terms that a guide adds to the loss, each as one named `pyro.factor`."""

from pyromosaic.penalties.adversary import Adversary
from pyromosaic.penalties.anchors import Anchors, Pull, Scores, mutual_neighbors
from pyromosaic.penalties.classifier import Classifier
from pyromosaic.penalties.cohorts import CohortMMD, Dependence, Wasserstein
from pyromosaic.penalties.cycle import Cycle
from pyromosaic.penalties.divergence import MMD, Jeffreys, MeanDistance
from pyromosaic.penalties.geometry import Geometry
from pyromosaic.penalties.kernels import dependence, discrepancy, kernel_alignment, row_cosine, squared_distances
from pyromosaic.penalties.pairs import Discriminator, Pairs
from pyromosaic.penalties.penalty import Penalty, apply, attached, chosen, with_given
from pyromosaic.penalties.transport import Sinkhorn, sinkhorn_divergence

__all__ = [
    "MMD",
    "Adversary",
    "Anchors",
    "Classifier",
    "CohortMMD",
    "Cycle",
    "Dependence",
    "Discriminator",
    "Geometry",
    "Jeffreys",
    "MeanDistance",
    "Pairs",
    "Penalty",
    "Pull",
    "Scores",
    "Sinkhorn",
    "Wasserstein",
    "apply",
    "attached",
    "chosen",
    "dependence",
    "discrepancy",
    "kernel_alignment",
    "mutual_neighbors",
    "row_cosine",
    "sinkhorn_divergence",
    "squared_distances",
    "with_given",
]
