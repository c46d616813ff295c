"""Model criticism: whether a model fits the data, and whether its uncertainty is right.

==========================================  ==========================================================================
do data drawn from the model look like      :func:`predictive_check`
the data?
are posteriors right where the truth is     :func:`simulation_based_calibration`
known, drawn from the model itself?
do intervals of imputed values contain the  :func:`imputation_ranks`
held-out values?
how likely are held-out cells?              :func:`held_out_log_likelihood`
all of these but the last two, in one       :func:`calibration_report`
table
==========================================  ==========================================================================

Figures of the results are in `pyromosaic.plot`: `calibration_report`, `predictive_checks`, `ranks` and `coverage`.
"""

from pyromosaic.checks.calibration import imputation_ranks, simulation_based_calibration
from pyromosaic.checks.cells import prior_sample
from pyromosaic.checks.likelihood import held_out_log_likelihood
from pyromosaic.checks.predictive import PredictiveCheck, predictive_check
from pyromosaic.checks.ranks import Ranks
from pyromosaic.checks.report import CalibrationReport, calibration_report

__all__ = [
    "CalibrationReport",
    "PredictiveCheck",
    "Ranks",
    "calibration_report",
    "held_out_log_likelihood",
    "imputation_ranks",
    "predictive_check",
    "prior_sample",
    "simulation_based_calibration",
]
