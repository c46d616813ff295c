"""Outputs of the command line: checked before training, and whole or not there."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from pyromosaic.tasks import Estimate

FIGURES = (".png", ".pdf", ".svg")
WRITING = (OSError, RuntimeError, TypeError, ValueError, KeyError)  # what anndata raises if it cannot write a value
HDF5_FAILED = "file write failed"


def check_outputs(data: Path, out: Path, figure: Path | None, model: Path | None, overwrite: bool) -> None:
    """Refuse outputs that could not be written at the end, before training."""
    taken = {data.resolve()}
    for option, path, suffixes in (("out", out, (".h5mu",)), ("figure", figure, FIGURES), ("model", model, ())):
        if path is None:
            continue
        if suffixes and path.suffix not in suffixes:
            raise ValueError(f"--{option} needs a file that ends in {' or '.join(suffixes)}; found {path}")
        if path.resolve() in taken:
            raise ValueError(f"--{option} {path} is the input or another output; give another name")
        taken.add(path.resolve())
        if path.is_dir() if suffixes else path.is_file():
            raise ValueError(f"--{option} {path} is a {'folder' if suffixes else 'file'}; give another name")
        if (path if suffixes else path / "model.json").exists() and not overwrite:
            raise ValueError(f"{path} exists; pass --overwrite to replace it")
        _check_writable(option, path if suffixes else path / "model.json")
    if figure is not None and not (find_spec("matplotlib") and find_spec("umap")):
        raise ValueError("--figure needs matplotlib and umap-learn; run pip install 'pyromosaic[plot]'")


def check_out(out: Path, overwrite: bool, data: Path = Path(), suffixes: tuple[str, ...] = (".h5mu",)) -> None:
    """Refuse an output that could not be written at the end, before anything is computed."""
    if out.suffix not in suffixes:
        raise ValueError(f"the output must be a file that ends in {' or '.join(suffixes)}; found {out}")
    if out.resolve() == data.resolve():
        raise ValueError(f"the output {out} is the input; give another name")
    if out.is_dir():
        raise ValueError(f"the output {out} is a folder; give another name")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; pass --overwrite to replace it")
    _check_writable("out", out)


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


def add(mdata: "MuData", imputed: "dict[str, Estimate]", hidden: "dict[str, AnnData]") -> None:
    """Add the imputed modalities, and in obs which modality was hidden from training.

    MuData needs names of features that are unique over modalities; otherwise it cannot select features by name.
    Therefore the imputed features have its usual prefix, "rna_imputed:CD4", and their name in column "feature".
    """
    import pandas as pd
    from anndata import AnnData

    if hidden:
        which = {cell: name for name, adata in hidden.items() for cell in adata.obs_names}
        mdata.obs["hidden_modality"] = pd.Categorical([which.get(cell, "none") for cell in mdata.obs_names])
    for name, estimate in imputed.items():
        features = estimate.mean.columns  # in the order of the model
        var = mdata.mod[name].var.loc[features].copy() if name in mdata.mod else pd.DataFrame(index=features)
        var["feature"] = var.index.astype(str)
        var.index = [f"{name}_imputed:{feature}" for feature in var["feature"]]
        mean, sd = (frame.loc[mdata.obs_names].to_numpy("float32") for frame in (estimate.mean, estimate.sd))
        obs = pd.DataFrame(index=mdata.obs_names)
        mdata.mod[f"{name}_imputed"] = AnnData(mean, obs=obs, var=var, layers={"sd": sd})
    mdata.update()


def write(mdata: "MuData", path: Path) -> None:
    """Write the result.

    If a disk is full, HDF5 says so for every object that it holds, and crashes when the process ends.
    """
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = _silent
    try:
        mdata.write(path, compression="gzip")
    except WRITING as error:
        if HDF5_FAILED in str(error):
            atexit.register(_leave)
        else:
            sys.excepthook, sys.unraisablehook = hooks
        raise
    sys.excepthook, sys.unraisablehook = hooks


def _silent(*_: Any) -> None:
    """Say nothing."""


def _leave() -> None:
    """End the process as one that failed, without HDF5's last words."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Say which file cannot be written."""
    try:
        yield
    except WRITING as error:
        raise OSError(f"{path} cannot be written: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first line of what an exception says; of HDF5's, what the system said."""
    if HDF5_FAILED in str(error):
        return str(error).partition("error message = '")[2].partition("'")[0] or HDF5_FAILED
    return next(iter(str(error).splitlines()), type(error).__name__)
