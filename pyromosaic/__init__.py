"""Mosaic single-cell integration as Pyro programs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pyromosaic.data import ModalitySpec, Mosaic, hide, pbmc_mosaic, protein_gene_links, read, simulate, unpair
    from pyromosaic.models import ContrastiveVI, DiagVI, MultiVI, ScModal

# Imported when first used, so that `import pyromosaic` is quick.
_HOME = {
    "ContrastiveVI": "models",
    "DiagVI": "models",
    "ModalitySpec": "data",
    "Mosaic": "data",
    "MultiVI": "models",
    "ScModal": "models",
    "hide": "data",
    "pbmc_mosaic": "data",
    "protein_gene_links": "data",
    "read": "data",
    "simulate": "data",
    "unpair": "data",
}
_ROOMS = (
    "checks",
    "data",
    "distributions",
    "fusion",
    "guidance",
    "labels",
    "likelihoods",
    "linkage",
    "links",
    "metrics",
    "models",
    "nn",
    "penalties",
    "plot",
    "priors",
    "program",
    "sizes",
    "tasks",
    "testing",
    "train",
)

__all__ = [
    "ContrastiveVI",
    "DiagVI",
    "ModalitySpec",
    "Mosaic",
    "MultiVI",
    "ScModal",
    "hide",
    "pbmc_mosaic",
    "protein_gene_links",
    "read",
    "simulate",
    "unpair",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"pyromosaic.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"pyromosaic.{name}")
    raise AttributeError(f"module 'pyromosaic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
