"""Reading a cells-by-features matrix row by row, whatever it is stored as, and refusing what no likelihood accepts."""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse

CHUNK = 4096  # rows read at once in a pass over all cells
DENSE_ABOVE = 0.3  # share of non-zero entries from which a minibatch is handed on as a dense tensor


def _is_sparse(matrix: Any) -> bool:
    return sparse.issparse(matrix)


def is_readable(source: Any) -> bool:
    """Whether rows come as NumPy or scipy arrays, from memory or from a file."""
    if not (_is_sparse(source) or isinstance(source, np.ndarray)):
        source = source[:1] if hasattr(source, "shape") else None
    return _is_sparse(source) or isinstance(source, np.ndarray)


class Matrix:
    """The measurements of one modality, read by rows and never copied as a whole.

    Parameters
    ----------
    source
        Cells × features: a scipy sparse matrix or array, a NumPy array, or the `X` of a backed `anndata.AnnData`
        (sparse or dense). CSC has no fast rows, so in memory it is turned to CSR once, in a copy.
    columns
        Columns to use, in this order; None for all as they are.
    """

    def __init__(self, source: Any, columns: np.ndarray | None = None) -> None:
        self.in_memory = _is_sparse(source) or isinstance(source, np.ndarray)
        self.is_sparse = _is_sparse(source) or (not self.in_memory and hasattr(source, "format"))
        if _is_sparse(source):
            _check_indices(source)
            source = source.tocsr()
        if columns is not None and self.in_memory:
            source, columns = source[:, columns], None
        self.source, self.columns = source, columns
        self.shape: tuple[int, int] = (source.shape[0], source.shape[1] if columns is None else len(columns))
        self.marks: np.ndarray | None = None  # of the rows that `check_values` has read

    def __getitem__(self, rows: np.ndarray) -> Any:
        """The rows asked for, in that order: a CSR matrix where the source is sparse, else a NumPy array."""
        if self.in_memory:
            return self.source[rows]
        # Files are read in increasing order, each row once.
        unique, inverse = np.unique(rows, return_inverse=True)
        block = self.source[unique]
        block = (sparse.csr_matrix(block) if self.is_sparse else np.asarray(block))[inverse]
        return block if self.columns is None else block[:, self.columns]

    def tensor(self, rows: np.ndarray, dense: bool) -> torch.Tensor:
        """Rows as a float32 tensor, see `as_tensor`."""
        return as_tensor(self[rows], dense)

    def changed(self, rows: np.ndarray, block: Any) -> np.ndarray:
        """Which of the rows in a block that was read are not as `check_values` has read them, as positions."""
        if self.marks is None:
            return np.empty(0, dtype=np.intp)
        registered = self.marks[rows]
        return np.flatnonzero(~np.isclose(marks(block), registered, rtol=1e-9, atol=1e-7))


def as_tensor(block: Any, dense: bool) -> torch.Tensor:
    """Rows that were read as a float32 tensor: strided if `dense`, else a coalesced sparse COO tensor."""
    if not _is_sparse(block):
        return torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
    if dense:
        return torch.from_numpy(block.toarray().astype(np.float32, copy=False))
    block.sum_duplicates()  # and sorts; does nothing where that is done already
    cells = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    indices = torch.from_numpy(np.stack([cells, block.indices.astype(np.int64)]))
    values = torch.from_numpy(block.data.astype(np.float32, copy=False))
    return torch.sparse_coo_tensor(indices, values, block.shape, is_coalesced=True, check_invariants=False)


def row_totals(block: Any) -> np.ndarray:
    """Sum of each row that was read."""
    return np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()


@lru_cache(maxsize=8)
def _weights(n_features: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, n_features)


