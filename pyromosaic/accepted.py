"""What numbers and choices arguments may be: written in the signature, and checked before anything is done.

A signature says what an argument may be by its type, one of those below, or ``Literal``, ``bool`` and ``None``; the
decorator `checked` refuses all else. Numbers of numpy become Python's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, isclass, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import pandas as pd
from torch import nn

from pyromosaic.foreign import check_words

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Number:
    """A range of numbers.

    Parameters
    ----------
    says
        The range in words.
    least, most
        Its ends.
    whole
        Whether only whole numbers are in it.
    open_below, open_above
        Whether the ends themselves are outside.

    Examples
    --------
    >>> Number("a share from 0 to below 1", 0, 1, open_above=True).take(np.float64(0.5))
    0.5
    """

    says: str
    least: float
    most: float
    whole: bool = False
    open_below: bool = False
    open_above: bool = False

    def take(self, value: Any) -> Any:
        """The number as Python's; raises a ValueError if it is not in the range."""
        value = value.item() if isinstance(value, np.generic) else value
        kinds = int if self.whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError
        above = value > self.least if self.open_below else value >= self.least
        if not (above and (value < self.most if self.open_above else value <= self.most)):
            raise ValueError
        return value


@dataclass(frozen=True)
class Name:
    """Text, or a number that stands for its text.

    Parameters
    ----------
    says
        What it is, in words.
    empty
        Whether it may be empty.

    Examples
    --------
    >>> Name("the name of a column of obs").take(np.int64(3))
    '3'
    """

    says: str
    empty: bool = False

    def take(self, value: Any) -> str:
        """The name as text; raises a ValueError if it is none."""
        if not isinstance(value, str | int | np.integer) or isinstance(value, bool) or (value == "" and not self.empty):
            raise ValueError
        return str(value)


Column = Annotated[str, Name("the name of a column of obs")]
Word = Annotated[str, Name("text or a whole number", empty=True)]
Count = Annotated[int, Number("a whole number from 1 to 1e9", 1, 1e9, whole=True)]
Whole = Annotated[int, Number("a whole number from 0 to 1e9", 0, 1e9, whole=True)]
Width = Annotated[int, Number("a whole number from 1 to 100,000", 1, 100_000, whole=True)]
Dimensions = Annotated[int, Number("a whole number from 0 to 100,000", 0, 100_000, whole=True)]
Layers = Annotated[int, Number("a whole number from 1 to 100", 1, 100, whole=True)]
Seed = Annotated[int, Number("a whole number from 0 to 2**32 - 1", 0, 2**32 - 1, whole=True)]
Positive = Annotated[float, Number("a number above 0, at most 1e9", 0, 1e9, open_below=True)]
Length = Annotated[float, Number("a number above 0, up to inf", 0, float("inf"), open_below=True)]
Weight = Annotated[float, Number("a number from 0 to 1e9", 0, 1e9)]
Rate = Annotated[float, Number("a share from 0 to below 1", 0, 1, open_above=True)]
Share = Annotated[float, Number("a share from 0 to 1", 0, 1)]
Level = Annotated[float, Number("a number between 0 and 1", 0, 1, open_below=True, open_above=True)]

_PLAIN = {
    int: Number("a whole number", -1e18, 1e18, whole=True),
    float: Number("a finite number", -1e300, 1e300),
}


@dataclass(frozen=True)
class _Rule:
    """How a value is taken, or a ValueError raised; and what is accepted, in words."""

    take: Callable[[Any], Any]
    alternatives: tuple[str, ...]

    @property
    def says(self) -> str:
        *others, last = self.alternatives
        return f"{', '.join(others)} or {last}" if others else last


