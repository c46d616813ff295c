"""The user's `obs` tables: of the whole and of each modality, kept apart, and read by one rule."""

import re
import warnings
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

WHOLE = ""
WHOLE_NUMBER = re.compile(r"-?\d+\.0+")
ONE_KIND = ("string", "integer", "floating", "mixed-integer-float", "boolean", "categorical")
#: Words, in small letters, that usually mean "not known".
NOT_KNOWN = frozenset(
    ["", "unknown", "nan", "na", "n/a", "<na>", "null", "unassigned", "unlabelled", "unlabeled", "undefined", "missing"]
)


class Table(NamedTuple):
    """An `obs` table of the user's.

    Parameters
    ----------
    modality
        The modality whose cells it describes; empty for the whole.
    cells
        Names of its rows in the mosaic.
    obs
        The table.
    """

    modality: str
    cells: pd.Index
    obs: pd.DataFrame


class Reading(NamedTuple):
    """What one table says of a column: its value for each cell of the mosaic, missing where it does not know one."""

    modality: str
    values: pd.Series
    is_copy: bool = False  # made by MuData of a modality's column
    unlabelled: np.ndarray | None = None  # cells of which it says so in a word


def readings(tables: Iterable[Table], key: str, cells: pd.Index, unlabelled: Collection[str] = ()) -> list[Reading]:
    """What each table says of a column, in the one order that holds everywhere: the modalities', then the whole's.

    Parameters
    ----------
    tables
        Where to look.
    key
        Name of the column. ``"rna:batch"`` is the column ``"batch"`` of modality ``"rna"``, whether or not MuData
        has copied it into the whole.
    cells
        Names of the cells.
    unlabelled
        Words that mean "not known": where they stand, the table knows no value.
    """
    modality, _, name = key.partition(":")
    order = sorted(tables, key=lambda table: table.modality == WHOLE)
    own = [(t, _named(t, name), False) for t in order if t.modality == modality and _named(t, name) is not None]
    own += [(t, _named(t, key), bool(own)) for t in order if _named(t, key) is not None]
    found = []
    for table, column, is_copy in own:
        values = table.obs[column].astype(object)
        if values.ndim > 1:
            raise ValueError(f"{place(table.modality)} has the column {column!r} more than once; keep one of them")
        if not table.cells.equals(cells):
            values = values.set_axis(table.cells).reindex(cells)
        values, hidden = values.set_axis(cells).rename(key), None
        if unlabelled:
            hidden = words(values).isin(list(unlabelled)).to_numpy()
            values = values.where(~hidden, None)
        found.append(Reading(table.modality, values, is_copy, hidden))
    return found


def _named(table: Table, name: str) -> Hashable | None:
    """The column of this name; numbers as names are names. None if there is no such column."""
    if name in table.obs:
        return name
    return next((column for column in table.obs if str(column) == name), None)


def look_up(found: Iterable[Reading], first: str = WHOLE) -> pd.Series | None:
    """A column, each value from the first table that knows it; None if no table has the column.

    Parameters
    ----------
    found
        What the tables say, see `readings`.
    first
        The modality whose table comes before the others.

    Returns
    -------
    pandas.Series
        Of objects, so that holes do not turn whole numbers into floats. Missing where no table knows the cell.
    """
    column = None
    for reading in sorted(found, key=lambda reading: reading.modality != first or first == WHOLE):
        if column is None:
            column = reading.values
        elif column.isna().any():
            column = column.where(column.notna(), reading.values)
    return column


class Contradiction(NamedTuple):
    """Two tables that say different words of a cell: which, of which cell, and of how many cells."""

    first: Reading
    second: Reading
    cell: str
    n_cells: int

    def __str__(self) -> str:
        key, values = self.first.values.name, [r.values[self.cell] for r in (self.first, self.second)]
        told = ["not known" if pd.isna(value) else repr(word(value)) for value in values]
        said = (f"{t} in {place(r.modality)}" for t, r in zip(told, (self.first, self.second), strict=True))
        others = f" (and in {self.n_cells - 1} further cells)" if self.n_cells > 1 else ""
        return f"column {key!r} of cell {self.cell!r} is {' and '.join(said)}{others}"


def place(modality: str) -> str:
    """How a table is called in a message."""
    return f"modality {modality!r}" if modality != WHOLE else "the obs of the whole"


