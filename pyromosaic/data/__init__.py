"""The mosaic: what is measured in which cell, its checks, splits and minibatches, and packaged real data."""

from pyromosaic.data.datasets import pbmc_mosaic, protein_gene_links
from pyromosaic.data.minibatch import Minibatch, Split, View, loader, measured, split, to_predict
from pyromosaic.data.mosaic import Modality, Mosaic
from pyromosaic.data.spec import ModalitySchema, ModalitySpec, Schema
from pyromosaic.data.unpair import hide, unpair

__all__ = [
    "Minibatch",
    "Modality",
    "ModalitySchema",
    "ModalitySpec",
    "Mosaic",
    "Schema",
    "Split",
    "View",
    "hide",
    "loader",
    "measured",
    "pbmc_mosaic",
    "to_predict",
    "protein_gene_links",
    "split",
    "unpair",
]
