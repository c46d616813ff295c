"""A model's program cell by cell: draws for each cell, and their log densities."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyromosaic.accepted import Seed, checked
from pyromosaic.data import Minibatch, Mosaic, measured
from pyromosaic.data.matrix import Matrix
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.tasks import inference_mode
from pyromosaic.train.drawn import cell_sites, draw_prior, drawn_minibatch, shared_variables, trace, without_penalties

BLOCK = 256  # cells at once


def blocks(model: MosaicModel, mosaic: Mosaic, index: np.ndarray, size: int = BLOCK) -> Iterator[Minibatch]:
    """Minibatches of the cells as they were measured, in order."""
    for start in range(0, len(index), size):
        yield measured(mosaic, index[start : start + size]).to(model._device)


def infer(guide: Any, minibatch: Minibatch, shared: poutine.Trace | None = None) -> poutine.Trace:
    """One draw from the guide, including variables shared by all cells unless they are given."""
    return trace(guide if shared is None else poutine.replay(guide, trace=shared), minibatch)


def explain(model: Any, minibatch: Minibatch, inferred: poutine.Trace) -> poutine.Trace:
    """Trace of the model at these latent values."""
    return trace(poutine.replay(model, trace=inferred), minibatch)


def log_weight(explained: poutine.Trace, inferred: poutine.Trace, minibatch: Minibatch) -> Tensor:
    """``log p(x, latent) - log q(latent)`` of each cell, shape (B,), float64.

    Weights and scales of sites are ignored. Masked sites and latent variables shared by all cells are left out.
    """
    total = torch.zeros(len(minibatch), dtype=torch.float64, device=minibatch.index.device)
    for sign, found in ((1.0, explained), (-1.0, inferred)):
        for name, site, where in cell_sites(found, minibatch):
            if isinstance(site["fn"], dist.Delta):
                raise ValueError(
                    f"the guide has a point estimate of {name!r}; checks of posteriors need a distribution"
                )
            density = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            total = total.index_add(0, where, sign * density.reshape(len(where), -1).sum(-1).double())
    return total


@checked
def prior_sample(
    model: MosaicModel, cells: Cells = None, *, data: Mosaic | None = None, seed: Seed = 0
) -> tuple[Mosaic, dict[str, pd.DataFrame]]:
    """Draw a mosaic from the model, and return it with the latent variables that generated it.

    Cells have the same modalities, covariates, cohorts and sizes as in the data; a size that is latent in the model is
    drawn and counted again. Parameters and latent variables shared by all cells stay as learnt.

    Parameters
    ----------
    model
        The model.
    cells
        Names, positions or a mask; None for all.
    data
        Cells other than the training data.
    seed
        Seed of the draw.

    Returns
    -------
    mosaic
        Mosaic with the schema of the model; the model accepts it as ``data``.
    latent
        Latent variables by site of the model, cells × dimensions; a private variable has only the cells with the
        modality.
    """
    mosaic = model._data(data)
    index = mosaic.find(cells)
    names = mosaic.obs_names[index]
    counts: dict[str, list[np.ndarray]] = {
        name: [np.zeros((0, m.n_features))] for name, m in model.schema.modalities.items()
    }
    latent: dict[str, list[pd.DataFrame]] = {}
    library = {name: m.library[index].copy() for name, m in mosaic.modalities.items()}
    with inference_mode(model.model, model.guide, seed=seed), without_penalties(model.guide):
        for i, minibatch in enumerate(blocks(model, mosaic, index)):
            shared = shared_variables(model.guide, minibatch)
            drawn = draw_prior(model.model, minibatch, shared)
            for name, site, where in cell_sites(drawn, minibatch):
                values = site["value"].cpu().numpy()
                if name in counts:
                    counts[name].append(values)
                else:
                    own = names[i * BLOCK + where.cpu().numpy()]
                    latent.setdefault(name, []).append(pd.DataFrame(values.reshape(len(own), -1), own))
            for name, view in drawn_minibatch(model.model, minibatch, drawn).decoded.items():
                library[name][i * BLOCK + view.rows.cpu().numpy()] = view.library[:, 0].cpu().numpy()
    modalities = {}
    for name, m in mosaic.modalities.items():
        has = m.rows[index] >= 0
        modalities[name] = replace(
            m.take(index),
            matrix=Matrix(np.concatenate(counts[name]).astype(np.float32)),
            rows=np.where(has, np.cumsum(has) - 1, -1),
            library=library[name],
            dense=True,
            exposures=None if m.exposures is None else Matrix(m.exposures[m.rows[index][has]]),
        )
    groups = None if mosaic.groups is None else mosaic.groups[index]
    drawn_mosaic = replace(mosaic, obs_names=names, modalities=modalities, groups=groups)
    return drawn_mosaic, {name: pd.concat(parts) for name, parts in latent.items()}