def _instance(kind: type, says: str) -> _Rule:
    def take(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return _Rule(take, (says,))


def _choice(words: Sequence[Any]) -> _Rule:
    def take(value: Any) -> Any:
        chosen = [word for word in words if isinstance(value, type(word)) and value == word]
        if not chosen:
            raise ValueError
        return chosen[0]

    return _Rule(take, tuple(map(repr, words)))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError
    return bool(value)


def _any_of(rules: Sequence[_Rule]) -> _Rule:
    def take(value: Any) -> Any:
        for rule in rules:
            try:
                return rule.take(value)
            except ValueError:
                continue
        raise ValueError

    return _Rule(take, tuple(says for rule in rules for says in rule.alternatives))


def _each(entry: _Rule, of: str) -> _Rule:
    """Every value of a dictionary or of a list."""

    def take(value: Any) -> Any:
        if isinstance(value, Mapping) and of == "a dictionary":
            return {key: entry.take(each) for key, each in value.items()}
        if isinstance(value, Sequence | np.ndarray | pd.Index) and not isinstance(value, str) and of == "a list":
            return tuple(entry.take(each) for each in value)
        raise ValueError

    return _Rule(take, (f"{of} with values each {entry.says}",))


def _rule(annotation: Any) -> tuple[_Rule | None, bool]:
    """The rule that a type stands for, if it can be told; and whether the type says more than a class."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated and isinstance(args[1], Number | Name):
        return _Rule(args[1].take, (args[1].says,)), True
    if annotation in _PLAIN:
        return _Rule(_PLAIN[annotation].take, (_PLAIN[annotation].says,)), True
    if annotation is bool:
        return _Rule(_flag, ("True", "False")), True
    if annotation in (None, NoneType):
        return _instance(NoneType, "None"), False
    if origin is Literal:
        return _choice(args), True
    if origin in (Union, UnionType):
        if np.ndarray in args and any(get_origin(part) is Sequence for part in args):
            return None, False  # names, numbers or a mask, which are looked up
        parts = [_rule(part) for part in args]
        rules = [rule for rule, _ in parts if rule is not None]
        return (_any_of(rules) if len(rules) == len(parts) else None), any(more for _, more in parts)
    if origin in (Mapping, Sequence):
        entry, more = _rule(args[-1])
        kind = "a dictionary" if origin is Mapping else "a list"
        return (_each(entry, kind) if entry is not None and more else None), more
    if origin is Callable:
        return _Rule(_callable, ("a class or function",)), True
    if annotation is type:
        return _instance(type, "a class"), False
    if origin is tuple and Ellipsis not in args:
        entries = [rule for rule, _ in map(_rule, args) if rule is not None]
        return (_tuple(entries), True) if len(entries) == len(args) else (None, False)
    if annotation is str:
        return _instance(str, "text"), True
    if isclass(annotation) and origin is None and annotation not in (Any, object, Parameter.empty):
        made = issubclass(annotation, nn.Module) and annotation is not nn.Module
        says = f"{annotation.__name__}(...)" if made else f"a {annotation.__name__}"
        return _instance(annotation, says + getattr(annotation, "made_by", "")), True
    return None, False


def _tuple(entries: Sequence[_Rule]) -> _Rule:
    def take(value: Any) -> Any:
        if not isinstance(value, tuple | list) or len(value) != len(entries):
            raise ValueError
        return tuple(entry.take(each) for entry, each in zip(entries, value, strict=True))

    return _Rule(take, (f"{len(entries)} values, each {entries[0].says}",))


def _callable(value: Any) -> Any:
    if not callable(value):
        raise ValueError
    return value


def checked(function: F) -> F:
    """Refuse, in one sentence, arguments that are not what the signature's types say, before the call.

    Parameters
    ----------
    function
        A function, method or constructor; or a class, whose constructor is meant.

    Returns
    -------
    The same, with arguments checked and numbers of numpy made Python's.

    Examples
    --------
    >>> @checked
    ... def draw(n_samples: Count, mode: Literal["mean", "all"] | None = None) -> int:
    ...     return n_samples
    >>> draw(np.int64(3))
    3
    >>> draw(0)
    Traceback (most recent call last):
        ...
    ValueError: n_samples must be a whole number from 1 to 1e9; found 0
    >>> draw(2, mode="sum")
    Traceback (most recent call last):
        ...
    ValueError: mode must be 'mean', 'all' or None; found 'sum'
    """
    if isclass(function):
        function.__init__ = checked(function.__init__)  # type: ignore[method-assign]
        return function
    form, rules = signature(function), rules_of(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = form.bind(*args, **kwargs)
        except TypeError:
            owner = function.__qualname__.removesuffix(".__init__").split(".")[-1]
            check_words(owner, kwargs, form.parameters)
            return function(*args, **kwargs)  # which says what is missing or too much
        for name in rules.keys() & bound.arguments.keys():
            bound.arguments[name] = take(name, bound.arguments[name], rules[name])
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def rules_of(function: Callable[..., Any]) -> dict[str, _Rule]:
    """The rules for the arguments of a function whose types say what is accepted."""
    found = {name: _rule(parameter.annotation) for name, parameter in signature(function).parameters.items()}
    return {name: rule for name, (rule, more) in found.items() if rule is not None and more}


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that a function will refuse when it is called later."""
    for name, rule in rules_of(function).items():
        if name in given:
            take(name, given[name], rule)


def take(name: str, value: Any, rule: Number | Name | _Rule) -> Any:
    """A value as a rule takes it, or a sentence on what is accepted."""
    try:
        return rule.take(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be {rule.says}; found {_shown(value)}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
