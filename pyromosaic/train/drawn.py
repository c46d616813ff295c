"""Cells drawn from a program: latent variables from the prior, and measurements given these."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyromosaic.data import Minibatch
from pyromosaic.measurement import part_of
from pyromosaic.penalties import Penalty
from pyromosaic.program import AtMean
from pyromosaic.sizes import LatentSize


@contextmanager
def without_penalties(guide: nn.Module) -> Iterator[None]:
    """A guide that only infers: its penalties, which are not part of the posterior, have weight 0."""
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
    """Sites that belong to cells, each with the positions of its cells."""
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
    """Latent variables of cells from their prior, and measurements given these."""
    with torch.no_grad():
        return trace(poutine.replay(poutine.uncondition(model), trace=shared), minibatch)


def drawn_minibatch(model: Any, minibatch: Minibatch, drawn: poutine.Trace) -> Minibatch:
    """The minibatch with drawn measurements instead of its own; a latent size is counted again."""
    views = {}
    for name, view in minibatch.decoded.items():
        counts = drawn.nodes[name]["value"]
        traits = getattr(getattr(part_of(model, name), "likelihood", None), "traits", None)
        if traits is not None and traits.kind == "nonnegative":
            counts = counts.clamp_min(0)  # as measurements are, where a likelihood has some mass below
        if view.measured is not None:
            counts = torch.where(view.measured, counts, 0.0)
        latent = isinstance(getattr(part_of(model, name), "size", None), LatentSize)
        library = counts.sum(-1, keepdim=True).clamp_min(1.0) if latent else view.library
        if latent and view.share is not None:
            library = library / view.share
        views[name] = replace(view, counts=counts, library=library)
    return Minibatch(minibatch.index, minibatch.n_cells, views, views, minibatch.groups)
