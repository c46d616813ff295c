"""How objects are shown: options that are not defaults, and tables in notebooks."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from inspect import Parameter, signature
from typing import Any

import numpy as np

MOST, LONGEST = 5, 60  # entries and characters of an option


def spelled(value: Any) -> str:
    """An option in a few characters: plain values as they are, parts by class and arguments, others by their type.

    Examples
    --------
    >>> from pyromosaic.priors import StudentT
    >>> spelled({"prior": StudentT(df=4.0), "n_latent": 3})
    "{'prior': StudentT(df=4.0), 'n_latent': 3}"
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
    elif isinstance(value, Mapping | list | tuple):
        text, many = "", len(value) > MOST
        if isinstance(value, Mapping) and not many:
            text = f"{{{', '.join(f'{key!r}: {spelled(entry)}' for key, entry in value.items())}}}"
        elif not many:
            text = f"[{', '.join(map(spelled, value))}]"
        if many or len(text) > LONGEST:
            text = f"<{type(value).__name__} of {len(value)}>"
    elif isinstance(made := getattr(value, "made_with", None), Mapping):
        text = f"{type(value).__name__}({', '.join(f'{name}={spelled(entry)}' for name, entry in made.items())})"
    else:
        text = str(getattr(value, "__name__", type(value).__name__))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def call(cls: type, options: Mapping[str, Any]) -> str:
    """The class and its options that are not defaults, as in the call of its constructor.

    Parameters
    ----------
    cls
        The class.
    options
        Its options by name.

    Examples
    --------
    >>> from pyromosaic import MultiVI
    >>> call(MultiVI, {"n_latent": 3, "mmd": 50.0})
    'MultiVI(n_latent=3)'
    """
    defaults: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            defaults |= {name: parameter.default for name, parameter in signature(base).parameters.items()}
    changed = [
        f"{name}={spelled(value)}"
        for name, value in options.items()
        if spelled(value) != spelled(defaults.get(name, Parameter.empty))
    ]
    return f"{cls.__name__}({', '.join(changed)})"


def as_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> str:
    """A small table for a notebook.

    Parameters
    ----------
    title
        What the object is.
    columns, rows
        Header and cells of the table; all text is escaped.
    note
        A line below the table.

    Examples
    --------
    >>> as_html("Mosaic", ["modality"], [["rna"]])
    '<div><b>Mosaic</b><table><tr><th>modality</th></tr><tr><td>rna</td></tr></table></div>'
    """
    lines = ["".join(f"<th>{escape(str(column))}</th>" for column in columns)]
    lines += ["".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div><b>{escape(title)}</b><table>{table}</table>{escape(note)}</div>"
