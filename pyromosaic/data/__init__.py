"""The mosaic: what is measured in which cell, its checks, splits and minibatches, and packaged real data."""

from pyromosaic.data.chromatin import fragments
from pyromosaic.data.cohorts import Cohorts
from pyromosaic.data.controls import control_roles, separate_controls
from pyromosaic.data.datasets import pbmc_mosaic, protein_gene_links
from pyromosaic.data.droplets import droplet_profile
from pyromosaic.data.loaders import Divided, Split, contrastive_loader, loader, split
from pyromosaic.data.minibatch import Minibatch, View, measured, to_predict
from pyromosaic.data.mosaic import Modality, Mosaic
from pyromosaic.data.reading import read
from pyromosaic.data.simulate import Truth, simulate
from pyromosaic.data.spec import ModalitySchema, ModalitySpec, Schema
from pyromosaic.data.traits import TRAITS, DataKind, Traits
from pyromosaic.data.unpair import hide, separate, unpair

__all__ = [
    "TRAITS",
    "Cohorts",
    "DataKind",
    "Divided",
    "Minibatch",
    "Modality",
    "ModalitySchema",
    "ModalitySpec",
    "Mosaic",
    "Schema",
    "Split",
    "Traits",
    "Truth",
    "View",
    "contrastive_loader",
    "control_roles",
    "droplet_profile",
    "fragments",
    "hide",
    "loader",
    "measured",
    "pbmc_mosaic",
    "to_predict",
    "protein_gene_links",
    "read",
    "simulate",
    "separate",
    "separate_controls",
    "split",
    "unpair",
]
