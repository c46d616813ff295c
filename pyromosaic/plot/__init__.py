"""Figures that people look at: embeddings, imputed against measured values, the course of training, and checks.

Every function draws on the axes it is given, or on new ones, and returns them; nothing it is given is changed.
"""

from pyromosaic.plot.cells import embedding, history, imputation, overview, umap
from pyromosaic.plot.checks import STATISTICS, coverage, mean_variance, predictive, predictive_checks, ranks
from pyromosaic.plot.style import PALETTE, UNKNOWN

__all__ = [
    "PALETTE",
    "STATISTICS",
    "UNKNOWN",
    "coverage",
    "embedding",
    "history",
    "imputation",
    "mean_variance",
    "overview",
    "predictive",
    "predictive_checks",
    "ranks",
    "umap",
]
