"""Minibatches of a mosaic: for each modality, only the cells that have it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyromosaic.data.mosaic import Modality, Mosaic
from pyromosaic.data.panels import BatchPanels
from pyromosaic.data.spec import ModalitySchema
from pyromosaic.data.tables import word


@dataclass
class View:
    """One modality in a minibatch, for the b cells in which it is observed or decoded.

    Parameters
    ----------
    rows
        Positions of these cells in the minibatch, shape (b,).
    codes
        Category numbers, batch first, shape (b, number of categorical columns); -1 for a category in which the
        modality was never measured.
    n_categories
        Number of categories of each categorical column.
    continuous
        Standardised continuous covariates, shape (b, number of columns).
    library
        Size of each cell in counts, shape (b, 1); NaN where the model predicts it.
    counts
        Measurements, shape (b, features), strided or sparse COO; None if the model predicts them.
    labels
        Label numbers, shape (b,); -1 where unknown.
    exposure
        Exposure of each measurement (e.g. its coverage), shape (b, features); the median where nothing was measured.
        None if the modality has no exposure layer.
    measured
        Which features were measured in which cell, shape (b, features); the others have 0 in `counts`. None if all were
        measured in all. In a prediction, those whose counts make up the size of the cell.
    share
        Expected share of the measured features in the counts of a cell, shape (b, 1); None if `measured` is.
    batches
        In a prediction, which features were measured in which batch; None if all were measured in all.
    average
        Batches whose average replaces the batch of every cell, as weights of shape (batches,); usually None.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50})[0], batch_key="batch")
    >>> view = measured(mosaic, np.arange(4)).observed["rna"]
    >>> view.dense_counts().shape, view.library.shape
    (torch.Size([4, 50]), torch.Size([4, 1]))
    >>> view.design().sum(1)  # indicators of the batch
    tensor([1., 1., 1., 1.])
    """

    rows: Tensor
    codes: Tensor
    n_categories: tuple[int, ...]
    continuous: Tensor
    library: Tensor
    counts: Tensor | None
    labels: Tensor | None = None
    exposure: Tensor | None = None
    measured: Tensor | None = None
    share: Tensor | None = None
    batches: BatchPanels | None = None
    average: Tensor | None = None

    @classmethod
    def typical(cls, schema: ModalitySchema, like: Tensor) -> "View":
        """View to predict a modality in cells of median size and average covariates, one for each row of `like`."""
        n, device = len(like), like.device
        return cls(
            rows=torch.arange(n, device=device),
            codes=torch.full((n, len(schema.categories)), -1, device=device),
            n_categories=tuple(len(categories) for categories in schema.categories.values()),
            continuous=like.new_zeros(n, len(schema.continuous)),
            library=like.new_full((n, 1), schema.library),
            counts=None,
            labels=torch.full((n,), -1, device=device),
            exposure=like.new_full((n, schema.n_features), schema.exposure) if schema.spec.exposure_layer else None,
            batches=None if schema.by_batch is None else schema.by_batch.to(device),
        )

    def dense_counts(self) -> Tensor:
        """Measurements as a strided tensor, shape (b, features)."""
        if self.counts is None:
            raise ValueError("this view has no measurements; pass one of a minibatch from `measured`")
        return self.counts.to_dense() if self.counts.is_sparse else self.counts

    def rates(self, counts: Tensor) -> Tensor:
        """Measurements per exposure, ``(x + 1/2) / (exposure + 1)``, which is stable where the exposure is small."""
        assert self.exposure is not None
        return (counts + 0.5) / (self.exposure + 1)

    def one_hot(self, column: int = 0) -> Tensor:
        """Categories of one column as indicators, shape (b, categories); an unknown category is their average."""
        if column == 0 and self.average is not None:
            return self.average.expand(len(self.rows), -1)
        return self._indicators(self.codes[:, column], self.n_categories[column])

    def one_hot_label(self, n_labels: int) -> Tensor:
        """Labels as indicators, shape (b, labels); an unknown label is their average."""
        assert self.labels is not None
        return self._indicators(self.labels, n_labels)

    def by_batch(self, parameter: Tensor) -> Tensor:
        """A parameter of each batch and feature for the batches of the cells, shape (b, features).

        In a prediction, a feature that was not measured in a batch has the mean over batches in which it was.
        """
        return self.one_hot() @ (parameter if self.batches is None else self.batches.filled(parameter))

    def over_cells(self, values: Tensor) -> Tensor:
        """Mean of values of shape (b, features) over the cells in which a feature was measured, shape (features,)."""
        if self.measured is None:
            return values.mean(0)
        return torch.where(self.measured, values, 0.0).sum(0) / self.measured.sum(0).clamp_min(1)

    def spread(self, values: Tensor) -> Tensor:
        """Standard deviation of values over the cells in which a feature was measured, shape (features,)."""
        if self.measured is None:
            return values.std(0)
        squares = torch.where(self.measured, (values - self.over_cells(values)).square(), 0.0).sum(0)
        return (squares / (self.measured.sum(0) - 1).clamp_min(1)).sqrt()

    def _indicators(self, codes: Tensor, n: int) -> Tensor:
        rows = torch.eye(n, dtype=self.library.dtype, device=self.library.device)
        return torch.cat([rows, torch.full_like(rows[:1], 1 / n)])[codes]  # code -1 is the last row

    def design(self) -> Tensor:
        """All covariates as columns: indicators of each categorical covariate, then the continuous covariates."""
        columns = [self.one_hot(i) for i in range(len(self.n_categories))]
        return torch.cat([*columns, self.continuous], dim=-1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "View":
        """The same view on another device."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=non_blocking) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        if self.batches is not None:
            moved["batches"] = self.batches.to(device)
        return replace(self, **moved)


