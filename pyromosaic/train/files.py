"""Files that are whole or not there: written beside their place, flushed, renamed; read only if they are files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from uuid import uuid4

import torch
from torch import Tensor

HEADER = 1 << 21  # largest description of tensors, in bytes

#: Names of types in such descriptions.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def replaced(contents: Mapping[Path, bytes]) -> None:
    """Write files of one folder so that at every moment their places hold the old content or the new one.

    Parameters
    ----------
    contents
        What to write where; what is there stays until all is written.

    Raises
    ------
    OSError
        If the disk is full, say; nothing is left of the attempt.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     replaced({Path(folder, "a"): b"old"})
    ...     replaced({Path(folder, "a"): b"new"})
    ...     Path(folder, "a").read_bytes(), len(os.listdir(folder))
    (b'new', 1)
    """
    written = {path.with_name(f".{path.name}.{uuid4().hex}.part"): path for path in contents}  # on its file system
    try:
        for draft, path in written.items():
            with open(draft, "xb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for draft in written:
            draft.unlink(missing_ok=True)
        raise
    for draft, path in written.items():
        os.replace(draft, path)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do some network shares flush them
        pass
    finally:
        os.close(descriptor)


def drafts(path: Path) -> list[Path]:
    """What killed attempts to write this file have left."""
    return sorted(path.parent.glob(f".{path.name}.*.part"))


def clear_drafts(path: Path) -> None:
    """Remove what killed attempts to write this file have left."""
    for draft in drafts(path):
        draft.unlink(missing_ok=True)


def size_of(path: Path, limit: int) -> int:
    """Bytes of a regular file, before it is opened; pipes, devices and larger files are refused.

    Parameters
    ----------
    path
        The file.
    limit
        Largest size in bytes.

    Raises
    ------
    OSError
        If it is not there.
    ValueError
        If it is not a regular file, or too large.

    Examples
    --------
    >>> size_of(Path("/dev/zero"), 100)
    Traceback (most recent call last):
        ...
    ValueError: /dev/zero is not a regular file
    """
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > limit:
        raise ValueError(f"{path} has {status.st_size:,} bytes, where at most {limit:,} are expected")
    return status.st_size


def n_entries(text: bytes) -> int:
    """How many values JSON has, at most, before it is read: each takes time and memory."""
    return 1 + sum(text.count(mark) for mark in (b",", b"[", b"{"))


def shapes(path: Path, start: int = 0, limit: int = 1 << 40) -> dict[str, Tensor]:
    """Names, shapes and types of tensors in a file (safetensors), as tensors without values; only its header is read.

    Parameters
    ----------
    path
        The file.
    start
        Where the tensors begin in it.
    limit
        Largest size of the file in bytes.

    Raises
    ------
    OSError
        If the file is not there.
    ValueError
        If it is not a regular file, is too large, has no such header, or is not as long as the header says.
    """
    size, found, at = size_of(path, limit), {}, 0
    with open(path, "rb") as file:
        file.seek(start)
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, HEADER) else b""
    try:
        entries = [(name, entry) for name, entry in json.loads(text).items() if name != "__metadata__"]
        for name, entry in sorted(entries, key=lambda each: each[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            found[name] = torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]], device="meta")
            if begin != at or end - begin != found[name].nbytes:
                raise ValueError(name)
            at = end
        whole = start + 8 + length + at == size
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError):
        whole = False  # RuntimeError also of text that is nested too deep
    if not whole:
        raise ValueError(f"{path.name} is not as it was written: cut off or damaged")
    return found
