"""Parts that record their arguments, so that a model can complete them and save them as JSON."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, ClassVar, Self

import numpy as np
from torch import nn


class Described(nn.Module):
    """A part of a model that users pass as an option, e.g. a prior or a penalty.

    Attributes
    ----------
    needed
        Arguments that may be left out if the part is an option of a model; the model fills them in.
    made_with
        Arguments of its constructor, by name.

    Examples
    --------
    >>> from pyromosaic.priors import StudentT
    >>> part = StudentT(df=4.0)
    >>> part.made_with, part.complete
    ({'df': 4.0}, False)
    >>> part.completed(n_latent=10).zero.shape
    torch.Size([10])
    """

    needed: ClassVar[tuple[str, ...]] = ()
    made_with: Mapping[str, Any]
    complete: bool = True  # whether it can be used: no needed argument was left out

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments of the outermost constructor."""
        part = super().__new__(cls)
        constructor = signature(cls.__init__)
        given: dict[str, Any] = {}
        for name, value in list(constructor.bind_partial(None, *args, **kwargs).arguments.items())[1:]:
            given |= value if constructor.parameters[name].kind is Parameter.VAR_KEYWORD else {name: value}
        part.__dict__["made_with"] = given
        return part

    def completed(self, **known: Any) -> Self:
        """A new part with the same arguments, in which the model fills in those that were left out."""
        accepted = signature(type(self).__init__).parameters
        missing = {name: v for name, v in known.items() if name in accepted and self.made_with.get(name) is None}
        return type(self)(**{**self.made_with, **missing})


def complete(part: Any, **known: Any) -> Any:
    """The part itself if it is complete, or else a new part in which the model fills in missing arguments.

    Examples
    --------
    >>> complete("no part", n_latent=3)
    'no part'
    """
    return part.completed(**known) if isinstance(part, Described) and not part.complete else part


def to_json(value: Any, classes: Mapping[str, type]) -> Any:
    """An option in plain JSON, parts by their class and what they were made with.

    Parameters
    ----------
    value
        The option.
    classes
        Classes of parts that may be written down, by their names.

    Raises
    ------
    TypeError
        If it is, or holds, something else.

    Examples
    --------
    >>> from pyromosaic.priors import StudentT
    >>> to_json({"prior": StudentT(df=4.0)}, {"StudentT": StudentT})
    {'prior': {'part': 'StudentT', 'arguments': {'df': 4.0}}}
    """
    if isinstance(value, Described):
        name = type(value).__name__
        if classes.get(name) is not type(value):
            raise TypeError(f"{name} is not one of the package's own parts")
        return {"part": name, "arguments": to_json(value.made_with, classes)}
    if isinstance(value, Mapping):
        return {key: to_json(entry, classes) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry, classes) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is code, not a plain value")


def from_json(value: Any, classes: Mapping[str, type]) -> Any:
    """The inverse of `to_json`.

    Raises
    ------
    KeyError
        If a part is of another class.

    Examples
    --------
    >>> from pyromosaic.priors import StudentT
    >>> from_json({"part": "StudentT", "arguments": {"df": 4.0}}, {"StudentT": StudentT}).df
    4.0
    """
    if isinstance(value, Mapping):
        entries = {key: from_json(entry, classes) for key, entry in value.items()}
        return classes[entries["part"]](**entries["arguments"]) if set(entries) == {"part", "arguments"} else entries
    return [from_json(entry, classes) for entry in value] if isinstance(value, list) else value
