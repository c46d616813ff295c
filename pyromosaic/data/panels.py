"""Panels: which features of a modality were measured in which cells."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(mask: np.ndarray) -> str:
    """A mask of features as text, eight features in two letters."""
    return np.packbits(mask).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray:
    """The inverse of `packed` for n features."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(bool)


@dataclass(frozen=True)
class Panels:
    """What a model remembers of the panels of a modality; masks of features are text, see `packed`.

    Parameters
    ----------
    key
        Column of `obs` that says which group of `groups` a cell is in; None if no column does.
    groups
        Names of groups of cells, each with the features that were measured in it.
    batches
        For each batch, in the order of the schema, the features that were measured in any of its cells.

    Examples
    --------
    >>> masks = packed(np.array([True, True, False])), packed(np.array([True, True, True]))
    >>> Panels("batch", (("a", masks[0]), ("b", masks[1])), masks).by_batch(3)
    array([[ True,  True, False],
           [ True,  True,  True]])
    """

    key: str | None
    groups: tuple[tuple[str, str], ...]
    batches: tuple[str, ...]

    def by_group(self, n: int) -> np.ndarray:
        """Which features were measured in which group, shape (groups, n)."""
        return np.stack([unpacked(mask, n) for _, mask in self.groups])

    def by_batch(self, n: int) -> np.ndarray:
        """Which features were measured in which batch, shape (batches, n)."""
        return np.stack([unpacked(mask, n) for mask in self.batches])

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> "Panels | None":
        """The inverse of `dataclasses.asdict`."""
        if data is None:
            return None
        return cls(data["key"], tuple((str(k), str(v)) for k, v in data["groups"]), tuple(data["batches"]))


@dataclass(frozen=True)
class CellPanels:
    """The panel of each cell of a mosaic.

    Parameters
    ----------
    masks
        Which features each panel has, shape (panels, features).
    codes
        Number of each cell's panel, shape (N,); -1 for cells without the modality.
    shares
        Share of the expected counts of a cell that is in the features of each panel, shape (panels,).
    """

    masks: np.ndarray
    codes: np.ndarray
    shares: np.ndarray

    def take(self, cells: np.ndarray) -> "CellPanels":
        """The panels of a selection of cells."""
        return replace(self, codes=self.codes[cells])

    def measured(self, cells: np.ndarray) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Which features were measured in these cells, and the share of these features; None if all were in all.

        Cells without the modality count as measured as a whole.
        """
        codes = self.codes[cells]
        masks = np.append(self.masks, np.ones_like(self.masks[:1]), axis=0)[codes]
        if masks.all():
            return None, None
        shares = np.append(self.shares, 1.0)[codes].astype(np.float32)
        return torch.from_numpy(masks), torch.from_numpy(shares[:, None])

    def number(self, cells: np.ndarray) -> np.ndarray:
        """Number of these cells in which each feature was measured, shape (features,)."""
        codes = self.codes[cells]
        return np.bincount(codes[codes >= 0], minlength=len(self.masks)) @ self.masks


class BatchPanels:
    """Which features were measured in which batch, for predictions of those that were not.

    Parameters
    ----------
    table
        Shape (batches, features).
    profile
        Expected share of each feature in the counts of a cell, shape (features,).

    Attributes
    ----------
    patterns
        Sets of batches, as a mask, each with the numbers of the features that were measured in these batches only. If
        there are more sets than batches, a feature belongs to the first batch that has it.
    """

    def __init__(self, table: Tensor, profile: Tensor) -> None:
        self.table, self.profile = table, profile
        partial = torch.nonzero(~table.all(0)).squeeze(-1)
        sets, number = torch.unique(table[:, partial], dim=1, return_inverse=True)
        if sets.shape[1] > len(table):
            number = table[:, partial].int().argmax(0)
            sets = torch.eye(len(table), dtype=torch.bool, device=table.device)
        self.patterns = [(one, partial[number == i]) for i, one in enumerate(sets.T) if (number == i).any()]

    def to(self, device: torch.device | str) -> "BatchPanels":
        """The same on another device."""
        return self if self.table.device == torch.device(device) else self._on(str(device))

    def _on(self, device: str) -> "BatchPanels":
        known: dict[str, BatchPanels] = self.__dict__.setdefault("_known", {})
        if device not in known:
            known[device] = BatchPanels(self.table.to(device), self.profile.to(device))
        return known[device]

    def of(self, codes: Tensor) -> Tensor:
        """Features measured in the batch of each cell, shape (b, features); for an unknown batch (-1), in all."""
        return torch.cat([self.table, self.table.all(0, keepdim=True)])[codes]

    def filled(self, parameter: Tensor) -> Tensor:
        """A parameter per batch and feature; where a feature was not measured, its mean over batches where it was."""
        mean = (parameter * self.table).sum(0) / self.table.sum(0).clamp_min(1)
        return torch.where(self.table, parameter, mean)
