"""A model's program cell by cell: draws for each cell, and their log densities."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyromosaic.accepted import Seed, checked
from pyromosaic.data import Minibatch, Mosaic, measured
from pyromosaic.data.matrix import Matrix
from pyromosaic.measurement import part_of
from pyromosaic.models.mosaic_model import Cells, MosaicModel
from pyromosaic.penalties import Penalty
from pyromosaic.program import AtMean
from pyromosaic.sizes import LatentSize
from pyromosaic.tasks import inference_mode

BLOCK = 256  # cells at once


def blocks(model: MosaicModel, mosaic: Mosaic, index: np.ndarray, size: int = BLOCK) -> Iterator[Minibatch]:
    """Minibatches of the cells as they were measured, in order."""
    for start in range(0, len(index), size):
        yield measured(mosaic, index[start : start + size]).to(model._device)


@contextmanager
def without_penalties(guide: nn.Module) -> Iterator[None]:
    """A guide without its penalties, which are not part of the posterior: their weight is 0."""
    penalties = [module for module in guide.modules() if isinstance(module, Penalty)]
    weights = [penalty.weight for penalty in penalties]
    for penalty in penalties:
        penalty.weight = 0.0
    try:
        yield
    finally:
        for penalty, weight in zip(penalties, weights, strict=True):
            penalty.weight = weight


def trace(program: Any, minibatch: Minibatch) -> poutine.Trace:
    """Trace of a program, without the sites by which Pyro records minibatches."""
    return prune_subsample_sites(poutine.trace(program).get_trace(minibatch))


def rows(site: Any, minibatch: Minibatch) -> Tensor | None:
    """Positions in the minibatch of the cells of a site; None if the site does not belong to cells."""
    for frame in site["cond_indep_stack"]:
        name = frame.name.removesuffix("_cells")
        if frame.name == "cells":
            return torch.arange(len(minibatch), device=minibatch.index.device)
        if frame.name != name and name in minibatch.decoded:
            return minibatch.decoded[name].rows
    return None


def cell_sites(found: poutine.Trace, minibatch: Minibatch) -> Iterator[tuple[str, Any, Tensor]]:
    """Sites that belong to cells, each with the positions of these cells."""
    for name, site in found.nodes.items():
        if site["type"] == "sample":
            where = rows(site, minibatch)
            if where is not None:
                yield name, site, where


def shared_variables(guide: nn.Module, minibatch: Minibatch) -> poutine.Trace:
    """Posterior means of latent variables that all cells share, such as embeddings of features."""
    shared = poutine.Trace()
    with torch.no_grad(), AtMean():
        for name, site in trace(guide, minibatch).nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and rows(site, minibatch) is None:
                shared.add_node(name, **site)
    return shared


def draw_prior(model: nn.Module, minibatch: Minibatch, shared: poutine.Trace) -> poutine.Trace:
    """Draw latent variables of cells from their prior, and measurements given these."""
    with torch.no_grad():
        return trace(poutine.replay(poutine.uncondition(model), trace=shared), minibatch)


def drawn_minibatch(model: Any, minibatch: Minibatch, drawn: poutine.Trace) -> Minibatch:
    """The minibatch with drawn measurements in place of its measurements; a latent size is counted again."""
    views = {}
    for name, view in minibatch.decoded.items():
        counts = drawn.nodes[name]["value"]
        latent = isinstance(getattr(part_of(model, name), "size", None), LatentSize)
        library = counts.sum(-1, keepdim=True).clamp_min(1.0) if latent else view.library
        views[name] = replace(view, counts=counts, library=library)
    return Minibatch(minibatch.index, minibatch.n_cells, views, views, minibatch.groups)


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