def marks(block: Any) -> np.ndarray:
    """Sum of each row that was read, weighted by position, so that the order of the values matters too."""
    weights = _weights(block.shape[1])
    if _is_sparse(block):
        return np.asarray(block @ weights)
    parts = np.array_split(block, 1 + len(block) // 256)  # few rows at a time are in double precision
    return np.concatenate([part @ weights for part in parts])


class Summary(NamedTuple):
    """What a pass over the data has found.

    Parameters
    ----------
    totals
        Sum of each row.
    empty
        Whether a row is 0 throughout.
    density
        Share of non-zero entries.
    detected
        Number of non-zero entries by group of rows and feature.
    """

    totals: np.ndarray
    empty: np.ndarray
    density: float
    detected: np.ndarray


def check_values(
    matrix: Matrix,
    rows: np.ndarray,
    kind: str,
    name: str,
    cells: pd.Index,
    features: pd.Index,
    groups: np.ndarray | None = None,
    n_groups: int = 1,
) -> Summary:
    """Refuse values that the likelihood cannot have produced; one pass over the data, by which it is known again.

    Parameters
    ----------
    matrix
        The measurements.
    rows
        Rows to look at.
    kind
        ``"count"`` (whole numbers from 0), ``"nonnegative"`` or ``"real"``.
    name
        Name of the modality, for the message.
    cells, features
        Names of these rows and of the columns, for the message.
    groups
        Number of the group of each row, in which features are looked for; None for one group.
    n_groups
        How many groups there are.

    Raises
    ------
    ValueError
        On the first value that is not finite, negative (``"count"``, ``"nonnegative"``) or not whole (``"count"``),
        naming its cell and feature.
    """
    totals, n_nonzero = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    matrix.marks = np.full(matrix.shape[0], np.nan)
    n_features = matrix.shape[1]
    detected = np.zeros((n_groups, n_features), dtype=np.int64)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        block = matrix[rows[part]]
        if not _fine(block.data if _is_sparse(block) else block, kind):
            _refuse(block, kind, name, cells[part], features)
        totals[part], matrix.marks[rows[part]] = row_totals(block), marks(block)
        group = np.zeros(len(cells[part]), dtype=np.int64) if groups is None else groups[part]
        if not _is_sparse(block):
            nonzero = block != 0
            n_nonzero[part] = nonzero.sum(axis=1)
            for g in np.unique(group):
                detected[g] += nonzero[group == g].sum(axis=0)
            continue
        if block.nnz and block.data.min() <= 0 and np.count_nonzero(block.data) < block.nnz:
            block = block.copy()
            block.eliminate_zeros()
        n_nonzero[part] = np.diff(block.indptr)
        entries = block.indices if n_groups == 1 else np.repeat(group * n_features, n_nonzero[part]) + block.indices
        detected += np.bincount(entries, minlength=detected.size).reshape(detected.shape)
    density = n_nonzero.sum() / max(1, len(rows) * n_features)
    return Summary(totals, n_nonzero == 0, float(density), detected)


#: Largest value of each kind: a count that float32 holds exactly, and what can be squared in it.
LARGEST = {"count": 2.0**24, "nonnegative": 1e15, "real": 1e15}


def suspicion(matrix: Matrix, rows: np.ndarray, totals: np.ndarray, kind: str, sized: bool) -> str | None:
    """What makes values of the right kind look like those of another, from all totals and up to 200 cells.

    Examples
    --------
    >>> shares = np.array([[4.0, 6.0, 90.0], [30.0, 20.0, 50.0]]).repeat(10, axis=0)
    >>> suspicion(Matrix(shares), np.arange(20), shares.sum(1), "count", True)
    'all cells have about the same total (100), as after normalisation'
    """
    if kind == "nonnegative" or len(rows) < 10 or (kind == "count" and not sized):
        return None
    some = matrix[rows[:: 1 + len(rows) // 200]]
    blocks = [some.data[a:b] for a, b in pairwise(some.indptr)] if _is_sparse(some) else list(some)
    values = [np.asarray(block)[np.asarray(block) != 0] for block in blocks]
    if kind == "real":
        everything = np.concatenate(values)
        whole = len(everything) and everything.min() > 0 and everything.max() > 1 and (everything % 1 == 0).all()
        return "all values are whole numbers from 0, like counts" if whole else None
    mean = float(totals.mean())
    if mean >= 100 and totals.std() < 0.01 * mean:
        return f"all cells have about the same total ({mean:.4g}), as after normalisation"
    judged = [v for v in values if len(v) >= 10]
    if judged and np.mean([v.min() > 1 and (v % v.min() == 0).all() for v in judged]) > 0.9:
        return "all values of a cell are multiples of its smallest, as after normalisation"
    return None


def _check_indices(matrix: Any) -> None:
    """Refuse a damaged sparse matrix, which scipy would read beyond its end."""
    if matrix.format not in ("csr", "csc"):
        return
    length, width = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    pointers, indices = matrix.indptr, matrix.indices
    fits = len(pointers) == length + 1 and pointers[0] == 0 and pointers[-1] <= len(indices) == len(matrix.data)
    if not (fits and (np.diff(pointers) >= 0).all()):
        raise ValueError("a sparse matrix is damaged: its indptr does not fit its shape and its data")
    if len(indices) and not (0 <= indices.min() and indices.max() < width):
        raise ValueError(
            f"a sparse matrix is damaged: its indices run from {indices.min()} to {indices.max()}, and it has {width} "
            f"{'columns' if matrix.format == 'csr' else 'rows'}"
        )


def _fine(values: np.ndarray, kind: str) -> bool:
    """Whether all values are accepted."""
    if values.size == 0:
        return True
    low, high = values.min(), values.max()  # NaN if any value is
    if not (np.isfinite(low) and np.isfinite(high)) or (kind != "real" and low < 0):
        return False
    if max(-low, high) > LARGEST[kind]:
        return False
    if kind != "count" or values.dtype.kind != "f":
        return True
    parts = np.array_split(values.ravel(), 1 + values.size // 65_536)  # each stays in the processor's cache
    return all((part == np.floor(part)).all() for part in parts)


def _refuse(block: Any, kind: str, name: str, cells: pd.Index, features: pd.Index) -> None:
    """Say which value is not accepted."""
    values = block.data if _is_sparse(block) else block
    bad = ~np.isfinite(values)
    problem, accepted = "is not a finite number", "finite numbers"
    if kind != "real" and not bad.any():
        bad, problem, accepted = values < 0, "is negative", "values from 0 upwards"
    if kind == "count" and not bad.any():
        bad, problem = values != np.floor(values), "is not a whole number"
        accepted = "raw counts; name the layer that holds them, or set allow_non_integer=True in its ModalitySpec"
    if not bad.any():
        bad, problem, accepted = abs(values) > LARGEST[kind], "is too large", f"values up to {LARGEST[kind]:.4g}"
    first = int(np.flatnonzero(bad)[0])
    if _is_sparse(block):
        row, column = int(np.searchsorted(block.indptr, first, side="right")) - 1, block.indices[first]
    else:
        row, column = divmod(first, block.shape[1])
    raise ValueError(
        f"modality {name!r}: the value {values.ravel()[first]} of feature {features[column]!r} in cell "
        f"{cells[row]!r} {problem}; accepted: {accepted}"
    )
