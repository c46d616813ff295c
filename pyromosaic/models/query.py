"""Query mapping: add new batches to a trained model (after scArches, Lotfollahi et al. 2022)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyromosaic.data import Schema
from pyromosaic.program import Slots


def carry_over(old: nn.Module, new: nn.Module, before: Schema, after: Schema) -> dict[str, Tensor]:
    """Copy weights to a program from one with fewer batches.

    Entries for a new batch start at the mean of the entries for the old ones, and follow them: along a dimension of
    batches they are at the end; along the inputs of a layer they are before the other covariates, which come last.

    Parameters
    ----------
    old, new
        Models or guides; `new` has more batches than `old`.
    before, after
        Their schemas.

    Returns
    -------
    dict
        A mask of the entries for new batches, for each parameter and buffer that has such entries.
    """
    masks, state = {}, new.state_dict()
    modalities = {key: name for name, key in Slots.names(before.modalities).items()}
    for name, value in old.state_dict().items():
        modality = next((modalities[part] for part in name.split(".") if part in modalities), None)
        if value.shape == state[name].shape:
            state[name].copy_(value)
        elif modality is not None:
            schema, key = before[modality], str(before[modality].spec.batch_key)
            n_old, n_new = len(schema.categories[key]), len(after[modality].categories[key])
            fresh = torch.zeros_like(state[name], dtype=torch.bool)
            for dim in (d for d in range(value.ndim) if value.shape[d] != state[name].shape[d]):
                sums = name.endswith(".products")  # sums over cells for the posterior of a layer; 0 for a new batch
                n = value.shape[dim] - sums  # whose last entry is the bias
                stop = n_old if n == n_old else n - schema.n_covariates + n_old
                known = value.narrow(dim, stop - n_old, n_old).mean(dim, keepdim=True) * (not sums)
                shape = [n_new - n_old if d == dim else -1 for d in range(value.ndim)]
                ahead, behind = value.tensor_split([stop], dim)
                value = torch.cat([ahead, known.expand(shape), behind], dim)
                fresh.narrow(dim, stop, n_new - n_old).fill_(True)
            state[name].copy_(value)
            masks[name] = fresh
    return masks


@contextmanager
def only(program: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which training changes only the masked entries of a program's parameters (and adversaries)."""
    adversaries = {p for m in program.modules() if hasattr(m, "optimiser") for p in m.parameters()}
    free = {name: p for name, p in program.named_parameters() if p.requires_grad and p not in adversaries}
    kept = program.state_dict()  # without what a penalty remembers of earlier minibatches
    buffers = {name: b.clone() for name, b in program.named_buffers() if name in kept}
    hooks = []
    for name, parameter in free.items():
        if name in masks:
            hooks.append(parameter.register_hook(lambda gradient, mask=masks[name]: gradient * mask.to(gradient)))
        else:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in free.values():
            parameter.requires_grad_(True)
        with torch.no_grad():
            for name, buffer in program.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