def across_batches(
    decode: Callable[[View], dict[str, Tensor]], view: View, likelihood: Any = None
) -> dict[str, Tensor]:
    """Predictors of a decoder; in a prediction, those of features that were never measured in the batch of a cell.

    A decoder has not learnt such a feature for that batch. Its predictors are those for the average of the batches in
    which it was measured, moved by what predictors of two batches may differ by without meaning.

    Parameters
    ----------
    decode
        Function from a view of the cells to the predictors by name, each of shape (..., b, features).
    view
        The cells.
    likelihood
        The likelihood, whose ``level`` gives these constants; None if there are none.
    """
    predictors = decode(view)
    if view.batches is None:
        return predictors
    table, profile = view.batches.table, view.batches.profile
    here, joined = view.batches.of(view.codes[:, 0]), dict(predictors)
    nowhere = ~here.any(-1, keepdim=True)
    for batches, features in view.batches.patterns:
        others = decode(replace(view, average=batches / batches.sum()))
        there, known = table[batches].all(0), torch.cat([batches, batches.new_zeros(1)])[view.codes[:, :1]]
        levels: dict[str, Tensor] = {}
        if hasattr(likelihood, "level"):
            apart = ~(here & there).any(-1, keepdim=True)
            of_here = torch.where(apart, torch.where(nowhere, there, here), here & there)
            of_there = torch.where(apart, there, here & there)
            one, two = (
                likelihood.level(p, m, (m * profile).sum(-1, keepdim=True))
                for p, m in ((predictors, of_here), (others, of_there))
            )
            levels = {name: torch.where(nowhere, 0.0, one[name]) - two[name] for name in one}
        for name, values in others.items():
            moved = values[..., features] + levels.get(name, 0.0)
            joined[name] = joined[name].index_copy(
                -1, features, torch.where(known, predictors[name][..., features], moved)
            )
    return joined


@dataclass
class Minibatch:
    """B cells of a mosaic: what the guide sees of them, and what the model explains.

    Parameters
    ----------
    index
        Numbers of the cells in the mosaic, shape (B,).
    n_cells
        Number of cells that the minibatch represents; likelihoods are scaled by `n_cells / B`.
    observed
        What the guide sees: the modalities that were measured in at least one of the cells.
    decoded
        What the model explains (views with measurements, in training) or predicts (views without).
    groups
        Cohort of each cell, shape (B,): 0 background, 1, 2, … target groups, -1 neither; None without cohorts.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mdata, _ = simulate(90, {"rna": 50, "adt": 5}, patterns=["rna", "rna+adt"])
    >>> minibatch = measured(Mosaic.from_mudata(mdata), np.arange(90))
    >>> {name: len(view.rows) for name, view in minibatch.observed.items()}
    {'rna': 90, 'adt': 45}
    >>> minibatch.decoded["adt"] is minibatch.observed["adt"]  # training: what is seen is explained
    True
    """

    index: Tensor
    n_cells: int
    observed: dict[str, View]
    decoded: dict[str, View]
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def scale(self) -> float:
        """Number of cells that each cell of the minibatch represents."""
        return self.n_cells / len(self)

    def dense(self) -> "Minibatch":
        """The same minibatch with strided measurements, for tools of Pyro that accept only these."""

        def strided(views: dict[str, View]) -> dict[str, View]:
            known = {k: v for k, v in views.items() if v.counts is not None}
            return views | {k: replace(v, counts=v.dense_counts()) for k, v in known.items()}

        return replace(self, observed=strided(self.observed), decoded=strided(self.decoded))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Minibatch":
        """The same minibatch on another device."""
        observed = {k: v.to(device, non_blocking) for k, v in self.observed.items()}
        # In training, both sides hold the same views; move them once.
        decoded = {
            k: observed[k] if v is self.observed.get(k) else v.to(device, non_blocking) for k, v in self.decoded.items()
        }
        groups = None if self.groups is None else self.groups.to(device, non_blocking=non_blocking)
        return Minibatch(self.index.to(device, non_blocking=non_blocking), self.n_cells, observed, decoded, groups)


