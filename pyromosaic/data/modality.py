"""One modality of a mosaic: its measurements, and what is known of the cells that have it."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pyromosaic.data.matrix import Matrix, as_tensor
from pyromosaic.data.spec import ModalitySchema, ModalitySpec

ENTRIES_FOR_START = 5_000_000  # entries, of at most 10,000 cells, from which start values are computed


@dataclass
class Modality:
    """One registered modality of a mosaic of N cells.

    Parameters
    ----------
    name
        Its name.
    schema
        What a model remembers of it.
    matrix
        Its measurements, read by rows.
    rows
        Row of each cell in `matrix`, shape (N,); -1 where the cell has no such measurement.
    codes
        Category numbers, batch first, shape (N, categorical columns); -1 where unknown.
    continuous
        Standardised continuous covariates, shape (N, columns); 0, the mean, where unknown.
    library
        Size of each cell in counts, shape (N,); NaN where unmeasured.
    labels
        Label numbers, shape (N,); -1 where unknown.
    dense
        Whether minibatches are strided tensors rather than sparse ones.
    exposures
        What each measurement was made out of, rows as in `matrix`; None if the likelihood needs no such thing.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> adt = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0]).modalities["adt"]
    >>> cells = np.flatnonzero(adt.present)
    >>> len(cells), adt.tensor(cells[:3]).shape
    (60, torch.Size([3, 5]))
    """

    name: str
    schema: ModalitySchema
    matrix: Matrix
    rows: np.ndarray
    codes: np.ndarray
    continuous: np.ndarray
    library: np.ndarray
    labels: np.ndarray
    dense: bool
    exposures: Matrix | None = None

    @property
    def spec(self) -> ModalitySpec:
        """The user's specification."""
        return self.schema.spec

    @property
    def n_categories(self) -> tuple[int, ...]:
        """Number of categories of each categorical column."""
        return tuple(len(c) for c in self.schema.categories.values())

    @property
    def present(self) -> np.ndarray:
        """Which cells have the modality, shape (N,), boolean."""
        return self.rows >= 0

    def tensor(self, cells: np.ndarray) -> torch.Tensor:
        """Measurements of cells that have the modality, shape (len(cells), features)."""
        return as_tensor(self.read(cells), self.dense)

    def exposure(self, cells: np.ndarray) -> torch.Tensor | None:
        """What each measurement was made out of, shape (len(cells), features), the median where there is none.

        Raises as `read` does.
        """
        if self.exposures is None:
            return None
        exposure = torch.full((len(cells), self.schema.n_features), self.schema.exposure)
        has = self.rows[cells] >= 0
        if has.any():
            found = self._as_registered(self.exposures, cells[has], "exposures")
            exposure[torch.from_numpy(has)] = as_tensor(found, dense=True)
        return exposure

    def take(self, cells: np.ndarray) -> "Modality":
        """The modality of a mosaic of these cells, with the same matrix."""
        columns = ("rows", "codes", "continuous", "library", "labels")
        return replace(self, **{name: getattr(self, name)[cells] for name in columns})

    def read(self, cells: np.ndarray) -> Any:
        """Measurements of cells that have the modality, as a CSR matrix or a NumPy array.

        Raises
        ------
        ValueError
            If the user's matrix has been changed since it was registered: by each row's sum, weighted by position.
        """
        return self._as_registered(self.matrix, cells, "measurements")

    def _as_registered(self, matrix: Matrix, cells: np.ndarray, what: str) -> Any:
        rows = self.rows[cells]
        block = matrix[rows]
        changed = matrix.changed(rows, block)
        if len(changed):
            raise ValueError(
                f"modality {self.name!r}: the {what} were changed after registration, in place, {len(changed)} of "
                f"{len(cells)} cells that were read, cell number {cells[changed[0]]} first; keep raw counts in a layer "
                "of their own, name it at registration, and register again"
            )
        return block

    def sample(self, seed: int = 0) -> np.ndarray:
        """Numbers of some cells that have the modality, few enough to be dense in memory, for start values."""
        cells = np.flatnonzero(self.present)
        n = min(10_000, max(500, ENTRIES_FOR_START // self.schema.n_features))
        if len(cells) > n:
            cells = np.sort(np.random.default_rng(seed).choice(cells, n, replace=False))
        return cells
