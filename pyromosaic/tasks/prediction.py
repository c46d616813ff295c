"""Predictions of a trained program for a modality in any cell, measured or not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from pyromosaic.data import Minibatch, Mosaic
from pyromosaic.laplace import Weights, draw_weights, weights_set
from pyromosaic.measurement import encoded_once, part_of
from pyromosaic.program import AtMean
from pyromosaic.shown import as_html
from pyromosaic.tasks.inference import inference_mode
from pyromosaic.tasks.question import Question, columns_of, portions

ENTRIES = 60_000_000  # draws × cells × features in memory at once
BLOCK = 8192  # columns of draws whose summaries a processor's cache holds


class Block(NamedTuple):
    """Draws for consecutive cells and features.

    Parameters
    ----------
    cells, features
        Positions among the cells and features in question.
    values
        Shape (draws, cells, features).
    """

    cells: slice
    features: slice
    values: Tensor


@dataclass(frozen=True)
class Estimate:
    """A quantity for every cell and feature, summarised over draws from the posterior.

    Parameters
    ----------
    mean, sd
        Mean and standard deviation over the draws, cells × features.
    quantiles
        Quantiles over the draws, by level; each cells × features.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0])
    >>> found = MultiVI(mosaic).get_imputed_values("adt", n_samples=4, quantiles=(0.05, 0.95))
    >>> found.mean.shape, list(found.quantiles)
    ((60, 5), [0.05, 0.95])
    >>> found
    Estimate of 60 cells × 5 features: mean, sd, quantiles 0.05, 0.95
    >>> bool((found.quantiles[0.05] <= found.quantiles[0.95]).all(axis=None))
    True
    """

    mean: pd.DataFrame
    sd: pd.DataFrame
    quantiles: dict[float, pd.DataFrame] = field(default_factory=dict)

    def __repr__(self) -> str:
        levels = f", quantiles {', '.join(map(str, self.quantiles))}" if self.quantiles else ""
        return f"Estimate of {self.mean.shape[0]} cells × {self.mean.shape[1]} features: mean, sd{levels}"

    def _repr_html_(self) -> str:
        """The first cells and features, as mean ± standard deviation."""
        mean, sd = self.mean.iloc[:5, :5], self.sd.iloc[:5, :5]
        values = zip(mean.index, mean.to_numpy(), sd.to_numpy(), strict=True)
        rows = [[cell, *(f"{m:.3g} ± {s:.2g}" for m, s in zip(*row, strict=True))] for cell, *row in values]
        more = " (the first of each below)" if self.mean.size > mean.size else ""
        return as_html(f"{self}{more}", ["cell", *mean.columns], rows)


def run(
    model: nn.Module, guide: nn.Module, minibatch: Minibatch, latent_at_mean: bool, drawn: bool = False
) -> poutine.Trace:
    """Trace of the model on latent values from the guide; the predicted modality is at its mean, or `drawn`."""
    with AtMean() if latent_at_mean else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(minibatch)
    predicted = {*minibatch.decoded, *(f"{name}_size" for name in minibatch.decoded)}
    with nullcontext() if drawn else AtMean(predicted.__contains__):
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(minibatch)


def drawn_weights(model: nn.Module, question: Question) -> list[Weights] | None:
    """A draw of the decoder's weights for each draw of the answer, the same for all cells; None for trained weights."""
    part = part_of(model, question.modality)
    if question.weights is None or question.n_samples is None or part is None:
        return None
    return [draw_weights(part.decoder, (question.weights << 20) + i) for i in range(question.n_samples)]


def draws(
    model: nn.Module,
    guide: nn.Module,
    minibatch: Minibatch,
    question: Question,
    columns: Tensor | None = None,
    weights: Sequence[Weights] | None = None,
) -> Tensor:
    """Independent posterior draws of a quantity for the cells of one minibatch.

    Parameters
    ----------
    model, guide
        The Pyro program.
    minibatch
        The cells; the modality is among those to be decoded.
    question
        The question.
    columns
        Numbers of the requested features; None for all.
    weights
        From `drawn_weights`.

    Returns
    -------
    Tensor
        Shape (draws, cells, features).

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> from pyromosaic.tasks import inference_mode
    >>> mosaic, question = Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0]), Question("adt", n_samples=2)
    >>> model, minibatch = MultiVI(mosaic), question.minibatch(mosaic, np.arange(10))
    >>> with inference_mode(model.model, model.guide):
    ...     counts = draws(model.model, model.guide, minibatch, question, torch.arange(3))
    >>> counts.shape
    torch.Size([2, 10, 3])
    """
    value, part = question.value, part_of(model, question.modality)
    at_mean, n_samples = question.n_samples is None, question.n_samples or 1
    with encoded_once(guide):
        for i in range(n_samples):
            with nullcontext() if weights is None or part is None else weights_set((part.decoder, weights[i])):
                trace = run(model, guide, minibatch, latent_at_mean=at_mean, drawn=value is None)
            if question.modality not in trace.nodes:
                raise ValueError(
                    f"the model has no site {question.modality!r}: it does not explain that modality; it needs a "
                    "site with the modality's name if the modality is in minibatch.decoded"
                )
            site = trace.nodes[question.modality]
            answer = site["value"] if value is None else value(site["fn"])
            answer = answer if columns is None else answer.index_select(-1, columns)
            if i == 0:
                values = answer.new_empty(n_samples, *answer.shape)
            values[i] = answer
    return values


