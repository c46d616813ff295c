"""What is known of features that go together, and what it says of cells."""

from pyromosaic.guidance.scores import linked_scores, shared_scores
from pyromosaic.links import GuidanceGraph

__all__ = ["GuidanceGraph", "linked_scores", "shared_scores"]
