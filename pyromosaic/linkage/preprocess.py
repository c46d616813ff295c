"""Preprocessing: normalise, standardise within batch, reduce and smooth measurements; sparse data stay sparse."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from pyromosaic.data.mosaic import Modality
from pyromosaic.data.panels import packed
from pyromosaic.neighbors import nearest


def group_means(groups: np.ndarray, values: Any, n_groups: int) -> Any:
    """Mean of the rows in each group, shape (n_groups, columns); zero for an empty group, sparse if `values` is."""
    size = np.bincount(groups, minlength=n_groups)
    rows = np.arange(len(groups))
    return sparse.csr_array((1 / size[groups], (groups, rows)), shape=(n_groups, len(groups))) @ values


@dataclass
class Standardised:
    """The matrix ``(values - mean[batch]) / scale``, which is never formed.

    Parameters
    ----------
    values
        Transformed measurements, CSR or array, shape (n, p).
    batch
        Batch number of each cell, shape (n,).
    mean
        Mean of each feature in each batch, shape (batches, p).
    scale
        Standard deviation within batches of each feature, shape (p,); infinite for a constant feature.
    measured
        Which features were measured in each batch, shape (batches, p); None if all were. Others are at the mean.
    """

    values: Any
    batch: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    measured: np.ndarray | None = None

    def __matmul__(self, right: np.ndarray) -> np.ndarray:
        """Product with a matrix of shape (p, k)."""
        scaled = right / self.scale[:, None]
        return self.values @ scaled - (self.mean @ scaled)[self.batch]

    def transposed_times(self, right: np.ndarray) -> np.ndarray:
        """Product of the transpose with a matrix of shape (n, k)."""
        size = np.bincount(self.batch, minlength=len(self.mean))
        total = group_means(self.batch, right, len(self.mean)) * size[:, None]
        return (self.values.T @ right - self.mean.T @ total) / self.scale[:, None]

    def averages(self, groups: np.ndarray, n_groups: int, columns: np.ndarray) -> np.ndarray:
        """Mean of some columns over the cells of each group with the feature, shape (n_groups, len(columns))."""
        values = group_means(groups, self.values[:, columns], n_groups)
        batches = group_means(groups, np.eye(len(self.mean))[self.batch], n_groups)
        means = (_dense(values) - batches @ self.mean[:, columns]) / self.scale[columns]
        return means if self.measured is None else means / np.maximum(batches @ self.measured[:, columns], 1e-12)


@dataclass(frozen=True)
class Standardiser:
    """Normalisation and standardisation of one modality, to apply to new cells.

    Parameters
    ----------
    name, features
        Names of the modality and of its features.
    transform
        See `pyromosaic.data.Traits`.
    target
        Total count to which each cell is normalised, if the transform does that.
    batches
        Names of the batches; one empty name if there are no batches. Cells with another panel are another batch.
    mean, scale
        As in `Standardised`.
    """

    name: str
    features: tuple[str, ...]
    transform: str
    target: float
    batches: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, modality: Modality, cells: np.ndarray) -> "tuple[Standardiser, Standardised]":
        """Fit means and scales to cells that have the modality, and standardise them."""
        transform = modality.spec.traits.transform
        target = float(np.median(modality.library[cells])) if transform == "log" else 1.0
        values = _transformed(modality, cells, transform, target)
        batches, batch, measured = _batches(modality, cells)
        mean = _dense(group_means(batch, values, len(batches)))
        # E[x²] - E[x]² within each batch, summed: differences between batch means do not count as variation.
        square = (
            values**2
            if isinstance(values, np.ndarray)
            else sparse.csr_array((values.data**2, values.indices, values.indptr), values.shape)
        )
        total = np.asarray(square.sum(axis=0, dtype=np.float64)).ravel()
        within = total - (np.bincount(batch, minlength=len(batches)) @ mean**2)
        n = len(cells) if measured is None else np.maximum(np.bincount(batch, minlength=len(batches)) @ measured, 1)
        variance = np.maximum(within / n, 0)
        constant = variance <= 1e-9 * np.maximum(total / n, 1e-12)
        scale = np.where(constant, np.inf, np.sqrt(variance))
        self = cls(modality.name, modality.schema.features, transform, target, batches, mean, scale)
        return self, Standardised(values, batch, mean, scale, measured)

    def apply(self, modality: Modality, cells: np.ndarray) -> Standardised:
        """Standardise new cells; a batch that was not seen before is centred at its own mean.

        Raises
        ------
        ValueError
            If the features differ from those of the first cells.
        """
        if modality.schema.features != self.features:
            raise ValueError(
                f"modality {self.name!r}: the features must be the same {len(self.features)} features as in the "
                "linkage, in the same order"
            )
        values = _transformed(modality, cells, self.transform, self.target)
        batches, batch, measured = _batches(modality, cells)
        mean = _dense(group_means(batch, values, len(batches)))
        for i, name in enumerate(batches):
            if name in self.batches:
                mean[i] = self.mean[self.batches.index(name)]
        return Standardised(values, batch, mean, self.scale, measured)


def _batches(modality: Modality, cells: np.ndarray) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Names of the batches of these cells, each cell's batch number, and which features were measured in which."""
    key = modality.spec.batch_key
    if key is None:
        known, codes, unique = np.array([""], dtype=object), np.zeros(len(cells), dtype=np.intp), np.zeros(1, np.intp)
    else:
        known = np.array([*modality.schema.categories[key], "unknown"], dtype=object)  # code -1 indexes the last
        codes, unique = pd.factorize(modality.codes[cells, 0], sort=True)
    if modality.panels is None:
        return tuple(known[unique]), codes, None
    masks, panel = modality.panels.masks, modality.panels.codes[cells]
    codes, pairs = pd.factorize(codes * len(masks) + panel, sort=True)
    measured = masks[pairs % len(masks)]
    names = known[unique[pairs // len(masks)]]
    more = ["" if mask.all() else f" with features {packed(mask)}" for mask in measured]
    named = tuple(name + text for name, text in zip(names, more, strict=True))
    return named, codes, measured


def _transformed(modality: Modality, cells: np.ndarray, transform: str, target: float) -> Any:
    """Transformed measurements before standardising: CSR if they are sparse and the transform keeps zeros."""
    values = modality.read(cells)
    if transform == "centred_log_ratio":
        # Proteins are few and detected in nearly every cell: sparse storage saves nothing.
        values = np.log1p(_dense(values))
        if modality.panels is None:
            return values - values.mean(axis=1, keepdims=True)
        measured = modality.measured(cells)
        return np.where(measured, values - values.mean(axis=1, where=measured, keepdims=True), 0)
    if transform == "as_is" and isinstance(values, np.ndarray):
        return values
    values = sparse.csr_array(values, dtype=np.float32)  # already a copy
    if transform == "as_is":
        return values
    if transform == "open":
        values.data = (values.data > 0).astype(np.float32)
    if transform in ("log", "open"):
        total = modality.library[cells] if transform == "log" else np.asarray(values.sum(axis=1)).ravel()
        if transform == "open" and modality.panels is not None:
            total = total / modality.panels.shares[modality.panels.codes[cells]]
        factor = target / np.maximum(total, 1e-12)
        values.data *= np.repeat(factor, np.diff(values.indptr)).astype(np.float32)
    values.data = np.log1p(values.data)
    return values


def _dense(values: Any) -> np.ndarray:
    return np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), dtype=np.float64)


