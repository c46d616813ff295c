"""Results written block by block to AnnData files, so that they need no memory of their own."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pandas as pd

from pyromosaic.data.tables import kept_apart

SUFFIXES = (".h5ad", ".h5mu", ".zarr")
CHUNK = (256, 512)  # cells and features that a file holds together


def check_stored(path: Any) -> Any:
    """The path of a new file, or the group of an open one; a file that cannot be written or is there is refused.

    Raises
    ------
    ValueError
        With the name of the file.

    Examples
    --------
    >>> check_stored("imputed.csv")
    Traceback (most recent call last):
        ...
    ValueError: out must end in .h5ad, .h5mu or .zarr; found imputed.csv
    """
    if hasattr(path, "require_group"):
        return path
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"out must be the path of a file, or a group of an open one; found {path!r}")
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"out must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; found {path}")
    if path.exists():
        raise ValueError(f"out: {path} exists; give another name, or remove it first")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out: there is no folder {path.absolute().parent}; make it first, or give another name")
    return path


@contextmanager
def stored(path: Any, modality: str, obs: pd.DataFrame, var: pd.DataFrame, names: list[str]) -> Iterator[list[Any]]:
    """Arrays in a new file to write to, cells × features; the file is there only if all goes well.

    Parameters
    ----------
    path
        From `check_stored`.
    modality
        Name of the modality in an ``.h5mu``.
    obs, var
        Tables of the cells and features.
    names
        Names of the arrays: the first is ``X``, the others are layers.
    """
    if not isinstance(path, Path):
        yield _arrays(path, (len(obs), len(var)), names)
        return
    folder = Path(mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
    try:
        draft = folder / path.name
        with _opened(draft, modality, obs, var) as group:
            yield _arrays(group, (len(obs), len(var)), names)
        draft.rename(path)
    finally:
        rmtree(folder, ignore_errors=True)


def _arrays(group: Any, shape: tuple[int, int], names: list[str]) -> list[Any]:
    """New arrays of an AnnData in an open file, whose tables must be as long."""
    from anndata.io import read_elem

    tables: list[Any] = [read_elem(group[table]) for table in ("obs", "var")]
    n_cells, n_features = map(len, tables)
    if (n_cells, n_features) != shape:
        raise ValueError(f"out: the tables are of {n_cells} × {n_features}, and the result of {shape[0]} × {shape[1]}")
    layers = group.require_group("layers")
    return [_array(group if i == 0 else layers, "X" if i == 0 else name, shape) for i, name in enumerate(names)]


@contextmanager
def _opened(path: Path, modality: str, obs: pd.DataFrame, var: pd.DataFrame) -> Iterator[Any]:
    """A file with the tables, opened to add arrays."""
    from anndata import AnnData

    empty = AnnData(obs=obs, var=var)
    if path.suffix == ".zarr":
        import zarr

        with warnings.catch_warnings(action="ignore"):  # anndata announces its next format
            empty.write_zarr(path)
        yield zarr.open_group(str(path), mode="r+", use_consolidated=False)
        with warnings.catch_warnings(action="ignore"):  # zarr says that others may not know this
            zarr.consolidate_metadata(str(path))
        return
    import h5py

    if path.suffix == ".h5ad":
        empty.write_h5ad(path)
    else:
        from mudata import MuData

        with kept_apart(), warnings.catch_warnings(action="ignore"):
            MuData({modality: empty}).write(path)
    with h5py.File(path, "r+") as file:
        yield file if path.suffix == ".h5ad" else file["mod"][modality]


def _array(group: Any, name: str, shape: tuple[int, int]) -> Any:
    """A dense array as anndata stores it."""
    if name in group:
        del group[name]
    chunks = tuple(max(1, min(size, most)) for size, most in zip(shape, CHUNK, strict=True))
    make: Any = getattr(group, "create_array", None) or group.create_dataset  # of zarr, and of HDF5
    array = make(name, shape=shape, dtype=np.dtype("float32"), chunks=chunks)
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return array
