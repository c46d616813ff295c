"""Guidance graphs of linked features, and scores of cells from them or from pairs."""

from pyromosaic.guidance.scores import few_pairs, linked_scores, mosaic_scores, shared_scores
from pyromosaic.links import GuidanceGraph as GuidanceGraph  # described with the links

__all__ = ["few_pairs", "linked_scores", "mosaic_scores", "shared_scores"]
