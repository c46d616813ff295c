"""Predictions of a trained program for a modality in any cell, measured or not."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor, nn

from pyromosaic.data import Minibatch
from pyromosaic.laplace import weights_drawn
from pyromosaic.measurement import encoded_once, part_of
from pyromosaic.program import AtMean
from pyromosaic.tasks.question import Question


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
    >>> bool((found.quantiles[0.05] <= found.quantiles[0.95]).all(axis=None))
    True
    """

    mean: pd.DataFrame
    sd: pd.DataFrame
    quantiles: dict[float, pd.DataFrame] = field(default_factory=dict)


def run(
    model: nn.Module, guide: nn.Module, minibatch: Minibatch, latent_at_mean: bool, drawn: bool = False
) -> poutine.Trace:
    """Trace of the model on latent values from the guide; the predicted modality is at its mean, or `drawn`."""
    with AtMean() if latent_at_mean else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(minibatch)
    predicted = {*minibatch.decoded, *(f"{name}_size" for name in minibatch.decoded)}
    with nullcontext() if drawn else AtMean(predicted.__contains__):
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(minibatch)


def draws(model: nn.Module, guide: nn.Module, minibatch: Minibatch, question: Question, columns: Tensor) -> Tensor:
    """Independent posterior draws of a quantity for the cells of one minibatch.

    Parameters
    ----------
    model, guide
        The Pyro program.
    minibatch
        The cells; the modality is among those to be decoded.
    question
        The question. Draws of the decoder's weights are the same for all cells.
    columns
        Numbers of the requested features.

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
    values, value, part = [], question.value, part_of(model, question.modality)
    at_mean = question.n_samples is None
    with encoded_once(guide):
        for i in range(question.n_samples or 1):
            weights: AbstractContextManager[None] = nullcontext()
            if question.weights and not at_mean and part is not None:
                weights = weights_drawn(part.decoder, (question.seed << 20) + i)
            with weights:
                trace = run(model, guide, minibatch, latent_at_mean=at_mean, drawn=value is None)
            if question.modality not in trace.nodes:
                raise ValueError(
                    f"the model has no site {question.modality!r}: it does not explain that modality; it needs a "
                    "site with the modality's name if the modality is in minibatch.decoded"
                )
            site = trace.nodes[question.modality]
            values.append((site["value"] if value is None else value(site["fn"])).index_select(-1, columns))
    return torch.stack(values)


def estimate(
    chunks: Iterable[Tensor], cells: pd.Index, features: pd.Index, quantiles: Sequence[float] = ()
) -> Estimate:
    """Mean, standard deviation and quantiles over draws, one chunk of cells at a time.

    Parameters
    ----------
    chunks
        Draws for consecutive groups of cells, each of shape (draws, cells, features).
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
    >>> estimate([draws_of_both], cells, features, quantiles=[0.5]).mean
       CD4  CD8
    a  2.0  2.0
    b  4.0  4.0
    """
    levels = list(quantiles)
    if any(not 0 <= q <= 1 for q in levels):
        raise ValueError(f"quantiles must be between 0 and 1; found {levels}")

    def summaries() -> Iterator[np.ndarray]:
        for values in chunks:
            sd = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
            parts = [values.mean(0), sd, *(torch.quantile(values, q, dim=0) for q in levels)]
            yield torch.stack(parts).cpu().numpy()

    whole = np.concatenate(list(summaries()), axis=1)
    frames = [pd.DataFrame(part, index=cells, columns=features) for part in whole]
    return Estimate(frames[0], frames[1], dict(zip(levels, frames[2:], strict=True)))
