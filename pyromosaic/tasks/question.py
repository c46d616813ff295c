"""A question to a trained program: one object from the user's call to the trace that answers it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyromosaic.accepted import Count, Positive, Seed, checked
from pyromosaic.data import Minibatch, ModalitySchema, Mosaic, Schema, Traits, to_predict
from pyromosaic.data.tables import find
from pyromosaic.progress import tell

#: Cells by names, numbers or a mask; None for all.
Cells = Sequence[str] | np.ndarray | pd.Index | pd.Series | None


def columns_of(name: str, schema: ModalitySchema, features: Cells) -> np.ndarray:
    """Numbers of a modality's features, from names or a mask; None for all.

    Raises
    ------
    ValueError
        If the modality has no such feature.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> schema = Mosaic.from_mudata(simulate(40, {"rna": 50})[0]).schema["rna"]
    >>> columns_of("rna", schema, ["rna_3", "rna_1"])
    array([3, 1])
    """
    if features is None:
        return np.arange(schema.n_features)
    return find(pd.Index(schema.features), features, "feature", f"modality {name!r}", numbers=False)


def check_size(name: str, schema: ModalitySchema, library: float | None) -> None:
    """Refuse a library size that would have no effect."""
    if library is not None and not schema.spec.traits.sized:
        raise ValueError(f"library has no effect on modality {name!r}, whose likelihood has no sizes; leave it out")


def unit_size(schema: ModalitySchema) -> float:
    """Size at which expected measurements are the denoised values: 1 for proportions of RNA, else the median."""
    return 1.0 if schema.spec.traits.shares else schema.library


def first_of(schema: Schema, what: str, fits: Callable[[Traits], bool]) -> str:
    """The first modality whose likelihood describes such measurements."""
    for name, modality in schema.modalities.items():
        if fits(modality.spec.traits):
            return name
    raise ValueError(f"the model has no modality for this question: none has a likelihood {what}")


def portions(index: np.ndarray, size: int = 1024) -> Iterator[np.ndarray]:
    """Numbers of cells, in blocks of at most this size; `pyromosaic.progress.watched` is told of those done.

    Examples
    --------
    >>> [part.tolist() for part in portions(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(index), size):
        part = index[start : start + size]
        yield part
        tell(len(part))


@checked
@dataclass(frozen=True)
class Question:
    """A quantity of a modality, the cells to predict it in, and the conditions.

    Parameters
    ----------
    modality
        The modality.
    value
        Function of the modality's distribution that returns the quantity; None for measurements drawn from it.
    cells, features
        Names (cells also by number or mask); None for all.
    encode
        Modalities to infer from; None for all modalities of a cell.
    batch
        Batch to predict for; None for the batch of each cell.
    library
        Library size to predict at; None for the size of each cell, or the size that the model expects.
    n_samples
        Number of posterior draws; None for one evaluation at the mean of the posterior.
    weights
        Seed of draws of the decoder's weights, one for each posterior draw and the same for all cells; None for the
        trained weights.
    data
        Cells other than the training data.
    seed
        Seed of the draws.

    Examples
    --------
    >>> Question("rna", lambda d: d.mean, n_samples=25).modality
    'rna'
    >>> Question("rna", n_samples=0)
    Traceback (most recent call last):
        ...
    ValueError: n_samples must be a whole number from 1 to 1e9 or None; found 0
    """

    modality: str
    value: Callable[[TorchDistribution], Tensor] | None = None
    cells: Cells = None
    features: Cells = None
    encode: str | Sequence[str] | None = None
    batch: object = None
    library: Positive | None = None
    n_samples: Count | None = None
    weights: Seed | None = None
    data: Mosaic | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        if isinstance(self.encode, str):
            object.__setattr__(self, "encode", (self.encode,))
        if self.encode is not None and len(self.encode) == 0:
            raise ValueError("there is no modality to infer from; pass at least one, or None for all of a cell's")

    def check(self, mosaic: Mosaic, index: np.ndarray) -> None:
        """Refuse the modalities to infer from if a cell has none of them."""
        if self.encode is not None:
            for name in self.encode:
                mosaic.schema[name]
            present = np.any([mosaic.modalities[name].present[index] for name in self.encode], axis=0)
            if not present.all():
                cell = mosaic.obs_names[index[~present][0]]
                raise ValueError(f"cell {cell!r} has none of the modalities to infer from: {', '.join(self.encode)}")

    def minibatch(self, mosaic: Mosaic, index: np.ndarray) -> Minibatch:
        """Minibatch of some of the cells, with the modality to predict."""
        return to_predict(mosaic, index, (self.modality,), self.encode, self.batch, self.library)
