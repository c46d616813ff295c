"""The models; each file has a generative model, a guide and the methods that only this model has."""

from pyromosaic.models.contrastivevi import ContrastiveVI
from pyromosaic.models.diagvi import DiagVI
from pyromosaic.models.mosaic_model import MosaicModel
from pyromosaic.models.multivi import MultiVI
from pyromosaic.models.scmodal import ScModal

__all__ = ["ContrastiveVI", "DiagVI", "MosaicModel", "MultiVI", "ScModal"]