def answers(
    model: nn.Module, guide: nn.Module, mosaic: Mosaic, question: Question, device: torch.device
) -> Iterator[Tensor]:
    """Draws of a quantity for all cells in question, some cells at a time, each of shape (draws, cells, features).

    Parameters
    ----------
    model, guide
        The Pyro program.
    mosaic
        The cells, and others.
    question
        The question. A draw of the decoder's weights serves all cells.
    device
        Device of the program.
    """
    index, name, schema = mosaic.find(question.cells), question.modality, mosaic.schema[question.modality]
    columns = None
    if question.features is not None:
        columns = torch.from_numpy(columns_of(name, schema, question.features)).to(device)
    question.check(mosaic, index)
    size = max(1, ENTRIES // (schema.n_features * (question.n_samples or 1)))
    with inference_mode(model, guide, seed=question.seed):
        weights = drawn_weights(model, question)
        for part in portions(index, min(size, 1024)):
            minibatch = question.minibatch(mosaic, part).to(device)
            yield draws(model, guide, minibatch, question, columns, weights)


def estimate(blocks: Iterable[Block], cells: pd.Index, features: pd.Index, quantiles: Sequence[float] = ()) -> Estimate:
    """Mean, standard deviation and quantiles over draws, one block of cells and features at a time.

    Parameters
    ----------
    blocks
        Draws that together cover all cells and features.
    cells, features
        Names of the cells and features.
    quantiles
        Levels between 0 and 1.

    Returns
    -------
    Estimate
        Tables of cells × features; the standard deviation is 0 for a single draw.

    Raises
    ------
    ValueError
        If a level is not between 0 and 1.

    Examples
    --------
    >>> cells, features = pd.Index(["a", "b"]), pd.Index(["CD4", "CD8"])
    >>> draws_of_both = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[3.0, 2.0], [5.0, 4.0]]])  # draws × cells × features
    >>> estimate([Block(slice(0, 2), slice(0, 2), draws_of_both)], cells, features, quantiles=[0.5]).mean
       CD4  CD8
    a  2.0  2.0
    b  4.0  4.0
    """
    levels = check_levels(quantiles)
    arrays = [np.empty((len(cells), len(features)), dtype=np.float32) for _ in range(2 + len(levels))]
    fill(arrays, blocks, levels)
    frames = [pd.DataFrame(array, index=cells, columns=features) for array in arrays]
    return Estimate(frames[0], frames[1], dict(zip(levels, frames[2:], strict=True)))


def check_levels(quantiles: Sequence[float]) -> list[float]:
    """Levels of quantiles, refused if one is not between 0 and 1.

    Examples
    --------
    >>> check_levels([0.05, 0.95])
    [0.05, 0.95]
    """
    if any(not 0 <= q <= 1 for q in quantiles):
        raise ValueError(f"quantiles must be between 0 and 1; found {list(quantiles)}")
    return list(quantiles)


def fill(arrays: Sequence[Any], blocks: Iterable[Block], levels: Sequence[float]) -> None:
    """Write mean, standard deviation and quantiles over draws to arrays in memory or in a file, cells × features."""
    for block in blocks:
        for array, values in zip(arrays, _summary(block.values.cpu().numpy(), levels), strict=True):
            array[block.cells, block.features] = values


def _summary(values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Mean, standard deviation and quantiles over the first axis; faster than numpy's quantiles."""
    n, flat = len(values), values.reshape(len(values), -1)
    summaries = np.zeros((2 + len(levels), flat.shape[1]), dtype=values.dtype)
    for start in range(0, flat.shape[1], BLOCK):
        block, found = flat[:, start : start + BLOCK], summaries[:, start : start + BLOCK]
        total, squares = np.zeros((2, *block.shape[1:]), dtype=block.dtype)
        for draw in block[1:]:
            apart = draw - block[0]  # so that equal draws have no deviation
            total += apart
            squares += np.square(apart, out=apart)
        np.add(block[0], total / n, out=found[0])
        if n > 1:
            np.sqrt((squares - total * total / n).clip(0) / (n - 1), out=found[1])
        places = [divmod(level * (n - 1), 1) for level in levels]
        ordered = _ordered(block, {i for below, _ in places for i in (int(below), min(int(below) + 1, n - 1))})
        for (below, weight), quantile in zip(places, found[2:], strict=True):
            low, high = ordered[int(below)], ordered[min(int(below) + 1, n - 1)]
            quantile[:] = low + values.dtype.type(weight) * (high - low)
    return summaries.reshape(-1, *values.shape[1:])


def _ordered(block: np.ndarray, ranks: set[int]) -> Mapping[int, np.ndarray]:
    """The values of some ranks over the first axis; by insertion if all are among the first and last few."""
    n = len(block)
    n_low = max((rank + 1 for rank in ranks if rank < n / 2), default=0)
    n_high = max((n - rank for rank in ranks if rank >= n / 2), default=0)
    if n_low + n_high > n / 4:
        return dict(enumerate(np.sort(block, axis=0))) if ranks else {}
    low, high = _first(block, n_low, np.minimum, np.maximum), _first(block, n_high, np.maximum, np.minimum)
    return dict(enumerate(low)) | {n - 1 - i: values for i, values in enumerate(high)}


def _first(block: np.ndarray, k: int, sooner: np.ufunc, later: np.ufunc) -> np.ndarray:
    """The first k values over the first axis, in order."""
    found = np.full((k, *block.shape[1:]), np.inf if sooner is np.minimum else -np.inf, dtype=block.dtype)
    rest, spare = np.empty((2, *block.shape[1:]), dtype=block.dtype)
    for values in block if k else ():
        for kept in found[:-1]:
            later(kept, values, out=spare)
            sooner(kept, values, out=kept)
            values, rest, spare = spare, spare, rest
        sooner(found[-1], values, out=found[-1])
    return found