def contradictions(found: Iterable[Reading]) -> list[Contradiction]:
    """Pairs of tables that do not say the same of a cell: other words, or a word where a modality says "not known"."""
    pairs = []
    for one, other in combinations([r for r in found if not r.is_copy], 2):
        a, b = one.values, other.values
        apart = (a.to_numpy() != b.to_numpy()) & (a.notna() & b.notna()).to_numpy()
        if apart.any():
            different = words(a[apart]) != words(b[apart])
            cells = different.index[different]
            if len(cells):
                pairs.append(Contradiction(one, other, cells[0], len(cells)))
        if one.unlabelled is not None and other.modality == WHOLE:
            cells = a.index[one.unlabelled & other.values.notna().to_numpy()]
            if len(cells):
                pairs.append(Contradiction(one, other, cells[0], len(cells)))
    return pairs


def warn_of(found: list[Contradiction]) -> None:
    """Say what is taken, once for all pairs of tables."""
    if found:
        warnings.warn(
            f"{found[0]}; the value of the first table that has one is used, modalities before the whole. Make the "
            "values equal",
            stacklevel=2,
        )


def word(value: Any) -> str:
    """A category as a word, the same for 1, 1.0, "1" and " 1.0 "."""
    if isinstance(value, float | np.floating) and np.isfinite(value) and float(value).is_integer():
        return str(int(value))
    text = str(value).strip()
    return text.partition(".")[0] if WHOLE_NUMBER.fullmatch(text) else text


def words(values: pd.Series) -> pd.Series:
    """Categories as words, so that they mean the same in every table; missing values stay missing."""
    objects = values.astype(object)
    if pd.api.types.infer_dtype(objects, skipna=True) not in ONE_KIND:
        return objects.map(word, na_action="ignore")
    numbers, distinct = pd.factorize(objects)  # would take True for 1, hence only where all are of one kind
    spelled = np.array([*map(word, distinct), None], dtype=object)
    return pd.Series(spelled[numbers], values.index, dtype=object, name=values.name)


def warn_of_not_known(found: pd.Series, what: str, unlabelled: Iterable[str] = ()) -> None:
    """Warn of words that usually mean "not known" and are about to count as any other.

    Parameters
    ----------
    found
        Words.
    what
        Where they stand, for the message.
    unlabelled
        Words that are known to mean "not known".
    """
    for doubtful in pd.unique(found.dropna()):
        if (doubtful == "None" or doubtful.casefold() in NOT_KNOWN) and doubtful not in unlabelled:
            warnings.warn(
                f"{what} is {doubtful!r} in {int((found == doubtful).sum())} cells, which counts as a value like any "
                "other; if it means that the value is not known, set it to NaN, or for labels pass "
                f"unlabelled={doubtful!r} at registration",
                stacklevel=2,
            )


def in_order(names: pd.Index, wanted: pd.Index, what: str, of: str) -> np.ndarray:
    """Where each of the wanted names stands among others; numbers as names are names.

    Parameters
    ----------
    names, wanted
        Names to look among, and those to look for.
    what, of
        What has the `names` and what the `wanted` ones, for the message.

    Raises
    ------
    ValueError
        If a name occurs twice, or stands on one side only.
    """
    found = []
    for index, owner in ((names, what), (wanted, of)):
        index = index.astype(str)
        if index.has_duplicates:
            raise ValueError(f"{owner} has the name {str(index[index.duplicated()][0])!r} twice; names must be unique")
        found.append(index)
    missing = found[1].difference(found[0], sort=False), found[0].difference(found[1], sort=False)
    for stray, owner, other in ((missing[0], of, what), (missing[1], what, of)):
        if len(stray):
            n = len(missing[0]) + len(missing[1])
            raise ValueError(
                f"{owner} has {str(stray[0])!r} and {other} has not ({n} names are in only one of the two), so their "
                "names do not fit; if their rows are in the same order, pass one of them without names, by .to_numpy()"
            )
    return found[0].get_indexer(found[1]).astype(np.int64)


