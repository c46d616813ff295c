"""Outputs of the command line: checked before training, and whole or not there."""

import atexit
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, TemporaryFile
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from zlib import compress

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

RECORD = "pyromosaic"  # in uns, of a result
SUFFIXES = {
    "out": (".h5mu",),
    "figure": (".png", ".pdf", ".svg"),
    "metrics": (".json",),
    "effects": (".csv",),
    "table": (".csv",),
}
WRITING = (OSError, RuntimeError, TypeError, ValueError, KeyError)  # what anndata raises if it cannot write a value
HDF5_FAILED = "file write failed"


def check_outputs(data: Path, outputs: Mapping[str, Path | None], overwrite: bool) -> None:
    """Refuse outputs that could not be written at the end, before anything is computed.

    Parameters
    ----------
    data
        The input.
    outputs
        The outputs by the names of their options.
    overwrite
        Whether they may exist.
    """
    taken = {data.resolve()}
    for option, path in outputs.items():
        if path is None:
            continue
        suffixes = SUFFIXES.get(option, ())
        if suffixes and path.suffix not in suffixes:
            raise ValueError(f"--{option} needs a file that ends in {' or '.join(suffixes)}; found {path}")
        if path.resolve() in taken:
            raise ValueError(f"--{option} {path} is the input or another output; give another name")
        taken.add(path.resolve())
        if path.is_dir() if suffixes else path.is_file():
            raise ValueError(f"--{option} {path} is a {'folder' if suffixes else 'file'}; give another name")
        file = path if suffixes else path / "model.json"
        if file.exists() and not overwrite:
            raise ValueError(f"{path} exists; pass --overwrite to replace it")
        _check_writable(option, file)
    if outputs.get("figure") is not None and not (find_spec("matplotlib") and find_spec("umap")):
        raise ValueError("--figure needs matplotlib and umap-learn; run pip install 'pyromosaic[plot]'")


def check_checkpoints(folder: Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that cannot hold checkpoints, or holds those of another run."""
    if folder is None:
        if resume:
            raise ValueError("--resume needs --checkpoints FOLDER, the folder with the checkpoints of the run")
        return
    if folder.is_file():
        raise ValueError(f"--checkpoints {folder} is a file; give the name of a folder")
    if checkpoints_in(folder) and not (resume or overwrite):
        raise ValueError(
            f"{folder} holds checkpoints of another run; pass --resume to go on with it, or --overwrite to replace them"
        )
    _check_writable("checkpoints", folder / "last.ckpt")


def checkpoints_in(folder: Path) -> bool:
    """Whether there is a run to resume."""
    return any((folder / name).exists() for name in ("last.ckpt", "previous.ckpt"))


def _check_writable(option: str, path: Path) -> None:
    """Refuse a file for which there is no place."""
    try:
        with TemporaryFile(dir=next(p for p in path.resolve().parents if p.exists())):
            pass
    except OSError as error:
        raise ValueError(f"--{option} {path} cannot be written: {error.strerror}") from error


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Temporary name for a file, which is moved to `path` only if all goes well.

    It is beside the file, because only on one file system can a move not be cut in half.
    """
    path = path.resolve()  # of a link, the file
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{escape(path.name)}.*.part"):  # by a kill
        rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        written = Path(folder) / path.name
        yield written
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        written.replace(path)


def add(mdata: "MuData", imputed: "Mapping[str, Sequence[str]]", hidden: "Mapping[str, AnnData]") -> None:
    """Add the tables of imputed modalities, and in obs which modality was hidden from training.

    Parameters
    ----------
    mdata
        The data.
    imputed
        Features of imputed modalities, whose values are written later.
    hidden
        Measurements that were hidden.

    Notes
    -----
    MuData needs names of features that are unique over modalities; otherwise it cannot select features by name.
    Therefore the imputed features have its usual prefix, "rna_imputed:CD4", and their name in column "feature".
    """
    import pandas as pd
    from anndata import AnnData

    if hidden:
        which = {cell: name for name, adata in hidden.items() for cell in adata.obs_names}
        mdata.obs["hidden_modality"] = pd.Categorical([which.get(cell, "none") for cell in mdata.obs_names])
    for name, known in imputed.items():
        features = pd.Index(known)  # in the order of the model
        var = mdata.mod[name].var.loc[features].copy() if name in mdata.mod else pd.DataFrame(index=features)
        var["feature"] = var.index.astype(str)
        var.index = [f"{name}_imputed:{feature}" for feature in var["feature"]]
        mdata.mod[f"{name}_imputed"] = AnnData(obs=pd.DataFrame(index=mdata.obs_names), var=var)
    mdata.update()


def write(mdata: "MuData", path: Path) -> None:
    """Write the result, but for the values of imputed modalities."""
    with growing(path, _size_in_file(mdata)):
        mdata.write(path, compression="gzip")


@contextmanager
def orderly_hdf5() -> Iterator[None]:
    """Where files are written: of a full disk, HDF5 speaks for every object that it holds, and crashes at the end."""
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = _silent
    try:
        yield
    except WRITING as error:
        if HDF5_FAILED in f"{error} {error.__cause__}":
            atexit.register(_leave)
        else:
            sys.excepthook, sys.unraisablehook = hooks
        raise
    sys.excepthook, sys.unraisablehook = hooks


@contextmanager
def growing(path: Path, size: int) -> Iterator[None]:
    """A bar of a file that is being written, as long as it is expected to be."""
    from pyromosaic.progress import Bar

    written = Event()

    def look() -> None:
        while not written.wait(0.5):
            with suppress(OSError):
                bar.advance(min(path.stat().st_size, size - 1) - bar.done)

    with Bar("Writing", size) as bar:
        watcher = Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
            written.set()
            watcher.join()
            bar.advance(size - bar.done)
        finally:
            written.set()
            watcher.join()


def _size_in_file(mdata: "MuData") -> int:
    """About how many bytes the arrays of the data take when they are compressed."""
    import numpy as np

    total = 1.0
    for part in mdata.mod.values():
        for array in [each for each in (part.X, *part.layers.values()) if each is not None]:
            for values in (array.data, array.indices) if hasattr(array, "indices") else (array,):
                some = np.ascontiguousarray(values[: 1 + (1 << 18) // max(1, values[:1].nbytes)])
                share = len(compress(some.tobytes(), 4)) / max(1, some.nbytes)
                total += share * values.nbytes
    return int(total)


def write_more(path: Path, record: Mapping[str, Any], embeddings: "Mapping[str, pd.DataFrame]") -> None:
    """Add to a written result what is known last: the record of the run, and embeddings in obsm."""
    import h5py
    from anndata.io import write_elem

    with h5py.File(path, "r+") as file:
        for name, table in embeddings.items():
            write_elem(file["obsm"], name, table.to_numpy("float32"))
        write_elem(file["uns"], RECORD, dict(record))


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write options and metrics as JSON; a metric that is not defined is null."""
    metrics = {name: value if math.isfinite(value) else None for name, value in record["metrics"].items()}
    path.write_text(json.dumps({**record, "metrics": metrics}, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _silent(*_: Any) -> None:
    """Say nothing."""


def _leave() -> None:
    """End the process as one that failed, without HDF5's last words."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def named(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Say which file cannot be written, if one of these errors, by default any of writing, is raised."""
    try:
        yield
    except WRITING as error:
        if errors and not isinstance(error, errors):
            raise
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of what an exception says; of HDF5's, what the system said."""
    if HDF5_FAILED in str(error):
        return str(error).partition("error message = '")[2].partition("'")[0] or HDF5_FAILED
    return next(iter(str(error).splitlines()), type(error).__name__)
