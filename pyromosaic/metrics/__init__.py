"""Measures of an integration: alignment, mixing, imputation and calibration.

Plain functions that turn arrays into numbers, the same for every model and method. None of them draws random numbers.

=================  =====================================================================================
alignment          :func:`foscttm`, :func:`neighbor_rank_distance`, :func:`label_transfer_accuracy`,
                   :func:`label_transfer_both_ways`
mixing             :func:`modality_enrichment`, :func:`label_purity`
imputation         :func:`imputation_spearman`, :func:`imputation_auprc`, :func:`scale_by_library`,
                   :func:`smooth_by_neighbors`
calibration        :func:`interval_coverage`, :func:`reliability_curve`, :func:`expected_calibration_error`,
                   :func:`error_by_uncertainty`
=================  =====================================================================================
"""

from pyromosaic.metrics.alignment import (
    LabelTransfer,
    foscttm,
    label_transfer_accuracy,
    label_transfer_both_ways,
    neighbor_rank_distance,
)
from pyromosaic.metrics.calibration import (
    error_by_uncertainty,
    expected_calibration_error,
    interval_coverage,
    reliability_curve,
)
from pyromosaic.metrics.imputation import (
    imputation_auprc,
    imputation_spearman,
    scale_by_library,
    smooth_by_neighbors,
)
from pyromosaic.metrics.mixing import label_purity, modality_enrichment

__all__ = [
    "LabelTransfer",
    "error_by_uncertainty",
    "expected_calibration_error",
    "foscttm",
    "imputation_auprc",
    "imputation_spearman",
    "interval_coverage",
    "label_purity",
    "label_transfer_accuracy",
    "label_transfer_both_ways",
    "modality_enrichment",
    "neighbor_rank_distance",
    "reliability_curve",
    "scale_by_library",
    "smooth_by_neighbors",
]