def find(names: pd.Index, wanted: Any, noun: str, owner: str, numbers: bool = True) -> np.ndarray:
    """Numbers of cells or features, given by names, by a mask, or by numbers.

    What has names is matched by them: the values of an Index, a mask that is a Series by its own index. Arrays and
    lists have none: masks are taken by position, whole numbers are positions.

    Parameters
    ----------
    names
        All names.
    wanted
        Those asked for; a single name is one.
    noun
        ``"cell"`` or ``"feature"``, for the message.
    owner
        Where they are, for the message.
    numbers
        Whether whole numbers are positions; if not, they are names.

    Raises
    ------
    ValueError
        If one is not there, or none is given.
    """
    accepted = f"names, {'numbers ' if numbers else ''}or a mask with at least one {noun}"
    if isinstance(wanted, tuple) and len(wanted) == 1 and isinstance(wanted[0], np.ndarray):
        wanted = wanted[0]  # what np.where gives
    table = isinstance(wanted, pd.DataFrame | Mapping | Set) or hasattr(wanted, "obs_names")
    if table or np.asarray(wanted).shape == () and np.asarray(wanted).dtype == object:  # a slice, a generator, ...
        raise ValueError(f"{noun}s are given by {accepted}; found a {type(wanted).__name__}")
    values = np.atleast_1d(np.asarray(wanted))
    if values.ndim != 1:
        raise ValueError(f"{noun}s are given by {accepted}, in one dimension; found the shape {values.shape}")
    if values.size == 0:
        raise ValueError(f"no {noun} was asked for; give {accepted}")
    kind = "boolean" if values.dtype == bool else pd.api.types.infer_dtype(values, skipna=True)
    spelled = names.astype(str)
    if kind == "boolean":
        if pd.isna(values).any():
            raise ValueError(f"the mask of {noun}s has missing values; accepted: True or False for each")
        chosen = np.flatnonzero(values.astype(bool))
        if len(chosen) and isinstance(wanted, pd.Series):
            named = wanted.index.astype(str)
            if named.has_duplicates:
                raise ValueError(f"the mask has the {noun} {str(named[named.duplicated()][0])!r} twice")
            chosen = np.sort(_places(spelled, named[chosen], noun, f"{owner}; a mask without names is mask.to_numpy()"))
        elif len(values) != len(names):
            raise ValueError(f"the mask has shape {values.shape}; {owner} has {len(names)} {noun}s")
        if len(chosen) == 0:
            raise ValueError(f"no {noun} was asked for; give {accepted}")
        return chosen.astype(np.int64)
    if kind == "integer" and numbers and not isinstance(wanted, pd.Index):
        positions = values.astype(np.int64)
        if isinstance(wanted, pd.Series):
            by_name = spelled.get_indexer(pd.Index(positions).astype(str))
            if (by_name >= 0).all() and (by_name != positions).any():
                raise ValueError(
                    f"a Series of whole numbers could be names or positions of {noun}s; pass names as text, by "
                    ".astype(str), or positions without an index, by .to_numpy()"
                )
        if len(positions) == len(names) > 2 and np.isin(positions, (0, 1)).all():
            raise ValueError(
                f"a 0 or 1 for each {noun} may be a mask or {noun} numbers; give a mask as booleans, .astype(bool)"
            )
        low, high = np.min(positions), np.max(positions)
        if low < 0 or high >= len(names):
            raise ValueError(f"{noun} numbers run from 0 to {len(names) - 1}; found {low} to {high}")
        return positions
    return _places(spelled, pd.Index([str(value) for value in values], dtype=object), noun, owner)


def _places(names: pd.Index, wanted: pd.Index, noun: str, owner: str) -> np.ndarray:
    found = names.get_indexer(wanted)
    if (found < 0).any():
        raise ValueError(f"{noun} {str(wanted[found < 0][0])!r} is not in {owner}")
    return found.astype(np.int64)


def codes(values: pd.Series, categories: Iterable[str]) -> np.ndarray:
    """Position of each word among the categories, -1 for a missing or another one."""
    return pd.Index(list(categories), dtype=object).get_indexer(pd.Index(values, dtype=object)).astype(np.int64)


@contextmanager
def kept_apart() -> Iterator[None]:
    """MuData made, read or updated here has in its `obs` what was put there, as from mudata 0.4.

    Earlier releases copy the modalities' columns into the whole unless they are told not to.
    """
    import mudata

    set_options = getattr(mudata, "set_options", None)  # gone in 0.4
    with nullcontext() if set_options is None else set_options(pull_on_update=False):
        yield
