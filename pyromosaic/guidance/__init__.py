"""What is known of features that go together, and what it says of cells."""

from pyromosaic.guidance.graph import GuidanceGraph
from pyromosaic.guidance.scores import linked_scores, shared_scores

__all__ = ["GuidanceGraph", "linked_scores", "shared_scores"]
