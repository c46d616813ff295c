"""What every trained model can do, written once against its Pyro program."""

from pyromosaic.tasks.inference import AtMean, inference_mode
from pyromosaic.tasks.prediction import Estimate, draws, estimate

__all__ = ["AtMean", "Estimate", "draws", "estimate", "inference_mode"]
