"""A run of the command line: quiet, with a bar for each long phase, and left by nothing without its model."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING, Any

import typer

from pyromosaic.cli.outputs import checkpoints_in, reason

if TYPE_CHECKING:
    from pyromosaic.cli.options import Training
    from pyromosaic.models import MosaicModel


@contextmanager
def sentence(exit_code: int, *errors: type[Exception]) -> Iterator[None]:
    """Print an error as one sentence, and stop."""
    try:
        yield
    except errors as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(exit_code) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Hide remarks of libraries, show our warnings as sentences, and keep MuData's tables as they are in the file."""
    import anndata
    import lightning.pytorch

    from pyromosaic.data.tables import kept_apart

    logger = logging.getLogger(lightning.pytorch.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # anndata before 0.13 reads the names in files of 0.13 but writes them only if it is told to.
        strings = anndata.settings.override(allow_write_nullable_strings=True)
        with warnings.catch_warnings(), kept_apart(), strings:
            warnings.filterwarnings("ignore", module="mudata|anndata|lightning|umap|numba|sklearn")
            warnings.filterwarnings("ignore", message="The HDF5 file was not created by muon")
            warnings.filterwarnings("ignore", message="Variable names are not unique")  # a gene and an antibody
            warnings.filterwarnings("ignore", message=".* is of an earlier run and is replaced")  # by --overwrite
            warnings.formatwarning = _as_sentence
            yield
    finally:
        logger.setLevel(level)


def _as_sentence(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
    return f"warning: {message}\n" if category is UserWarning else f"{category.__name__}: {message}\n"


def device_of(name: str, n_wanted: int | str | None = None) -> str:
    """The device to compute on; refuses one that is not there, and more GPUs than there are."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    elif name == "gpu":
        name = "mps" if there["mps"] else "cuda"
    n_there = torch.cuda.device_count()
    if name == "cuda" and there[name] and isinstance(n_wanted, int) and n_wanted > n_there:
        raise ValueError(f"--devices {n_wanted}: PyTorch finds {n_there} NVIDIA GPU{'s' * (n_there > 1)} here")
    if not there[name]:
        found = ", ".join(device for device, is_there in there.items() if is_there)
        raise ValueError(f"--device {name}: PyTorch finds no such device here; there is {found}")
    return name


def n_epochs_of(epochs: int | str | None) -> int | None:
    """The number of epochs that was given; None if the model is to choose it."""
    return epochs if isinstance(epochs, int) else None


def train(keep: "Kept", options: "Training", device: str) -> None:
    """Train the model with one progress bar for the whole run."""
    from pyromosaic.train.processes import Processes

    assert keep.model is not None
    folder = options.checkpoints
    resume_from = folder if options.resume and folder is not None and checkpoints_in(folder) else None
    if options.resume and resume_from is None:
        typer.echo(f"there is no checkpoint in {folder}; training begins", err=True)
    named = ("batch_size", "devices", "num_nodes", "strategy")
    given = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    n = Processes({"accelerator": device} | given).n
    keep.alone = n == 1
    if n > 1 and Processes({}).n == 1:  # for training alone, so that data are read and written once
        given.setdefault("strategy", "ddp_spawn")
    keep.model.train(
        n_epochs_of(options.epochs),
        seed=options.seed,
        checkpoint_dir=folder,
        resume_from=resume_from,
        accelerator=device,
        **{name: value.value if isinstance(value, Enum) else value for name, value in given.items()},
    )
    keep.model.to(device)


def leads() -> bool:
    """Whether this process is alone, or the first of several that torchrun, SLURM or Lightning has started."""
    from pyromosaic.train.processes import Processes

    return Processes({}).leads


@contextmanager
def phase(task: str, n_cells: int) -> Iterator[None]:
    """A bar over the cells that methods of a model go through."""
    from pyromosaic.progress import Bar, watched

    with Bar(task, n_cells) as bar, watched(bar.advance):
        yield
        bar.advance(bar.total - bar.done)


@dataclass
class Kept:
    """What is kept of a run that is left before its outputs are there: the model beside the result."""

    out: Path
    checkpoints: Path | None = None
    model: "MosaicModel | None" = None
    n_epochs: int | None = None
    alone: bool = True  # of several processes that train, none keeps what is not complete


@contextmanager
def orderly(keep: Kept) -> Iterator[None]:
    """However a run is left before its outputs are there, keep the model if it is trained, and say where.

    Ctrl-C ends the process with exit code 130, SIGTERM with 143, a fault of the computer or the training with 1. Faults
    of the package are shown as they are.
    """
    from pyromosaic.train import NonFiniteLossError

    terminated = False

    def terminate(*_: Any) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # SIGTERM ends the run as Ctrl-C does, with its own exit code

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except typer.Exit:
        raise
    except (KeyboardInterrupt, Exception) as error:
        done = 0 if keep.model is None else len(keep.model.history)
        if not isinstance(error, KeyboardInterrupt):
            text = f"error: {reason(error)}"
        elif keep.model is None or not (done or keep.alone):
            text = "interrupted; nothing was written"
        elif done:
            text = f"interrupted after {done}{'' if keep.n_epochs is None else f' of {keep.n_epochs}'} epochs"
        else:
            text = "interrupted before the first epoch was complete"
        if done:
            text += f". {_keep(keep)}"
        if keep.checkpoints is not None and checkpoints_in(keep.checkpoints):
            text += f". To go on from {keep.checkpoints}, run the same command with --resume"
        typer.echo(text, err=True)
        if not isinstance(error, (KeyboardInterrupt, NonFiniteLossError, OSError, MemoryError)):
            raise
        code = 1 if isinstance(error, Exception) else 128 + (signal.SIGTERM if terminated else signal.SIGINT)
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(keep: Kept) -> str:
    """Save a model beside an output, or where there is room, and say where."""
    assert keep.model is not None
    problems = []
    for place in dict.fromkeys((keep.out.parent, Path(), Path(gettempdir()))):
        try:
            place.mkdir(parents=True, exist_ok=True)
            folder = place / Path(mkdtemp(prefix=f"{keep.out.stem}-model-", dir=place)).name
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
            continue
        try:
            keep.model.save(folder)
        except OSError as error:
            folder.rmdir()
            problems.append(f"{place}: {str(error).rpartition(': ')[2]}")
        else:
            done = len(keep.model.history)
            return f"The model, trained for {done} epoch{'' if done == 1 else 's'}, is in {folder}"
    return f"The model cannot be kept ({'; '.join(problems)})"
