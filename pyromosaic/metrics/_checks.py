"""Input checks of the metrics: each returns the array to work with, or raises an error that says what is wrong."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pyromosaic.data.tables import in_order, warn_of_not_known, words

#: Kinds of Python objects, as pandas names them, that are real numbers.
NUMBERS = ("integer", "floating", "mixed-integer-float", "boolean")


def aligned(names: Sequence[str], *tables: Any, axes: Sequence[str] = ("rows", "columns")) -> tuple[Any, ...]:
    """Return tables as arrays, with rows and columns in the order of the first table wherever both have names.

    Pandas objects and AnnData have names; lists and arrays have none and keep their order.
    """
    arranged = []
    for what, table in zip(names, tables, strict=True):
        values = table
        for axis, rows_or_columns in enumerate(("rows", "columns")):
            own, of = _names(table, axis), _names(tables[0], axis)
            if rows_or_columns in axes and own is not None and of is not None and not own.equals(of):
                order = in_order(own, of, f"`{what}`", f"`{names[0]}`")
                rows = values if hasattr(values, "obs_names") else values.iloc
                values = rows[order] if axis == 0 else rows[:, order]
        arranged.append(values.X if hasattr(values, "obs_names") else values)
    return tuple(arranged)


def _without_modality(table: Any) -> Any:
    """Return a table without the modality in its row names, if all names begin or end with the same modality."""
    if isinstance(table, pd.DataFrame) and len(table):
        names = table.index.astype(str)
        head, tail = str(names[0]).partition(":")[0] + ":", ":" + str(names[0]).rpartition(":")[2]
        if names.str.startswith(head).all():
            return table.set_axis(names.str.removeprefix(head))
        if names.str.endswith(tail).all():
            return table.set_axis(names.str.removesuffix(tail))
    return table


def _names(table: Any, axis: int) -> pd.Index | None:
    """Names of a table's rows (0) or columns (1); None if it has none."""
    if hasattr(table, "obs_names"):
        return (table.obs_names, table.var_names)[axis]
    if isinstance(table, pd.DataFrame) or (isinstance(table, pd.Series) and axis == 0):
        return table.axes[axis]
    return None


def as_finite(values: ArrayLike, name: str) -> NDArray[np.floating]:
    """Return a non-empty real array; float32 stays float32, other types become float64."""
    array = np.asarray(values)
    if array.dtype == object and pd.api.types.infer_dtype(array.ravel(), skipna=True) in NUMBERS:
        array = np.where(pd.isna(array), np.nan, array).astype(np.float64)  # columns of pandas that can hold NA
    if array.dtype.kind not in "fiub":
        raise ValueError(f"`{name}` must be real numbers; found dtype {array.dtype}.")
    if array.size == 0:
        raise ValueError(f"`{name}` must have at least one entry; found shape {array.shape}.")
    if array.dtype != np.float32:
        array = array.astype(np.float64, copy=False)
    n_bad = array.size - np.count_nonzero(np.isfinite(array))
    if n_bad:
        raise ValueError(f"`{name}` must be finite; found NaN or infinity in {n_bad} of {array.size} entries.")
    return array


def as_latent(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return latents, cells by dimensions, in double precision so that distances keep their order."""
    latent = as_finite(values, name)
    if latent.ndim != 2:
        raise ValueError(f"`{name}` must be a matrix of cells by dimensions; found shape {latent.shape}.")
    return latent.astype(np.float64, copy=False)


def as_latent_pair(
    x: ArrayLike, y: ArrayLike, names: tuple[str, str] = ("x", "y")
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two sets of latents of one space; refuse the same matrix passed twice."""
    x, y = aligned(names, x, y, axes=("columns",))
    first, second = as_latent(x, names[0]), as_latent(y, names[1])
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` need the same dimensions; found {first.shape[1]} and {second.shape[1]}."
        )
    if np.array_equal(first, second):
        raise ValueError(f"`{names[0]}` and `{names[1]}` are the same matrix; pass the latents of two modalities.")
    return first, second


def as_copies(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two latents of the same cells, row by row."""
    x, y = aligned(("x", "y"), _without_modality(x), _without_modality(y))
    first, second = as_latent_pair(x, y)
    if len(first) != len(second):
        raise ValueError(
            f"`x` and `y` must have the same cells, row by row; found {len(first)} and {len(second)} rows."
        )
    if len(first) < 2:
        raise ValueError("`x` and `y` must have at least 2 cells, whose distances are compared; found 1.")
    return first, second


def as_labels(labels: Any, n_cells: int, name: str) -> NDArray[np.object_]:
    """Return one label per cell as text, none missing; 1, 1.0 and "1" are the same label."""
    array = np.asarray(labels, dtype=object)
    if array.ndim == 2 and array.shape[1] == 1 and isinstance(labels, pd.DataFrame):
        array = array[:, 0]
    if array.shape != (n_cells,):
        raise ValueError(f"`{name}` must have one label for each of {n_cells} cells; found shape {array.shape}.")
    n_missing = np.count_nonzero(pd.isna(array))
    if n_missing:
        raise ValueError(f"`{name}` has no label for {n_missing} of {n_cells} cells; leave out cells without a label.")
    spelled = words(pd.Series(array, dtype=object))
    warn_of_not_known(spelled, f"`{name}`")
    return spelled.to_numpy(dtype=object)


def as_sparse(values: Any, name: str) -> sparse.csr_array:
    """Return a finite matrix, cells by features, dense or sparse, as CSR without stored zeros."""
    if len(np.shape(values)) != 2 or 0 in np.shape(values):
        raise ValueError(f"`{name}` must be a matrix of cells by features; found shape {np.shape(values)}.")
    if hasattr(values, "obs_names"):
        raise ValueError(
            f"`{name}` must be a matrix or a table; found a {type(values).__name__}, pass its X or to_df()"
        )
    if not sparse.issparse(values):
        values = as_finite(values, name)
    matrix = sparse.csr_array(values, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if matrix.nnz:
        matrix.data = as_finite(matrix.data, name)
    return matrix


def named(values: NDArray[Any], table: Any) -> Any:
    """Return values as a table with the names of the given one, if that is a table."""
    return pd.DataFrame(values, table.index, table.columns) if isinstance(table, pd.DataFrame) else values


def as_counts(values: Any, name: str) -> sparse.csr_array:
    """Return a matrix of counts, cells by features, as CSR without stored zeros."""
    matrix = as_sparse(values, name)
    if matrix.nnz and matrix.data.min() < 0:
        raise ValueError(f"`{name}` must not be negative; found {matrix.data.min():g}.")
    return matrix


def check_same_shape(first: Any, second: Any, names: tuple[str, str]) -> None:
    """Refuse two arrays whose entries do not correspond."""
    if first.shape != second.shape:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` must have the same shape; found {first.shape} and {second.shape}."
        )


def check_number(value: int, name: str, most: int, limit: str) -> None:
    """Refuse a number of neighbours, bins, blocks or components that is not a whole number from 1 to `most`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
        raise ValueError(f"`{name}` must be a whole number from 1 to {most} ({limit}); found {value!r}.")
