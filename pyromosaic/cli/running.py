"""A run of the command line: quiet, with one progress bar, and left by no signal or error without its model."""

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING, Any

import typer

from pyromosaic.cli.outputs import checkpoints_in, reason

if TYPE_CHECKING:
    from pyromosaic.models import MultiVI


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
    """Hide remarks of libraries, and keep MuData's tables as they are in the file."""
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
            warnings.filterwarnings("ignore", message=".* is of an earlier run and is replaced")  # by --overwrite
            yield
    finally:
        logger.setLevel(level)


def train(
    multivi: "MultiVI", epochs: int, batch_size: int, seed: int, checkpoints: Path | None = None, resume: bool = False
) -> None:
    """Train with one progress bar over all epochs."""
    from lightning.pytorch import Callback
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    resume_from = checkpoints if resume and checkpoints is not None and checkpoints_in(checkpoints) else None
    if resume and resume_from is None:
        typer.echo(f"there is no checkpoint in {checkpoints}; training begins", err=True)
    words, epoch = TextColumn("{task.description}"), TextColumn("epochs")
    columns = (words, BarColumn(), MofNCompleteColumn(), epoch, TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("Training", total=epochs)

        class Advance(Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                progress.update(task, completed=trainer.current_epoch)

            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                progress.advance(task)

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                progress.update(task, description="Training: widths of posteriors")

        multivi.train(
            epochs,
            batch_size=batch_size,
            seed=seed,
            checkpoint_dir=checkpoints,
            resume_from=resume_from,
            progress_bar=False,
            callbacks=[Advance()],
            devices=1,  # on several, Lightning would start this command once for each
        )
        done = len(multivi.history)
        progress.update(task, completed=done, description="Training")  # also of a run with nothing left to train


@contextmanager
def kept(
    multivi: "MultiVI", epochs: int, out: Path, checkpoints: Path | None, *errors: type[Exception]
) -> Iterator[None]:
    """However the run is left before its outputs are there, keep the model and say where.

    Parameters
    ----------
    multivi
        The model.
    epochs
        Length of the run.
    out
        The result; the model is kept beside it, or where there is room.
    checkpoints
        Folder with checkpoints of the run, if any.
    *errors
        What is said in a sentence; other exceptions are shown as they are.
    """
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
        done = len(multivi.history)
        if isinstance(error, KeyboardInterrupt):
            text = (
                f"interrupted {f'after {done} of {epochs} epochs' if done else 'before the first epoch was complete'}"
            )
        else:
            text = f"error: {reason(error)}"
        if done:
            text += f". {_keep(multivi, out)}"
        if checkpoints is not None and checkpoints_in(checkpoints):
            text += f". To go on from {checkpoints}, run the same command with --resume"
        typer.echo(text, err=True)
        if not isinstance(error, (KeyboardInterrupt, *errors)):
            raise
        code = 1 if isinstance(error, Exception) else 128 + (signal.SIGTERM if terminated else signal.SIGINT)
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep(multivi: "MultiVI", out: Path) -> str:
    """Save a model beside an output, or where there is room, and say where."""
    problems = []
    for place in dict.fromkeys((out.parent, Path(), Path(gettempdir()))):
        try:
            place.mkdir(parents=True, exist_ok=True)
            folder = place / Path(mkdtemp(prefix=f"{out.stem}-model-", dir=place)).name
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
            continue
        try:
            multivi.save(folder)
        except OSError as error:
            folder.rmdir()
            problems.append(f"{place}: {str(error).rpartition(': ')[2]}")
        else:
            done = len(multivi.history)
            return f"The model, trained for {done} epoch{'' if done == 1 else 's'}, is in {folder}"
    return f"The model cannot be kept ({'; '.join(problems)})"
