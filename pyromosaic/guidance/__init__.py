"""Guidance graphs of linked features, and scores of cells from them."""

from pyromosaic.guidance.graph import GuidanceGraph
from pyromosaic.guidance.scores import linked_scores, shared_scores

__all__ = ["GuidanceGraph", "linked_scores", "shared_scores"]
