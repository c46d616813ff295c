"""Figures: embeddings, imputed against measured values, training curves, differences, and checks.

Every function draws on the given axes, or on new ones, and returns them. It does not change its arguments.
"""

from pyromosaic.plot.cells import embedding, history, imputation, overview, umap
from pyromosaic.plot.checks import (
    STATISTICS,
    calibration_report,
    coverage,
    mean_variance,
    predictive,
    predictive_checks,
    ranks,
)
from pyromosaic.plot.features import differential
from pyromosaic.plot.style import PALETTE, UNKNOWN

__all__ = [
    "PALETTE",
    "STATISTICS",
    "UNKNOWN",
    "calibration_report",
    "coverage",
    "differential",
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
