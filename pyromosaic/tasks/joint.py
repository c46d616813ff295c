"""Joint posterior draws: latent variables and several modalities of each cell in one draw."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyromosaic.data import Minibatch, Mosaic, measured, to_predict
from pyromosaic.laplace import draw_weights, weights_set
from pyromosaic.measurement import encoded_once, part_of
from pyromosaic.tasks.inference import inference_mode
from pyromosaic.tasks.prediction import ENTRIES, run
from pyromosaic.tasks.question import portions, unit_size
from pyromosaic.train.drawn import rows

#: What is drawn of a modality: denoised values, expected measurements, or measurements.
Kind = Literal["denoised", "expected", "predicted"]
#: The log-likelihood of what was measured, beside these.
LOG_LIKELIHOOD: Literal["log_likelihood"] = "log_likelihood"


def latent_sites(trace: poutine.Trace, n_cells: int) -> dict[str, Any]:
    """Sites of the latent vectors of cells, such as ``z``, by name.

    Parameters
    ----------
    trace
        A run of a guide.
    n_cells
        Number of cells in its minibatch.
    """
    found = {}
    for name in trace.stochastic_nodes:
        site = trace.nodes[name]
        rows = [frame.size for frame in site["cond_indep_stack"] if frame.dim == -2]
        sampled = isinstance(site["value"], Tensor) and site["value"].shape[:1] == (n_cells,)
        if rows and sampled and len(site["fn"].event_shape):
            found[name] = site
    return found


def of_cells(site: Any, value: Tensor) -> Tensor:
    """A value of a site for each cell, shape (cells, width); 0 in cells that do not have the variable."""
    mask = site["mask"]
    if isinstance(mask, Tensor):
        value = value * mask.unsqueeze(-1).expand(value.shape)
    return value.reshape(value.shape[0], value.shape[-1])


def shared_sites(trace: poutine.Trace, minibatch: Minibatch) -> poutine.Trace:
    """The latent variables that all cells share, such as embeddings of features, of a run of a model.

    Parameters
    ----------
    trace
        The run.
    minibatch
        Its cells.
    """
    shared = poutine.Trace()
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and rows(site, minibatch) is None:
            shared.add_node(name, **site)
    return shared


def log_likelihood(fn: Any, mosaic: Mosaic, name: str, some: np.ndarray) -> Tensor:
    """Log-probability of the measurements of cells under a modality's distribution; NaN where there are none.

    Parameters
    ----------
    fn
        The distribution of the modality in these cells, one row for each.
    mosaic, name, some
        The data, the modality, and numbers of the cells.

    Returns
    -------
    Tensor
        Shape (cells, features), or (cells,) if the features of a cell have one joint distribution.
    """
    values = fn.mean.new_zeros(fn.mean.shape)
    view = measured(mosaic, some).observed.get(name)
    has = torch.zeros(len(some), dtype=torch.bool)
    if view is not None:
        has[view.rows] = True
        values[has.to(values.device)] = view.dense_counts().to(values)
    found: Tensor = fn.log_prob(values)
    found[~has.to(found.device)] = torch.nan
    return found


def joint_draws(
    model: nn.Module,
    guide: nn.Module,
    mosaic: Mosaic,
    index: np.ndarray,
    modalities: Sequence[str],
    kinds: Sequence[Kind | Literal["log_likelihood"]],
    n_samples: int,
    device: torch.device,
    encode: Sequence[str] | None = None,
    batch: object = None,
    seed: int = 0,
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Draws of latent variables and of modalities, some cells at a time.

    Parameters
    ----------
    model, guide
        The Pyro program.
    mosaic, index
        The data, and numbers of the cells.
    modalities
        Modalities to decode; all values of a draw come from one run of the program.
    kinds
        Which values of them, or ``"log_likelihood"``; ``"denoised"`` stands alone, because it sets the sizes of cells.
    n_samples
        Number of independent draws. Each includes a draw of the decoders' weights, and of the latent variables that
        all cells share, the same for all cells.
    device
        Device of the program.
    encode, batch, seed
        As in `pyromosaic.tasks.Question`.

    Yields
    ------
    dict
        By ``("latent", site)`` and ``(kind, modality)``, each of shape (draws, cells, width); the first also by
        ``("shared", site)``, the variables that all cells share, draws × their shape.
    """
    width = sum(mosaic.schema[name].n_features for name in modalities) * len(kinds) + 1
    n_cells = min(1024, max(1, ENTRIES // (width * n_samples)))
    parts = {name: part for name in modalities if (part := part_of(model, name)) is not None}
    with inference_mode(model, guide, seed=seed):
        weights = {
            name: [draw_weights(part.decoder, (seed << 20) + i) for i in range(n_samples)]
            for name, part in parts.items()
        }
        shared: list[poutine.Trace] = []
        for some in portions(index, n_cells):
            minibatch = to_predict(mosaic, some, tuple(modalities), encode, batch).to(device)
            if "denoised" in kinds:
                for name, view in minibatch.decoded.items():
                    size = torch.full_like(view.library, unit_size(mosaic.schema[name]))
                    minibatch.decoded[name] = replace(view, library=size)
            drawn: dict[tuple[str, str], list[Tensor]] = {}
            first = not shared
            with encoded_once(guide):
                for i in range(n_samples):
                    inference = guide if first else poutine.replay(guide, trace=shared[i])
                    with weights_set(*((part.decoder, weights[name][i]) for name, part in parts.items())):
                        trace = run(model, inference, minibatch, latent_at_mean=False, drawn="predicted" in kinds)
                    if first:
                        shared.append(shared_sites(trace, minibatch))
                        for name, site in shared[i].nodes.items():
                            drawn.setdefault(("shared", name), []).append(site["value"])
                    for name, site in latent_sites(trace, len(some)).items():
                        if name not in modalities:
                            drawn.setdefault(("latent", name), []).append(of_cells(site, site["value"]))
                    for name in modalities:
                        site = trace.nodes[name]
                        for kind in kinds:
                            if kind == "denoised":
                                value = parts[name].likelihood.normalized(site["fn"])
                            elif kind == LOG_LIKELIHOOD:
                                value = log_likelihood(site["fn"], mosaic, name, some)
                            else:
                                value = site["value"] if kind == "predicted" else site["fn"].mean
                            drawn.setdefault((kind, name), []).append(value)
            yield {key: torch.stack(values) for key, values in drawn.items()}
