"""A folder that holds what was fitted: numbers as safetensors, everything else as JSON; whole or not there, no code."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from pyromosaic import __version__
from pyromosaic.train.files import clear_drafts, drafts, n_entries, replaced, size_of

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"

#: Bounds on descriptions, because each entry takes memory.
BYTES, ENTRIES = 1 << 25, 1_500_000

#: What reading and building raise for files that are not those of a saved object.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def keep(directory: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool) -> None:
    """Write both files; see `pyromosaic.models.MosaicModel.save`.

    Parameters
    ----------
    directory
        The folder; it is created if it does not exist.
    content
        The description, with ``class`` and ``format``.
    tensors
        The numbers by name.
    overwrite
        Whether to replace what is there.
    """
    if (directory / DESCRIPTION).exists() and not overwrite:
        raise FileExistsError(f"{directory} already holds a saved model or linkage; pass overwrite=True to replace it")
    written = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    plain = {"version": __version__, "weights": sha256(written).hexdigest(), **content}
    plain = json.loads(json.dumps(plain))  # as it will be read
    text = json.dumps(plain | {"digest": digest(plain)}).encode()
    _check_entries(text)
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, DESCRIPTION):
            clear_drafts(directory / name)
        replaced({directory / WEIGHTS: written, directory / DESCRIPTION: text})
    except OSError as error:
        with suppress(OSError):
            if new:
                directory.rmdir()
        raise type(error)(f"the model cannot be saved in {directory}: {error.strerror}") from error


def descriptions(
    directory: Path, cls: str, formats: Collection[int], kinds: Mapping[str, type]
) -> Iterator[dict[str, Any]]:
    """What ``model.json`` holds; if a kill came between its weights' writing and its own, also what it was to hold.

    Parameters
    ----------
    directory
        The folder.
    cls
        The class that it must be of.
    formats
        Versions of the format that are read.
    kinds
        What a description must hold, by the types of its entries.
    """
    yield _read(directory, directory / DESCRIPTION, cls, formats, kinds)
    for draft in drafts(directory / DESCRIPTION):
        with suppress(ValueError):
            yield _read(directory, draft, cls, formats, kinds)


def saved_by(directory: Path, content: Mapping[str, Any]) -> str:
    """The folder and the version that wrote it, for messages."""
    return f"{directory} (saved by pyromosaic {content.get('version', '0.1.0 or earlier')})"


def check_digest(directory: Path, content: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the description."""
    if content.get("weights") is not None:
        with open(directory / WEIGHTS, "rb") as file:
            if file_digest(file, "sha256").hexdigest() != content["weights"]:
                raise ValueError(f"{WEIGHTS} is not as it was saved")


def digest(content: Any) -> str:
    """Digest of plain values."""
    return sha256(json.dumps(content).encode()).hexdigest()


def _check_entries(text: bytes) -> None:
    """Refuse a description that would not be read again."""
    entries = n_entries(text)
    if len(text) > BYTES or entries > ENTRIES:
        raise ValueError(
            f"the description of a model has at most {BYTES:,} bytes and {ENTRIES:,} entries, e.g. names of features; "
            f"found {len(text):,} and {entries:,}"
        )


def _read(directory: Path, file: Path, cls: str, formats: Collection[int], kinds: Mapping[str, type]) -> dict[str, Any]:
    try:
        size_of(file, BYTES)
        text = file.read_bytes()
        _check_entries(text)
        content = json.loads(text)
        version, name = content["format"], content["class"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory} does not hold a complete saved model: {error}") from error
    other = f"{saved_by(directory, content)} holds a model of class {name}, not {cls}; use {name}.load"
    if version not in formats and name != cls:
        raise ValueError(other)
    if version not in formats:
        by = f" by pyromosaic {content['version']}" if "version" in content else ""
        raise ValueError(
            f"{directory} was saved in format {version}{by}; this version of pyromosaic reads formats "
            f"{', '.join(map(str, formats))} (it is {__version__})"
        )
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind) or (
            kind is list and not all(isinstance(v, str) for v in content[key])
        ):
            raise ValueError(f"{directory} does not hold a complete saved model: {key!r} is missing or of another type")
    if "digest" in content and content.pop("digest") != digest(content):
        raise ValueError(f"{directory} does not hold a complete saved model: {file.name} is not as it was saved")
    if name != cls:
        raise ValueError(other)
    return dict(content)
