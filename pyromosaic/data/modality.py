"""One modality of a mosaic: its measurements and the covariates of its cells."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pyromosaic.data.matrix import Matrix, as_tensor
from pyromosaic.data.panels import CellPanels
from pyromosaic.data.spec import ModalitySchema, ModalitySpec

ENTRIES_FOR_START = 5_000_000  # start values are computed from at most this many entries and 10,000 cells


@dataclass
class Modality:
    """One registered modality of a mosaic of N cells.

    Parameters
    ----------
    name
        Name of the modality.
    schema
        What a model remembers of the modality.
    matrix
        The measurements, which are read by rows.
    rows
        Row of each cell in `matrix`, shape (N,); -1 for cells without the modality.
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
        Exposure of each measurement (e.g. its coverage), rows as in `matrix`; None if the likelihood needs none.
    panels
        Which features were measured in which cell; None if all were measured in all.

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
    panels: CellPanels | None = None

    @property
    def spec(self) -> ModalitySpec:
        """How the user described the modality."""
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
        """Exposure of each measurement, shape (len(cells), features); the median where nothing was measured.

        Raises the error of `read` if the layer was changed after registration.
        """
        if self.exposures is None:
            return None
        exposure = torch.full((len(cells), self.schema.n_features), self.schema.exposure)
        has = self.rows[cells] >= 0
        if has.any():
            found = self._as_registered(self.exposures, cells[has], "exposures")
            exposure[torch.from_numpy(has)] = as_tensor(found, dense=True)
        return exposure

    def measured(self, cells: np.ndarray) -> np.ndarray:
        """Which features were measured in cells that have the modality, shape (len(cells), features), boolean."""
        if self.panels is None:
            return np.ones((len(cells), self.schema.n_features), dtype=bool)
        return self.panels.masks[self.panels.codes[cells]]

    def take(self, cells: np.ndarray) -> "Modality":
        """The same modality for a selection of cells; the matrix is shared, not copied."""
        columns = ("rows", "codes", "continuous", "library", "labels")
        panels = None if self.panels is None else self.panels.take(cells)
        return replace(self, panels=panels, **{name: getattr(self, name)[cells] for name in columns})

    def read(self, cells: np.ndarray) -> Any:
        """Measurements of cells that have the modality, as a CSR matrix or a NumPy array.

        Raises
        ------
        ValueError
            If the user's matrix was changed after registration. To notice it, the weighted sum of each row is compared.
        """
        return self._as_registered(self.matrix, cells, "measurements")

    def _as_registered(self, matrix: Matrix, cells: np.ndarray, what: str) -> Any:
        rows = self.rows[cells]
        block = matrix[rows]
        changed = matrix.changed(rows, block)
        if len(changed):
            if not matrix.in_memory:
                raise ValueError(
                    f"modality {self.name!r}: {matrix.file} no longer holds the {what} that were registered, in "
                    f"{len(changed)} of the {len(cells)} cells read (the first: cell number {cells[changed[0]]}); it "
                    "was changed, cut off or removed: restore it, open it again, and register again"
                )
            raise ValueError(
                f"modality {self.name!r}: the {what} of {len(changed)} of the {len(cells)} cells read were changed in "
                f"place after registration (the first: cell number {cells[changed[0]]}); keep raw counts in a separate "
                "layer, name it at registration, and register again"
            )
        return block

    def sample(self, seed: int = 0) -> np.ndarray:
        """Numbers of some cells that have the modality, for start values; few enough to be dense in memory."""
        cells = np.flatnonzero(self.present)
        n = min(10_000, max(500, ENTRIES_FOR_START // self.schema.n_features))
        if len(cells) > n:
            cells = np.sort(np.random.default_rng(seed).choice(cells, n, replace=False))
        return cells
