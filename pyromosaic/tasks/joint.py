"""Joint posterior draws: latent variables and several modalities of each cell in one draw."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from pyromosaic.data import Mosaic, to_predict
from pyromosaic.laplace import draw_weights, weights_set
from pyromosaic.measurement import encoded_once, part_of
from pyromosaic.tasks.inference import inference_mode
from pyromosaic.tasks.prediction import ENTRIES, run
from pyromosaic.tasks.question import portions, unit_size

#: What is drawn of a modality: denoised values, expected measurements, or measurements.
Kind = Literal["denoised", "expected", "predicted"]


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


def joint_draws(
    model: nn.Module,
    guide: nn.Module,
    mosaic: Mosaic,
    index: np.ndarray,
    modalities: Sequence[str],
    kinds: Sequence[Kind],
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
        Which values of them; ``"denoised"`` stands alone, because it sets the sizes of cells.
    n_samples
        Number of independent draws. Each includes a draw of the decoders' weights, the same for all cells.
    device
        Device of the program.
    encode, batch, seed
        As in `pyromosaic.tasks.Question`.

    Yields
    ------
    dict
        By ``("latent", site)`` and ``(kind, modality)``, each of shape (draws, cells, width).
    """
    width = sum(mosaic.schema[name].n_features for name in modalities) * len(kinds) + 1
    n_cells = min(1024, max(1, ENTRIES // (width * n_samples)))
    parts = {name: part for name in modalities if (part := part_of(model, name)) is not None}
    with inference_mode(model, guide, seed=seed):
        weights = {
            name: [draw_weights(part.decoder, (seed << 20) + i) for i in range(n_samples)]
            for name, part in parts.items()
        }
        for some in portions(index, n_cells):
            minibatch = to_predict(mosaic, some, tuple(modalities), encode, batch).to(device)
            if "denoised" in kinds:
                for name, view in minibatch.decoded.items():
                    size = torch.full_like(view.library, unit_size(mosaic.schema[name]))
                    minibatch.decoded[name] = replace(view, library=size)
            drawn: dict[tuple[str, str], list[Tensor]] = {}
            with encoded_once(guide):
                for i in range(n_samples):
                    with weights_set(*((part.decoder, weights[name][i]) for name, part in parts.items())):
                        trace = run(model, guide, minibatch, latent_at_mean=False, drawn="predicted" in kinds)
                    for name, site in latent_sites(trace, len(some)).items():
                        if name not in modalities:
                            drawn.setdefault(("latent", name), []).append(of_cells(site, site["value"]))
                    for name in modalities:
                        site = trace.nodes[name]
                        for kind in kinds:
                            if kind == "denoised":
                                value = parts[name].likelihood.normalized(site["fn"])
                            else:
                                value = site["value"] if kind == "predicted" else site["fn"].mean
                            drawn.setdefault((kind, name), []).append(value)
            yield {key: torch.stack(values) for key, values in drawn.items()}