def measured(mosaic: Mosaic, index: np.ndarray, n_cells: int | None = None) -> Minibatch:
    """Minibatch for training: each modality is encoded and explained in the cells that have it.

    Parameters
    ----------
    mosaic
        The data.
    index
        Numbers of the cells, shape (B,).
    n_cells
        Number of cells that the minibatch represents; by default all cells of the mosaic.

    Returns
    -------
    Minibatch
        `observed` and `decoded` are the same views.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> minibatch = measured(mosaic, np.arange(10))
    >>> len(minibatch), list(minibatch.observed), minibatch.scale
    (10, ['rna', 'adt'], 9.0)
    """
    views = {}
    for name, modality in mosaic.modalities.items():
        rows = np.flatnonzero(modality.rows[index] >= 0)
        if len(rows):
            cells = index[rows]
            features = (None, None) if modality.panels is None else modality.panels.measured(cells)
            views[name] = View(
                rows=torch.from_numpy(rows),
                codes=torch.from_numpy(modality.codes[cells]),
                n_categories=modality.n_categories,
                continuous=torch.from_numpy(modality.continuous[cells]),
                library=torch.from_numpy(modality.library[cells, None]),
                counts=modality.tensor(cells),
                labels=torch.from_numpy(modality.labels[cells]),
                exposure=modality.exposure(cells),
                measured=features[0],
                share=features[1],
            )
    groups = None if mosaic.groups is None else torch.from_numpy(mosaic.groups[index])
    return Minibatch(torch.from_numpy(index), mosaic.n_cells if n_cells is None else n_cells, views, views, groups)


def to_predict(
    mosaic: Mosaic,
    index: np.ndarray,
    decode: tuple[str, ...],
    encode: Sequence[str] | None = None,
    batch: object = None,
    library: float | np.ndarray | None = None,
) -> Minibatch:
    """Minibatch in which the model predicts modalities for every cell, whether or not they were measured.

    Parameters
    ----------
    mosaic
        The data.
    index
        Numbers of the cells, shape (B,).
    decode
        Modalities to predict.
    encode
        Modalities that the guide sees; by default all that were measured.
    batch
        Batch to predict for; by default the batch of each cell, or the average over batches if the modality was never
        measured in that batch.
    library
        Size to predict at, one number or one per cell; by default the measured size, NaN in cells without the modality.

    Returns
    -------
    Minibatch
        The views in `decoded` have no counts, and a row for every cell.

    Raises
    ------
    ValueError
        If there is no such modality or batch.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> minibatch = to_predict(mosaic, np.arange(10), decode=("adt",), encode=None)
    >>> minibatch.decoded["adt"].counts is None, len(minibatch.decoded["adt"].rows)
    (True, 10)
    """
    for name in (*decode, *(encode or ())):
        if name not in mosaic.modalities:
            raise ValueError(f"there is no modality {name!r}; the mosaic has {', '.join(map(repr, mosaic.modalities))}")
    seen = measured(mosaic, index)
    observed = {k: v for k, v in seen.observed.items() if encode is None or k in encode}
    views = {}
    for name in decode:
        modality = mosaic.modalities[name]
        codes = modality.codes[index]
        if batch is not None:
            codes[:, 0] = _batch_code(name, modality, batch)
        size = modality.library[index] if library is None else np.broadcast_to(library, index.shape)
        size = np.array(size, dtype=np.float32)
        whole = modality.panels is None or library is not None
        own = (None, None) if whole or modality.panels is None else modality.panels.measured(index)
        views[name] = View(
            rows=torch.arange(len(index)),
            codes=torch.from_numpy(codes),
            n_categories=modality.n_categories,
            continuous=torch.from_numpy(modality.continuous[index]),
            library=torch.from_numpy(size[:, None]),
            counts=None,
            labels=torch.from_numpy(modality.labels[index]),
            exposure=modality.exposure(index),
            measured=own[0],
            share=own[1],
            batches=modality.schema.by_batch,
        )
    return Minibatch(seen.index, len(index), observed, views, seen.groups)


def _batch_code(name: str, modality: Modality, batch: object) -> int:
    if not pd.api.types.is_scalar(batch):
        raise ValueError(f"batch must be one batch here; found a {type(batch).__name__}")
    batch = word(batch)
    batches = modality.schema.categories[modality.spec.batch_key] if modality.spec.batch_key else ()
    if batch not in batches:
        raise ValueError(f"modality {name!r} has no batch {batch!r}; its batches: {', '.join(batches) or 'none'}")
    return batches.index(batch)
