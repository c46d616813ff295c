"""Files that are whole or not there: written beside their place, flushed, renamed; read only if they are files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from uuid import uuid4

HEADER = 1 << 24  # largest description of tensors, in bytes


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


def check_length(path: Path, size: int, start: int = 0) -> None:
    """Refuse tensors (safetensors) that are not as long as their header says, before they are read.

    Parameters
    ----------
    path
        The file.
    size
        Its size in bytes.
    start
        Where the tensors begin in it.

    Raises
    ------
    ValueError
        If there is no such header, or the file ends elsewhere.
    """
    with open(path, "rb") as file:
        file.seek(start)
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= min(size, HEADER) else b""
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = start + 8 + length + max(ends, default=0) == size
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path.name} is not as it was written: cut off or damaged")
