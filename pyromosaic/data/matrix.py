"""Matrices of cells × features, in memory or in files: reading by rows, and checking of values."""

import pickle
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from pyromosaic.data.chromatin import fragments
from pyromosaic.data.disk import Disk, check_whole

T = TypeVar("T")
CHUNK = 4096  # rows read at once in a pass over all cells
DENSE_ABOVE = 0.3  # share of non-zero entries above which minibatches are dense tensors


def _is_sparse(matrix: Any) -> bool:
    return sparse.issparse(matrix)


def is_readable(source: Any) -> bool:
    """Whether rows of the source can be read as NumPy or scipy arrays, without a mask."""
    if isinstance(source, np.ma.MaskedArray):
        return False
    if not (_is_sparse(source) or isinstance(source, np.ndarray)):
        source = source[:1] if hasattr(source, "shape") else None
    return _is_sparse(source) or isinstance(source, np.ndarray)


class Matrix:
    """The measurements of one modality, read by rows and never copied as a whole.

    Parameters
    ----------
    source
        Cells × features: a scipy sparse matrix or array, a NumPy array, or the `X` of a backed `anndata.AnnData`
        (sparse or dense). A CSC matrix in memory is copied to CSR, because it cannot be read by rows fast.
    columns
        Columns to use, in this order, -1 for a feature that the source does not have (it is read as 0); None for all.
    cut_sites
        Whether the values are cut sites, which are read as `fragments`.
    """

    def __init__(self, source: Any, columns: np.ndarray | None = None, cut_sites: bool = False) -> None:
        plain = _is_sparse(source) or isinstance(source, np.ndarray)
        self.in_memory = plain or getattr(source, "in_memory", False)
        self.is_sparse = _is_sparse(source) or (not plain and hasattr(source, "format"))
        self.has_holes = False  # whether NaN means "not measured" and is read as 0
        if _is_sparse(source):
            _check_indices(source)
            source = source.tocsr()
        if columns is not None and plain:
            source, columns = _picked(source, columns), None
        self.source, self.columns, self.cut_sites = source, columns, cut_sites
        self.shape: tuple[int, int] = (source.shape[0], source.shape[1] if columns is None else len(columns))
        self.file = "" if self.in_memory else _file_of(source)
        if not self.in_memory:
            self.disk = self._of_file(lambda: Disk(source))
        self.marks: np.ndarray | None = None  # weighted sums of the rows, from `check_values`

    def __getstate__(self) -> dict[str, Any]:
        """What pickle keeps: the measurements too, unless they are in a file that it cannot take."""
        if not self.in_memory:
            try:
                pickle.dumps(self.source)
            except TypeError as error:
                raise TypeError(
                    f"the measurements are in a file, which pickle cannot take ({error}); read them into memory first "
                    "(`to_memory()`), or keep the model by `save`, without its data"
                ) from None
        return vars(self)

    def __getitem__(self, rows: np.ndarray) -> Any:
        """Rows in the given order: a CSR matrix if the source is sparse, or else a NumPy array; True becomes 1."""
        block = self.raw(rows)
        if self.has_holes and not _is_sparse(block):
            block = np.nan_to_num(np.asarray(block), nan=0.0, posinf=np.inf, neginf=-np.inf)
        elif self.has_holes:
            block = block.copy()
            block.data[np.isnan(block.data)] = 0
            block.eliminate_zeros()
        block = block.astype(np.float32) if block.dtype == bool else block
        return fragments(block) if self.cut_sites else block

    def raw(self, rows: np.ndarray) -> Any:
        """Rows as they are in the source."""
        if self.in_memory:
            return self.source[rows] if self.columns is None else _picked(self.source[rows], self.columns)
        block = self._of_file(lambda: self.disk[rows])
        return block if self.columns is None else _picked(block, self.columns)

    def hold(self, rows: np.ndarray) -> None:
        """Keep these rows in memory until others are asked for; does nothing if all are in memory."""
        if not self.in_memory:
            self._of_file(lambda: self.disk.hold(rows))

    def _of_file(self, read: Callable[[], T]) -> T:
        try:
            check_whole(self.file)
            return read()
        except Exception as error:  # whatever HDF5, zarr and their filters say of a file that is damaged or gone
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise OSError(
                f"measurements cannot be read from {self.file} ({said}); it may be damaged, or its disk or network "
                "share is not there: restore the file and open it again"
            ) from error

    def tensor(self, rows: np.ndarray, dense: bool) -> torch.Tensor:
        """Rows as a float32 tensor, see `as_tensor`."""
        return as_tensor(self[rows], dense)

    def changed(self, rows: np.ndarray, block: Any) -> np.ndarray:
        """Positions in a block of the rows that have changed since `check_values` read them."""
        if self.marks is None:
            return np.empty(0, dtype=np.intp)
        registered = self.marks[rows]
        return np.flatnonzero(~np.isclose(marks(block), registered, rtol=1e-9, atol=1e-7))


def _picked(block: Any, columns: np.ndarray) -> Any:
    """Columns of a block in this order; zeros for -1."""
    if (columns >= 0).all():
        return block[:, columns]
    has = np.flatnonzero(columns >= 0)
    found, shape = block[:, columns[has]], (block.shape[0], len(columns))
    if _is_sparse(found):
        found = found.tocsr()
        return sparse.csr_matrix((found.data, has[found.indices], found.indptr), shape=shape)
    wide = np.zeros(shape, dtype=found.dtype)
    wide[:, has] = found
    return wide


