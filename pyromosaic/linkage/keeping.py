"""Save and load a linkage without any code."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from scipy import sparse
from torch import Tensor, nn

from pyromosaic.accepted import checked
from pyromosaic.data import Schema
from pyromosaic.train.files import shapes
from pyromosaic.train.folders import DAMAGED, WEIGHTS, check_digest, descriptions, keep, saved_by

FORMAT = 1
KINDS = {"class": str, "objects": list, "schema": dict, "parts": dict}


class Keeping:
    """Methods that save and load a linkage; see `pyromosaic.linkage.Linkage`."""

    #: Classes of its parts, which a file may name.
    parts: ClassVar[tuple[type, ...]] = ()
    schema: Schema

    def check(self) -> None:
        """Raise an error if the numbers do not belong together."""
        raise NotImplementedError

    @checked
    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Save the linkage: numbers as safetensors, everything else as JSON.

        Parameters
        ----------
        directory
            Directory to write to; it is created if it does not exist.
        overwrite
            Replace an existing linkage or model; it stays until the new one is written.

        Raises
        ------
        FileExistsError
            If the directory holds a linkage or model and `overwrite` is False.
        OSError
            If it cannot be written, e.g. on a full disk; what is there stays.
        """
        tensors: dict[str, Tensor] = {}
        specs = [modality.spec for modality in self.schema.modalities.values()]
        content = {
            "format": FORMAT,
            "class": type(self).__name__,
            "objects": [spec.likelihood_name for spec in specs if not isinstance(spec.likelihood, str)],
            "schema": self.schema.to_json(),
            "parts": _plain({f.name: getattr(self, f.name) for f in _kept(type(self))}, tensors),
        }
        keep(Path(directory), content, tensors, overwrite)

    @classmethod
    @checked
    def load(cls, directory: str | Path, **likelihoods: type) -> Self:
        """Load a saved linkage; no code from the files is run.

        Parameters
        ----------
        directory
            Directory that `save` wrote.
        **likelihoods
            Classes of likelihoods of your own, by their names.

        Raises
        ------
        ValueError
            If the files are missing, damaged, or of another class.

        Examples
        --------
        >>> from tempfile import TemporaryDirectory
        >>> from pyromosaic import Mosaic, linkage, simulate
        >>> mdata, truth = simulate(300, {"rna": 60, "adt": 20}, patterns=["rna", "adt"], links={"adt": 1.0})
        >>> mosaic = Mosaic.from_mudata(mdata, batch_key="batch")
        >>> link = linkage.cca(mosaic, ("rna", "adt"), truth.links[["gene", "feature"]], n_pcs=10)
        >>> with TemporaryDirectory() as directory:
        ...     link.save(directory)
        ...     again = linkage.Linkage.load(directory)
        >>> new = Mosaic.from_mudata(mdata, schema=again.schema)
        >>> again.transform(new)["rna"].equals(link.transform(mosaic)["rna"])
        True
        """
        directory, refused = Path(directory), []
        for content in descriptions(directory, cls.__name__, (FORMAT,), KINDS):
            try:
                return cls._loaded(directory, content, likelihoods)
            except ValueError as error:
                refused.append(error)
        raise refused[0]

    @classmethod
    def _loaded(cls, directory: Path, content: Mapping[str, Any], likelihoods: Mapping[str, type]) -> Self:
        of = saved_by(directory, content)
        missing = [name for name in content["objects"] if name not in likelihoods]
        if missing:
            raise ValueError(
                f"the linkage is of modalities with your own likelihoods; pass {missing[0]}=<class> to load()"
            )
        try:
            shapes(directory / WEIGHTS)  # before anything is read
            check_digest(directory, content)
            tensors = load_file(directory / WEIGHTS)
            parts = _restored(content["parts"], tensors, {each.__name__: each for each in cls.parts})
            if set(parts) != {f.name for f in _kept(cls)}:
                raise ValueError(f"it has {', '.join(parts)}")
            found = _made(cls, {**parts, "schema": Schema.from_json(content["schema"], likelihoods)})
            found.check()
        except DAMAGED as error:
            if isinstance(error, OSError) and error.strerror:
                raise ValueError(f"the numbers in {of} cannot be read: {error.strerror}") from error
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"the description and the numbers in {of} do not fit together: {reason}") from error
        return found


