"""Calibration: whether the ranks of true values among a model's draws are uniform."""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from pyromosaic.accepted import Count, Positive, Seed, Whole, checked
from pyromosaic.checks.cells import (
    BLOCK,
    blocks,
    explain,
    infer,
    log_weight,
)
from pyromosaic.checks.ranks import Ranks
from pyromosaic.data import Minibatch, Mosaic, loader
from pyromosaic.measurement import encoded_once
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.tasks import inference_mode
from pyromosaic.tasks.prediction import ENTRIES
from pyromosaic.threads import one_thread
from pyromosaic.train import minimise
from pyromosaic.train.drawn import cell_sites, draw_prior, drawn_minibatch, shared_variables, without_penalties

if TYPE_CHECKING:
    from anndata import AnnData

Quantity = Literal["latent", "mean", "effect"]


@checked
@one_thread
def simulation_based_calibration(
    model: MosaicModel,
    cells: Cells = None,
    *,
    of: Quantity = "latent",
    n_samples: Count = 99,
    n_steps: Whole = 500,
    batch_size: Count = 256,
    learning_rate: Positive = 3e-3,
    data: Mosaic | None = None,
    seed: Seed = 0,
) -> Ranks:
    """Ranks of true values, drawn from the model itself, among draws from the posterior that the guide infers.

    For each cell, latent variables are drawn from their prior, and measurements given these. The guide sees the
    measurements, and the true values are ranked among its draws. The parameters of the model are fixed throughout. If
    posteriors are right, ranks are uniform (`Ranks.test`), and intervals have the right coverage (`Ranks.coverage`). If
    posteriors are too narrow, the histogram of ranks has a U shape (`pyromosaic.plot.ranks`).

    Parameters
    ----------
    model
        The model, trained or not; it is not changed.
    cells
        Cells whose modalities, covariates and sizes the drawn cells have: names, positions or a mask; None for all.
    of
        Quantity to rank: ``"latent"``, each dimension of the cells' latent variables; ``"mean"``, the expected
        measurement of each feature where it is measured; ``"effect"``, the log ratio (for real values, the difference)
        of the expected measurements of a feature in two successive cells that have it, as in a differential test.
    n_samples
        Number of posterior draws for each cell.
    n_steps
        Number of steps for which a copy of the guide is first fitted to data drawn from the model: new draws at each
        step, the plain ELBO, no penalties. 0 evaluates the guide as it is, trained on real data with penalties.
    batch_size, learning_rate
        Number of cells in a step; initial learning rate of Adam, which falls to 0 along a cosine.
    data
        Cells other than the training data.
    seed
        Seed of all draws.

    Returns
    -------
    Ranks
        Variables are the sites of the model (``"z"``, …), or modalities.

    Raises
    ------
    ValueError
        If the posterior is a point estimate.

    References
    ----------
    Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018; Yao et al., Yes, but
    did it work? Evaluating variational inference, ICML 2018.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, simulate
    >>> model = MultiVI(Mosaic.from_mudata(simulate(200, {"rna": 50, "adt": 5})[0]), n_latent=3)
    >>> checks.simulation_based_calibration(model, n_samples=9, n_steps=5)
    Ranks of 200 cells among 9 draws: z (3)
    """
    mosaic = model._data(data)
    index = mosaic.find(cells)
    if mosaic.groups is not None:
        index = index[mosaic.groups[index] >= 0]
    program, guide = copy.deepcopy((model.model, model.guide))  # together, as they share parameters
    with inference_mode(program, guide, seed=seed), without_penalties(guide):
        first = next(blocks(model, mosaic, index))
        shared = shared_variables(guide, first)
        with torch.enable_grad():
            fit_guide(program, guide, mosaic, index, shared, n_steps, batch_size, learning_rate, seed)
        tables: tuple[list[pd.DataFrame], ...] = ([], [])
        for i, minibatch in enumerate(blocks(model, mosaic, index)):
            names = mosaic.obs_names[index[i * BLOCK : i * BLOCK + len(minibatch)]]
            drawn = draw_prior(program, minibatch, shared)
            simulated = drawn_minibatch(program, minibatch, drawn)
            truth = quantities(drawn, simulated, of)
            below, equal = ({k: torch.zeros_like(v) for k, (_, v) in truth.items()} for _ in range(2))
            with encoded_once(guide):
                for _ in range(n_samples):
                    inferred = infer(guide, simulated, shared)
                    found = inferred if of == "latent" else explain(program, simulated, inferred)
                    posterior = quantities(found, simulated, of)
                    for k, (_, value) in truth.items():
                        below[k] += (posterior[k][1] < value).float().masked_fill(value.isnan(), torch.nan)
                        equal[k] += (posterior[k][1] == value).float().masked_fill(value.isnan(), torch.nan)
            for table, n in zip(tables, (below, equal), strict=True):
                table.append(_frame(model, names, {k: (where, n[k]) for k, (where, _) in truth.items()}))
    return Ranks(pd.concat(tables[0]), pd.concat(tables[1]), n_samples)


