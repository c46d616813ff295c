"""Guidance graphs of linked features, and scores of cells from them."""

from pyromosaic.guidance.scores import linked_scores, shared_scores
from pyromosaic.links import GuidanceGraph as GuidanceGraph  # described with the links

__all__ = ["linked_scores", "shared_scores"]
