"""One table of what a model's stated uncertainty is worth."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pyromosaic.accepted import Count, Seed, checked
from pyromosaic.checks.calibration import simulation_based_calibration
from pyromosaic.checks.predictive import PredictiveCheck, predictive_check
from pyromosaic.checks.ranks import Ranks
from pyromosaic.data import Mosaic
from pyromosaic.models.mosaic_model import Cells, MosaicModel


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibration_report` found.

    Parameters
    ----------
    table
        By ``question``, ``variable`` and ``cells``: ``inside_50`` and ``inside_90``, the shares of values in their 50 %
        and 90 % intervals, and ``n``, the number of values. For ``"latent"``, ``"mean"`` and ``"effect"`` the values
        are true ones, drawn from the model; if the guide is right, the shares equal the levels. For ``"data"`` they are
        observed statistics, compared with those of data drawn from the model.
    latent, mean, effect
        The ranks behind the table, see `simulation_based_calibration`.
    predictive
        The predictive check behind the table.
    """

    table: pd.DataFrame
    latent: Ranks
    mean: Ranks
    effect: Ranks
    predictive: PredictiveCheck


@checked
def calibration_report(
    model: MosaicModel,
    cells: Cells = None,
    *,
    links: pd.DataFrame | None = None,
    n_cells: Count = 500,
    n_samples: Count = 99,
    data: Mosaic | None = None,
    seed: Seed = 0,
) -> CalibrationReport:
    """Whether a trained model's intervals hold what they say, and whether it fits the data, in one table.

    It asks `simulation_based_calibration` of the guide as it is (``n_steps=0``) about latent variables (by pattern of
    modalities), expected measurements and effects, and `predictive_check` about the data.

    Parameters
    ----------
    model
        The model; it is not changed.
    cells
        Names, positions or a mask; None for all.
    links
        Pairs of features whose correlations to compare, as in `predictive_check`.
    n_cells
        Largest number of cells, drawn at random from `cells`.
    n_samples
        Number of draws.
    data
        Cells other than the training data.
    seed
        Seed of all draws.

    Returns
    -------
    CalibrationReport
        For a figure, see `pyromosaic.plot.calibration_report`.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> report = checks.calibration_report(model, n_samples=9)
    >>> report.table.loc["latent"].index.to_list()
    [('z', 'adt'), ('z', 'rna'), ('z', 'rna+adt')]
    """
    mosaic = model._data(data)
    index = mosaic.find(cells)
    if len(index) > n_cells:
        index = np.sort(np.random.default_rng(seed).choice(index, n_cells, replace=False))
    names = mosaic.obs_names[index]
    ranks = {
        of: simulation_based_calibration(model, names, of=of, n_samples=n_samples, n_steps=0, data=data, seed=seed)
        for of in ("latent", "mean", "effect")
    }
    check = predictive_check(model, names, links=links, n_samples=n_samples, data=data, seed=seed)
    rows = {}
    for of, found in ranks.items():
        patterns = mosaic.patterns.loc[names].rename("cells") if of == "latent" else None
        half, most = (found.coverage((level,), by=patterns) for level in (0.5, 0.9))
        shares = half["randomised"], most["randomised"], most["n"]
        for (variable, *group, _), *found_there in zip(half.index, *shares, strict=True):
            rows[of, variable, *(group or ["all"])] = found_there
    for name, outside, n in check.overall[["outside", "n"]].itertuples():
        rows["data", *name] = [np.nan, 1 - outside, n]
    index_of = pd.MultiIndex.from_tuples(list(rows), names=["question", "variable", "cells"])
    table = pd.DataFrame(list(rows.values()), index_of, ["inside_50", "inside_90", "n"]).astype({"n": int})
    return CalibrationReport(table, **ranks, predictive=check)