class Stacked:
    """The measurements of several tables of cells, one below the other, read by rows.

    Parameters
    ----------
    parts
        The tables, all with the same features; see the argument `columns` of `Matrix`.
    """

    def __init__(self, parts: Sequence["Matrix"]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([part.shape[0] for part in parts])
        self.shape = (int(self.ends[-1]), parts[0].shape[1])
        self.dtype = np.result_type(*(part.source.dtype for part in parts))
        self.in_memory = all(part.in_memory for part in parts)
        if any(part.is_sparse for part in parts):
            self.format = "csr"

    def __getitem__(self, rows: np.ndarray | slice) -> Any:
        """Rows in the given order: a CSR matrix if any part is sparse, or else a NumPy array."""
        rows = np.arange(self.shape[0])[rows]
        owner = np.searchsorted(self.ends, rows, side="right")
        starts, order = np.append(0, self.ends), np.argsort(owner, kind="stable")
        blocks = [self.parts[i].raw(rows[owner == i] - starts[i]) for i in np.unique(owner)]
        back = np.argsort(order, kind="stable")
        if hasattr(self, "format") and blocks:
            return sparse.vstack([sparse.csr_matrix(b) for b in blocks], format="csr", dtype=self.dtype)[back]
        return np.concatenate([np.zeros((0, self.shape[1]), self.dtype), *blocks])[back]

    @property
    def store(self) -> str:
        """Names of the files, for messages."""
        return ", ".join(dict.fromkeys(part.file for part in self.parts if part.file))


def _file_of(source: Any) -> str:
    """Name of the file, or folder, of a backed matrix."""
    kept_in = getattr(source, "group", source)  # of a sparse matrix
    if hasattr(kept_in, "file"):  # HDF5
        return str(kept_in.file.filename)
    store = getattr(kept_in, "store", "the file")  # zarr
    return str(getattr(store, "root", store))


def as_tensor(block: Any, dense: bool) -> torch.Tensor:
    """A block of rows as a float32 tensor: strided if `dense`, or else a coalesced sparse COO tensor."""
    if not _is_sparse(block):
        return torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))
    if dense:
        return torch.from_numpy(block.toarray().astype(np.float32, copy=False))
    block.sum_duplicates()  # also sorts; does nothing if this was done before
    cells = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    indices = torch.from_numpy(np.stack([cells, block.indices.astype(np.int64)]))
    values = torch.from_numpy(block.data.astype(np.float32, copy=False))
    return torch.sparse_coo_tensor(indices, values, block.shape, is_coalesced=True, check_invariants=False)


def row_totals(block: Any) -> np.ndarray:
    """Sum of each row of a block."""
    return np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()


@lru_cache(maxsize=8)
def _weights(n_features: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, n_features)


def marks(block: Any) -> np.ndarray:
    """Sum of each row of a block with a weight for each column, which depends on the order of the values."""
    weights = _weights(block.shape[1])
    if _is_sparse(block):
        return np.asarray(block @ weights)
    parts = np.array_split(block, 1 + len(block) // 256)  # only few rows at a time are in double precision
    return np.concatenate([part @ weights for part in parts])


class Summary(NamedTuple):
    """Result of a pass over the data.

    Parameters
    ----------
    totals
        Sum of each row.
    empty
        Whether all values of a row are 0.
    density
        Share of non-zero entries.
    detected
        Number of non-zero entries, shape (groups of rows, features).
    """

    totals: np.ndarray
    empty: np.ndarray
    density: float
    detected: np.ndarray


class MissingValues(ValueError):
    """Some values are NaN; the message names the first."""


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
    """Refuse values that the likelihood cannot produce, in one pass over the data that also marks the rows.

    Parameters
    ----------
    matrix
        The measurements.
    rows
        Rows to check.
    kind
        ``"count"`` (whole numbers from 0), ``"nonnegative"`` or ``"real"``.
    name
        Name of the modality, for the message.
    cells, features
        Names of these rows and of the columns, for the message.
    groups
        Group number of each row, for `Summary.detected`; None for one group.
    n_groups
        Number of groups.

    Raises
    ------
    MissingValues
        If a value is NaN.
    ValueError
        If a value is infinite, negative (``"count"``, ``"nonnegative"``) or not whole (``"count"``). The message
        names the cell and feature of the first such value.
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


#: Largest value of each kind: counts must be exact in float32, and the squares of other values finite.
LARGEST = {"count": 2.0**24, "nonnegative": 1e15, "real": 1e15}


def suspicion(matrix: Matrix, rows: np.ndarray, totals: np.ndarray, kind: str, sized: bool) -> str | None:
    """Why values look normalised, or like counts, although their kind is accepted; None if they do not.

    All totals, and the values of up to 200 cells, are examined.

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
    """Refuse a damaged sparse matrix, for which scipy would read beyond the end of the memory."""
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
    if max(-float(low), float(high)) > LARGEST[kind]:  # unsigned numbers have no negative
        return False
    if kind != "count" or values.dtype.kind != "f":
        return True
    parts = np.array_split(values.ravel(), 1 + values.size // 65_536)  # each part stays in the processor's cache
    return all((part == np.floor(part)).all() for part in parts)


def _refuse(block: Any, kind: str, name: str, cells: pd.Index, features: pd.Index) -> None:
    """Raise the error for the first value that is not accepted."""
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
    kind_of = MissingValues if np.isnan(values.ravel()[first]) else ValueError
    if _is_sparse(block):
        row, column = int(np.searchsorted(block.indptr, first, side="right")) - 1, block.indices[first]
    else:
        row, column = divmod(first, block.shape[1])
    raise kind_of(
        f"modality {name!r}: the value {values.ravel()[first]} of feature {features[column]!r} in cell "
        f"{cells[row]!r} {problem}; accepted: {accepted}"
    )
