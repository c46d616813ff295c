"""Guidance graphs of linked features, and scores of cells from them."""

from pyromosaic.guidance.scores import linked_scores, shared_scores
from pyromosaic.links import GuidanceGraph

__all__ = ["GuidanceGraph", "linked_scores", "shared_scores"]