def _kept(cls: type) -> list[Any]:
    return [field for field in fields(cls) if field.name != "schema"]


def _made(cls: type, values: Mapping[str, Any]) -> Any:
    """An object with these attributes, as they were when it was saved."""
    made: Any = object.__new__(cls)
    vars(made).update(values)
    return made


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A part as plain values; its numbers and names of cells become tensors.

    Parameters
    ----------
    value
        Dataclasses, programs, tables, arrays, dictionaries, lists and tuples of numbers and text.
    tensors
        To which the tensors are added, by numbered names.
    """

    def inner(part: Any) -> Any:
        return _plain(part, tensors)

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray | pd.Index):
        return _numbered(value, tensors)
    if isinstance(value, list | tuple):
        return {type(value).__name__: [inner(each) for each in value]}
    if isinstance(value, Mapping):
        return {"dict": [[key, inner(each)] for key, each in value.items()]}
    if isinstance(value, pd.Series):
        return {"series": [value.name, inner(value.index), inner(value.to_numpy())]}
    if isinstance(value, pd.DataFrame):
        columns = [[name, inner(column.to_numpy())] for name, column in value.items()]
        return {"table": [inner(value.index), columns]}
    if sparse.issparse(value):
        rows: Any = sparse.csr_array(value)
        return {"sparse": [list(rows.shape), *(inner(part) for part in (rows.data, rows.indices, rows.indptr))]}
    name = type(value).__name__
    if isinstance(value, nn.Module):
        state = {key: inner(tensor) for key, tensor in value.state_dict().items()}
        return {"program": [name, inner(value.made_with), state]}
    if is_dataclass(value):
        return {"part": [name, {field.name: inner(getattr(value, field.name)) for field in fields(value)}]}
    raise TypeError(f"a linkage with a {name} cannot be saved")


def _numbered(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An array as a tensor; names as the bytes of their text."""
    kind, entry = "array", value
    if isinstance(value, Tensor):
        kind, entry = "tensor", value.detach().cpu().numpy()
    entry = np.asarray(entry)
    if entry.dtype.kind not in "biuf":
        kind, text = "names", "\0".join(map(str, entry)).encode()
        entry = np.frombuffer(text, dtype=np.uint8)
    name = f"n{len(tensors)}"
    tensors[name] = torch.from_numpy(np.array(np.append(entry.ravel(), entry.dtype.type(0))))  # none is empty
    return {kind: [name, list(np.shape(value)), str(entry.dtype)]}


def _restored(value: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()

    def inner(part: Any) -> Any:
        return _restored(part, tensors, classes)

    def array(name: str, shape: list[int], dtype: str) -> np.ndarray:
        return tensors[name].numpy()[:-1].astype(dtype, copy=False).reshape(shape)

    def names(name: str, shape: list[int], dtype: str) -> np.ndarray:
        text = array(name, [-1], dtype).tobytes().decode()
        return np.array(text.split("\0") if shape != [0] else [], dtype=object)

    def program(name: str, made_with: Any, state: Mapping[str, Any]) -> Any:
        made = classes[name](*inner(made_with))
        made.load_state_dict({key: inner(part) for key, part in state.items()})
        return made

    readers: dict[str, Callable[..., Any]] = {
        "array": array,
        "names": names,
        "tensor": lambda *tensor: torch.from_numpy(array(*tensor)),
        "list": lambda *parts: [inner(each) for each in parts],
        "tuple": lambda *parts: tuple(inner(each) for each in parts),
        "dict": lambda *parts: {key: inner(each) for key, each in parts},
        "series": lambda name, index, column: pd.Series(inner(column), inner(index), name=name),
        "table": lambda index, columns: pd.DataFrame({name: inner(each) for name, each in columns}, inner(index)),
        "sparse": lambda shape, *parts: sparse.csr_array(tuple(inner(each) for each in parts), shape=shape),
        "program": program,
        "part": lambda name, parts: _made(classes[name], {key: inner(each) for key, each in parts.items()}),
    }
    return readers[kind](*held)
