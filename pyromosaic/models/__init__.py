"""The models; each is one file with a generative story, an inference story and what is special to it."""

from pyromosaic.models.contrastivevi import ContrastiveVI
from pyromosaic.models.diagvi import DiagVI
from pyromosaic.models.mosaic_model import MosaicModel
from pyromosaic.models.multivi import MultiVI
from pyromosaic.models.scmodal import ScModal

__all__ = ["ContrastiveVI", "DiagVI", "MosaicModel", "MultiVI", "ScModal"]