def principal_components(data: Standardised, n_components: int, seed: int) -> np.ndarray:
    """Loadings of the leading principal components by randomised subspace iteration, shape (p, n_components).

    The random start is in the space of features, so that the order of the cells does not matter.
    """
    n_features = data.values.shape[1]
    basis = np.random.default_rng(seed).standard_normal((n_features, min(n_components + 10, n_features)))
    for _ in range(6):
        basis = np.linalg.qr(data.transposed_times(data @ basis))[0]
    scores = data @ basis
    loadings = basis @ np.linalg.eigh(scores.T @ scores)[1][:, ::-1][:, :n_components]
    return loadings * np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(loadings.shape[1])])


def metacells(x: np.ndarray, at_most: int) -> np.ndarray:
    """Group cells into metacells of equal size, by repeatedly halving groups along their longest direction.

    Parameters
    ----------
    x
        Principal components, cells × components.
    at_most
        Maximum number of groups; with fewer cells, each cell is a group.

    Returns
    -------
    numpy.ndarray
        Group of each cell; it depends on the measurements but not on the order of the cells.
    """
    if len(x) <= at_most:
        return np.arange(len(x))
    parts = [np.arange(len(x))]
    while 2 * len(parts) <= at_most:
        halves = []
        for part in parts:
            centred = x[part] - x[part].mean(axis=0)
            direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
            halves += np.array_split(part[np.argsort(centred @ direction, kind="stable")], 2)
        parts = halves
    groups = np.empty(len(x), dtype=np.intp)
    for number, part in enumerate(parts):
        groups[part] = number
    return groups


@dataclass(frozen=True)
class Smoother:
    """Smoothing by the mean over nearest neighbours within a modality and the cell's own value.

    Parameters
    ----------
    weights
        Row-normalised neighbour matrix, without the diagonal.
    own
        Weight of the cell's own value.
    """

    weights: sparse.csr_array
    own: float = 0.3

    @classmethod
    def fit(cls, x: np.ndarray, n_neighbors: int) -> "Smoother":
        """Find the nearest neighbours by Euclidean distance between rows of `x`, cells × components."""
        _, neighbors = nearest(x, n_neighbors)
        k = neighbors.shape[1]
        pointers = np.arange(len(x) + 1) * k
        weights = sparse.csr_array((np.full(neighbors.size, 1 / k), neighbors.ravel(), pointers), shape=(len(x),) * 2)
        return cls(weights)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Smooth the rows of `values`."""
        return self.own * values + (1 - self.own) * (self.weights @ values)