@checked
def fit_guide(
    model: Any,
    guide: Any,
    mosaic: Mosaic,
    index: np.ndarray,
    shared: poutine.Trace,
    n_steps: Whole,
    batch_size: Count,
    learning_rate: Positive,
    seed: Seed,
) -> None:
    """Fit a guide to data drawn from a model with fixed parameters, by the plain ELBO."""
    if n_steps == 0:
        return
    owned = {id(parameter) for parameter in model.parameters()}
    parameters = [parameter for parameter in guide.parameters() if id(parameter) not in owned]
    device, minibatches = parameters[0].device, loader(mosaic, index, batch_size, seed)

    def losses() -> Iterator[Tensor]:
        for minibatch in chain.from_iterable(repeat(minibatches)):
            minibatch = minibatch.to(device)
            simulated = drawn_minibatch(model, minibatch, draw_prior(model, minibatch, shared))
            inferred = infer(guide, simulated, shared)
            yield -log_weight(explain(model, simulated, inferred), inferred, simulated).mean()

    minimise(losses(), parameters, learning_rate, n_steps, gradient_clip=10.0)


def quantities(found: poutine.Trace, minibatch: Minibatch, of: Quantity) -> dict[str, tuple[Tensor, Tensor]]:
    """The quantities to rank, by variable: cell positions, and values of shape (cells, names)."""
    values = {}
    for name, site, where in cell_sites(found, minibatch):
        if of == "latent" and name not in minibatch.decoded:
            value = site["value"].reshape(len(where), -1)
            mask = site["mask"]
            if isinstance(mask, Tensor):  # cells that do not have the variable
                value = value.masked_fill(~mask.reshape(len(where), 1), torch.nan)
            values[name] = where, value
        elif of != "latent" and name in minibatch.decoded:
            mean, measured = site["fn"].mean, minibatch.decoded[name].measured
            if measured is not None:
                mean = mean.masked_fill(~measured, torch.nan)
            if of == "effect":
                n = len(where) // 2
                positive = not bool((mean <= 0).any())
                scale = mean.log() if positive else mean
                where, mean = where[: 2 * n : 2], scale[: 2 * n : 2] - scale[1 : 2 * n : 2]
            values[name] = where, mean
    return values


def _frame(model: MosaicModel, cells: pd.Index, found: dict[str, tuple[Tensor, Tensor]]) -> pd.DataFrame:
    """Cells × (variable, name), NaN where a cell has no such quantity."""
    parts = {}
    for variable, (where, value) in found.items():
        part = np.full((len(cells), value.shape[1]), np.nan)
        part[where.cpu().numpy()] = value.cpu().numpy()
        modality = model.schema.modalities.get(variable)
        names = range(value.shape[1]) if modality is None else modality.features
        parts[variable] = pd.DataFrame(part, cells, [str(name) for name in names])
    return pd.concat(parts, axis=1, names=["variable", "name"])


@checked
def imputation_ranks(
    model: MosaicModel,
    modality: str,
    truth: "AnnData | pd.DataFrame",
    *,
    n_samples: Count = 199,
    encode: Sequence[str] | None = None,
    data: Mosaic | None = None,
    seed: Seed = 0,
) -> Ranks:
    """Ranks of held-out measurements among draws from their posterior predictive distribution.

    ``imputation_ranks(...).coverage([0.9])`` returns the share of measurements in the 90 % intervals; for counts, use
    the randomised share. The draws include all uncertainty about such a cell, including its size.

    Parameters
    ----------
    model
        The model, which has not seen these measurements.
    modality
        Modality of the measurements.
    truth
        Held-out measurements of cells of the mosaic, e.g. from `pyromosaic.hide`; or a table, cells × features, in
        which missing values have no rank. If the model splits cells by modality, names of cells are like
        ``"rna:cell"``.
    n_samples
        Number of draws.
    encode
        Modalities to infer from; by default all modalities of a cell.
    data
        Cells other than the training data.
    seed
        Seed of the draws.

    Returns
    -------
    Ranks
        Cells × features, with the modality as the variable.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, checks, hide, simulate
    >>> mdata, _ = simulate(200, {"rna": 50, "adt": 5}, patterns=["rna+adt"])
    >>> mdata, truth = hide(mdata, {"adt": 20})
    >>> model = MultiVI(Mosaic.from_mudata(mdata), n_latent=3)
    >>> checks.imputation_ranks(model, "adt", truth["adt"], n_samples=9)
    Ranks of 20 cells among 9 draws: adt (5)
    """
    if not isinstance(truth, pd.DataFrame) and not hasattr(truth, "to_df"):
        raise ValueError(
            f"truth must be an AnnData or a table with names, cells × features; found a {type(truth).__name__}"
        )
    if not isinstance(truth, pd.DataFrame):
        truth = truth.to_df(model.schema[modality].spec.layer)
    spec = model.schema[modality].spec
    try:
        measured = truth.to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"truth must be a table of numbers; found other values: {error}") from error
    features = list(truth.columns)
    model._features(modality, features)
    size = max(1, ENTRIES // (n_samples * len(features)))
    below, equal = np.empty((2, *truth.shape))
    for start in range(0, len(truth), size):
        part = slice(start, start + size)
        cells, values, missing = list(truth.index[part]), measured[part], np.isnan(measured[part])
        if spec.traits.binary:
            values = values > 0
        if spec.cut_sites:
            values = values // 2 + values % 2
        draws = model.posterior_predictive_sample(
            modality, cells, features=features, encode=encode, n_samples=n_samples, data=data, seed=seed + start
        )
        below[part] = np.where(missing, np.nan, (draws < values).sum(0))
        equal[part] = np.where(missing, np.nan, (draws == values).sum(0))
    columns = pd.MultiIndex.from_product([[modality], features], names=["variable", "name"])
    return Ranks(
        pd.DataFrame(below, truth.index, columns), pd.DataFrame(equal, truth.index, columns), n_samples=n_samples
    )
