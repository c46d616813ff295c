"""Draws of a quantity in blocks of cells and features, so that results of any size need little memory."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from pyromosaic.data import Minibatch, Mosaic, View
from pyromosaic.laplace import Weights, weights_set
from pyromosaic.likelihoods import Likelihood
from pyromosaic.measurement import encoded_once, held_back, part_of
from pyromosaic.nn import Decoder
from pyromosaic.tasks.inference import inference_mode
from pyromosaic.tasks.prediction import Block, answers, drawn_weights, run
from pyromosaic.tasks.question import Question, columns_of, portions

CELLS, ENTRIES = 1024, 2**19  # cells of a block, and its entries in one draw, which stay in a processor's cache


def blocks(
    model: nn.Module, guide: nn.Module, mosaic: Mosaic, question: Question, device: torch.device
) -> Iterator[Block]:
    """Independent posterior draws of a quantity for all cells in question, block by block; see `answers`.

    If features do not depend on each other given the latent variables (`Likelihood.pointwise`), and the decoder is a
    `pyromosaic.nn.Decoder`, the program runs once per draw up to the last hidden layer. Features are decoded from
    there, only those in question. The next block may overwrite the values. After two seconds a progress bar appears.

    Parameters
    ----------
    model, guide, mosaic, question, device
        As in `pyromosaic.tasks.answers`.
    """
    n = len(mosaic.find(question.cells))
    part = part_of(model, question.modality)
    found = _by_features if question.value is not None and _pointwise(part) else _by_cells
    with tqdm(total=n, unit="cells", desc=question.modality, delay=2, leave=False, disable=None) as bar:
        for block in found(model, guide, mosaic, question, device):
            yield block
            bar.update(block.cells.stop - bar.n)


def _pointwise(part: Any) -> bool:
    return (
        part is not None
        and type(part.decoder) is Decoder
        and part.likelihood.pointwise
        and type(part.likelihood).forward is Likelihood.forward
    )


def _by_cells(*given: Any) -> Iterator[Block]:
    """All features of some cells at a time."""
    start = 0
    for values in answers(*given):
        stop = start + values.shape[1]
        yield Block(slice(start, stop), slice(0, values.shape[2]), values)
        start = stop


def _by_features(
    model: nn.Module, guide: nn.Module, mosaic: Mosaic, question: Question, device: torch.device
) -> Iterator[Block]:
    """Some features of some cells at a time."""
    index, name, part = mosaic.find(question.cells), question.modality, part_of(model, question.modality)
    question.check(mosaic, index)
    columns = torch.from_numpy(columns_of(name, mosaic.schema[name], question.features)).to(device)
    value = question.value
    assert value is not None
    with inference_mode(model, guide, seed=question.seed):
        drawn = drawn_weights(model, question)
        weights: Sequence[Weights | None] = drawn or [None] * (question.n_samples or 1)
        room = None  # for the draws of a block; new memory for each would take longer than the draws
        for start, some in zip(range(0, len(index), CELLS), portions(index, CELLS), strict=True):
            minibatch = question.minibatch(mosaic, some).to(device)
            held = _held(model, guide, minibatch, question, weights)
            width = max(1, min(ENTRIES // len(some), len(columns)))
            room = torch.empty(len(weights) * len(some) * width, device=device) if room is None else room
            for first in range(0, len(columns), width):
                block = slice(first, min(first + width, len(columns)))
                chosen = block if question.features is None else columns[block]  # a slice makes no copy
                likelihood = part.likelihood.narrowed(chosen)
                shape = (len(weights), len(some), block.stop - first)
                values = room[: np.prod(shape)].view(shape)
                for i, ((x, slope, view), deviations) in enumerate(zip(held, weights, strict=True)):
                    predictors = part.decoder.outputs(x, slope, deviations, chosen)
                    view = view if view.exposure is None else replace(view, exposure=view.exposure[:, chosen])
                    values[i] = value(likelihood.distribution(predictors, view))
                yield Block(slice(start, start + len(some)), block, values)


def _held(
    model: nn.Module, guide: nn.Module, minibatch: Minibatch, question: Question, weights: Sequence[Weights | None]
) -> list[tuple[Tensor, Tensor | None, View]]:
    """For each draw, what features are decoded from; see `pyromosaic.measurement.held_back`."""
    part = part_of(model, question.modality)
    with encoded_once(guide), held_back(part) as held:
        for drawn in weights:
            with nullcontext() if drawn is None else weights_set((part.decoder, drawn)):
                run(model, guide, minibatch, latent_at_mean=question.n_samples is None)
    if len(held) != len(weights):
        raise ValueError(
            f"the model has no site {question.modality!r}: it does not explain that modality; it needs a site with "
            "the modality's name if the modality is in minibatch.decoded"
        )
    return held
