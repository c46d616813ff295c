"""Checkpoints: all that a training run is made of, in one file of tensors and plain values.

A file is a line that names its form, a line with the SHA-256 digest of all that follows, and a safetensors file. One of
its tensors holds the text (JSON) of the plain values, in which the others stand by their names. Reading runs nothing.
"""

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pyromosaic.train.files import clear_drafts, n_entries, replaced, shapes, size_of

FORM = b"pyromosaic checkpoint 1\n"
NEWEST, BEFORE = "last.ckpt", "previous.ckpt"
TEXT = "text"
MINUTE = 60.0


class Packed:
    """A copy of a checkpoint on the host, as it will be written.

    Parameters
    ----------
    content
        Dictionaries, lists and tuples of tensors, numbers, strings and None.

    Raises
    ------
    TypeError
        If there is anything else in it.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Packed({"step": 3, "rates": (0.1, torch.ones(2))}).write(Path(folder, "a.ckpt"))
    ...     read(Path(folder, "a.ckpt"))
    {'step': 3, 'rates': (0.1, tensor([1., 1.]))}
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        text = json.dumps(self._plain(content)).encode()
        self.tensors[TEXT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.numel() == 0:  # which old versions of safetensors cannot read
                return {"empty": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
            name = str(len(self.tensors))
            self.tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"items": [[self._plain(k), self._plain(v)] for k, v in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self._plain(v) for v in value]}
        if isinstance(value, list):
            return [self._plain(v) for v in value]
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(
            f"a checkpoint holds tensors, numbers, strings, lists and dictionaries alone; found {type(value).__name__} "
            "in the state of the run, of a callback or a schedule"
        )

    def write(self, path: Path) -> None:
        """Put it in its place, whole or not at all."""
        content = save(self.tensors)
        replaced({path: b"".join((FORM, sha256(content).hexdigest().encode(), b"\n", content))})


def read(path: Path, limit: int = 1 << 40, entries: int = 1 << 40) -> Any:
    """What a checkpoint holds.

    Parameters
    ----------
    path
        The file.
    limit
        Largest size in bytes.
    entries
        Largest number of plain values.

    Raises
    ------
    ValueError
        If it is not there, not a checkpoint, or damaged.
    """
    try:
        size = size_of(path, limit)
        with open(path, "rb") as file:
            if file.read(len(FORM)) != FORM:
                raise ValueError(
                    "it is not of the form that this version of pyromosaic writes, and nothing else is read"
                )
            shapes(path, len(FORM) + 65, limit)
            digest, content = file.readline(65).strip().decode("ascii", "replace"), file.read(size)
        if sha256(content).hexdigest() != digest:
            raise ValueError("it is not as it was written: cut off or damaged")
        tensors = load(content)
        text = tensors[TEXT].numpy().tobytes()
        if n_entries(text) > entries:
            raise ValueError(f"it has {n_entries(text):,} values, where at most {entries:,} are expected")
        return _unpacked(json.loads(text), tensors)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path} cannot be taken as a checkpoint: {reason}") from error


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "empty":
        shape, dtype = held
        if 0 not in shape:
            raise ValueError(f"a tensor of shape {shape} is not empty")
        return torch.zeros(shape, dtype=getattr(torch, dtype))
    values = [_unpacked(v, tensors) for v in held]
    return tuple(values) if kind == "tuple" else dict(values)


def newest(source: str | os.PathLike[str], limit: int = 1 << 40, entries: int = 1 << 40) -> tuple[Path, Any]:
    """A checkpoint and what it holds: of a file, or the newest whole one of a folder.

    Parameters
    ----------
    source
        File or folder.
    limit, entries
        As in `read`.

    Raises
    ------
    ValueError
        If there is none.

    Warns
    -----
    UserWarning
        If the newest of a folder is damaged and the one before is taken.
    """
    if "://" in str(source):
        raise ValueError(f"a checkpoint is a file or a folder on this machine; found the address {source}")
    path = Path(source).absolute()
    if not path.is_dir():
        return path, read(path, limit, entries)
    refused = []
    for file in (path / NEWEST, path / BEFORE):
        if file.exists():
            try:
                content = read(file, limit, entries)
            except ValueError as error:
                refused.append(str(error))
            else:
                if refused:
                    warnings.warn(f"{refused[0]}; {file} is taken", stacklevel=2)
                return file, content
    raise ValueError("; ".join(refused) or f"{path} holds no checkpoint ({NEWEST})")


class Files(TorchCheckpointIO):
    """Lightning's checkpoints in our form, whatever Lightning's version.

    Parameters
    ----------
    taken
        A checkpoint that has been read, and where.
    """

    def __init__(self, taken: tuple[Path, Any] | None = None) -> None:
        self.taken = taken
        self.hold = False
        self.packed: Packed | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Pack and, unless told to hold, write."""
        self.packed = Packed(checkpoint)
        if not self.hold:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.packed.write(Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What a checkpoint holds, on the host."""
        if self.taken is not None and Path(path) == self.taken[0]:
            content: dict[str, Any] = self.taken[1]
            self.taken = None  # may be let go
            return content
        return newest(path)[1]


class Keeper(Checkpoint):
    """Writes ``last.ckpt`` at the end of epochs, and keeps the one before as ``previous.ckpt``.

    An epoch's checkpoint is written at once, therefore a kill costs at most the epoch under way. Only once writing has
    taken more than a minute in all, and longer than training, does a checkpoint wait until it has not, for a minute at
    most; a kill then costs the epochs of that time. A checkpoint that waits is written if training is left.

    Parameters
    ----------
    folder
        Where to.
    files
        Lightning's way to them.
    goes_on
        Whether the checkpoint that is there belongs to this run.

    Raises
    ------
    OSError
        If the folder cannot be written into.
    """

    monitor = "epoch"  # such callbacks are called behind the plan's own end of an epoch, checkpoints last of all

    def __init__(self, folder: str | os.PathLike[str], files: Files, goes_on: bool) -> None:
        self.path, self.files, self.goes_on = Path(folder).absolute() / NEWEST, files, goes_on
        self.waiting = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clear_drafts(self.path)
            trial = self.path.with_name(f".{NEWEST}.trial.part")
            replaced({trial: b""})
            trial.unlink(missing_ok=True)  # another process of the run tries it too
        except OSError as error:
            raise OSError(f"checkpoints cannot be written into {folder}: {error.strerror}") from error
        if self.path.exists() and not goes_on:
            warnings.warn(
                f"{self.path} is of an earlier run and is replaced after the first epoch of this one; resume_from goes "
                "on from it",
                stacklevel=3,
            )

    def on_train_start(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Count the time that training and writing take."""
        self.began = self.ended = monotonic()
        self.spent = 0.0

    def on_train_epoch_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Take the state of the run, and write it if it is time."""
        self.files.hold = True
        trainer.save_checkpoint(self.path)
        self.files.hold = False
        self.waiting = True
        now = monotonic()
        if self.spent <= max(MINUTE, now - self.began - self.spent) or now - self.ended >= MINUTE:
            self._write()

    def _write(self) -> None:
        if not self.waiting or self.files.packed is None:
            return
        began, before = monotonic(), self.path.with_name(BEFORE)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.goes_on and self.path.exists():
                spare = self.path.with_name(f".{NEWEST}.spare.part")
                with suppress(OSError):  # on file systems without links the one before is not kept
                    spare.unlink(missing_ok=True)
                    os.link(self.path, spare)
                    os.replace(spare, before)
                    spare.unlink(missing_ok=True)  # a file is not moved onto another name of itself
            self.files.packed.write(self.path)
            if not self.goes_on:
                before.unlink(missing_ok=True)  # of an earlier run
            self.goes_on, self.waiting = True, False
        except OSError as error:
            warnings.warn(
                f"{self.path} could not be written ({error.strerror}); the one before stays, and training goes on",
                stacklevel=2,
            )
        self.ended = monotonic()
        self.spent += self.ended - began

    def on_train_end(self, trainer: lightning.Trainer, plan: lightning.LightningModule) -> None:
        """Write the last epoch's."""
        self._write()

    def on_exception(self, trainer: lightning.Trainer, plan: lightning.LightningModule, error: BaseException) -> None:
        """Write the last whole epoch's."""
        self._write()


def check_state(state: Any, own: Mapping[str, Tensor], of: str) -> None:
    """Refuse tensors that are not those of a program, by name, shape and type, or not finite.

    A value may be infinite where the program's own, not yet fitted, is.

    Parameters
    ----------
    state
        What was read.
    own
        The program's own, by name.
    of
        What it was read from.

    Raises
    ------
    ValueError
        With the first tensor that is not right.

    Examples
    --------
    >>> check_state({"a": torch.ones(2)}, {"a": torch.zeros(3)}, "the file")
    Traceback (most recent call last):
        ...
    ValueError: the file does not fit this model: 'a' has shape (2,), expected (3,)
    """
    wrong = f"{of} does not fit this model"
    if not isinstance(state, Mapping):
        raise ValueError(f"{wrong}: no tensors by name")
    for kind, names in (("missing", own.keys() - state.keys()), ("not of the model", state.keys() - own.keys())):
        if names:
            raise ValueError(f"{wrong}: {', '.join(sorted(map(repr, names))[:3])} of {len(names)} {kind}")
    for name, value in state.items():
        expected = own[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{wrong}: {name!r} is no tensor")
        if value.shape != expected.shape and expected.numel():  # an empty one grows with the cells
            raise ValueError(f"{wrong}: {name!r} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
        if value.dtype != expected.dtype and not (value.is_floating_point() and expected.is_floating_point()):
            raise ValueError(f"{wrong}: {name!r} is of type {value.dtype}, expected {expected.dtype}")
        if value.is_meta:  # it has no values yet
            continue
        unbounded = torch.isinf(expected).any()
        if torch.isnan(value).any() or (torch.isinf(value).any() and not unbounded):
            raise ValueError(f"{wrong}: {name!r} has values that are not finite")
