"""Labels of cells: one vocabulary for all modalities, each with labels of some cells."""

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from pyromosaic.data import Minibatch, Mosaic, Schema


class Labels(nn.Module):
    """The labels of all modalities, matched by name, and the labels of a minibatch.

    Parameters
    ----------
    schema
        Schema of the data; a modality may have no labels.

    Attributes
    ----------
    names
        All labels.
    """

    numbers: Tensor

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        sets = {name: m.labels for name, m in schema.modalities.items() if m.labels}
        self.names = tuple(sorted({label for labels in sets.values() for label in labels}))
        self.modalities = tuple(sets)
        # Maps a modality's codes (columns) to those of the vocabulary; unknown, the last column, stays -1.
        numbers = torch.full((len(sets), 1 + max(map(len, sets.values()), default=0)), -1)
        for row, labels in zip(numbers, sets.values(), strict=True):
            row[: len(labels)] = torch.tensor([self.names.index(label) for label in labels])
        self.register_buffer("numbers", numbers, persistent=False)

    def __len__(self) -> int:
        return len(self.names)

    def of_modality(self, name: str, minibatch: Minibatch) -> Tensor | None:
        """Labels of the cells that have a modality, shape (b,), -1 if unknown; None if the modality has no labels."""
        labels = minibatch.observed[name].labels
        if labels is None or name not in self.modalities:
            return None
        return self.numbers[self.modalities.index(name)][labels]

    def forward(self, minibatch: Minibatch) -> Tensor:
        """Label of each cell from any of its modalities, shape (B,), -1 if unknown."""
        known = torch.full_like(minibatch.index, -1)
        for name, view in minibatch.observed.items():
            own = self.of_modality(name, minibatch)
            if own is not None:
                known = known.index_copy(0, view.rows, torch.maximum(known[view.rows], own))
        return known


def check_labels(mosaic: Mosaic) -> None:
    """Check that all modalities with labels use the same vocabulary.

    Parameters
    ----------
    mosaic
        The data.

    Raises
    ------
    ValueError
        If the labels of a modality have no name in common with those of the others.

    Warns
    -----
    UserWarning
        If a label occurs in one modality only, although others have labels.
    """
    used = {}
    for name, m in mosaic.modalities.items():
        codes = np.unique(m.labels[m.present & (m.labels >= 0)])
        if len(codes):
            used[name] = {m.schema.labels[code] for code in codes}
    alone: list[str] = []
    for name, labels in used.items():
        others = {label for other, known in used.items() if other != name for label in known}
        own = sorted(labels - others)
        if others and len(own) == len(labels):
            raise ValueError(
                f"the labels of modality {name!r} ({_some(own)}) have no name in common with those of other "
                f"modalities ({_some(sorted(others))}); use one vocabulary, or the labels of one modality only"
            )
        alone += [f"{label!r} ({name})" for label in own if others]
    if alone:
        warnings.warn(
            f"some labels occur in one modality only, although others have labels: {', '.join(alone)}; if they are "
            "different spellings of the same label, make them equal",
            stacklevel=2,
        )


def _some(labels: list[str]) -> str:
    return ", ".join(map(repr, labels[:3])) + (", …" if len(labels) > 3 else "")
