"""Methods of every trained model, written once for its Pyro program."""

from pyromosaic.program import AtMean
from pyromosaic.tasks.blockwise import blocks
from pyromosaic.tasks.differential import compare, compare_groups, contrasts, estimate_delta
from pyromosaic.tasks.inference import inference_mode
from pyromosaic.tasks.prediction import Block, Estimate, answers, draws, estimate
from pyromosaic.tasks.question import Question

__all__ = [
    "AtMean",
    "Block",
    "Estimate",
    "Question",
    "answers",
    "blocks",
    "compare",
    "compare_groups",
    "contrasts",
    "draws",
    "estimate",
    "estimate_delta",
    "inference_mode",
]
