"""The user's `obs` tables, of the whole MuData and of each modality, and the rule by which all columns are read."""

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
LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
ONE_KIND = ("string", "integer", "floating", "mixed-integer-float", "boolean", "categorical")
#: Values, in lower case, that usually mean "not known".
NOT_KNOWN = frozenset(
    ["", "unknown", "nan", "na", "n/a", "<na>", "null", "unassigned", "unlabelled", "unlabeled", "undefined", "missing"]
    + ["?", "#n/a", "nat", "not known", "not available", "not assigned", "unannotated", "unidentified"]
    + ["undetermined", "unclassified"]
)


class Table(NamedTuple):
    """One of the user's `obs` tables.

    Parameters
    ----------
    modality
        The modality whose cells it describes; empty for the whole MuData.
    cells
        Names of its rows in the mosaic.
    obs
        The table.
    """

    modality: str
    cells: pd.Index
    obs: pd.DataFrame


class Reading(NamedTuple):
    """The values of a column in one table, for each cell of the mosaic; missing where the table has none."""

    modality: str
    values: pd.Series
    is_copy: bool = False  # of a column of a modality, made by MuData
    unlabelled: np.ndarray | None = None  # cells whose value is a word for "not known"


def readings(tables: Iterable[Table], key: str, cells: pd.Index, unlabelled: Collection[str] = ()) -> list[Reading]:
    """The values of a column in each table. The tables of modalities always come before that of the whole MuData.

    Parameters
    ----------
    tables
        The tables to read.
    key
        Name of the column. ``"rna:batch"`` is the column ``"batch"`` of modality ``"rna"``, whether or not MuData
        has copied it into its table.
    cells
        Names of the cells.
    unlabelled
        Values that mean "not known"; they count as missing.
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
    """A column in which each value is from the first table that has one; None if no table has the column.

    Parameters
    ----------
    found
        The values in each table, see `readings`.
    first
        The modality whose table comes before the others.

    Returns
    -------
    pandas.Series
        Objects, because missing values would turn integers into floats. Missing if no table has a value.
    """
    column = None
    for reading in sorted(found, key=lambda reading: reading.modality != first or first == WHOLE):
        if column is None:
            column = reading.values
        elif column.isna().any():
            column = column.where(column.notna(), reading.values)
    return column


class Contradiction(NamedTuple):
    """Two tables with different values for the same cells: the tables, the first such cell, and the number of cells."""

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
    """The name of a table in messages."""
    return f"modality {modality!r}" if modality != WHOLE else "the obs of the MuData"


def contradictions(found: Iterable[Reading]) -> list[Contradiction]:
    """Pairs of tables with different values for a cell, or with a value where a modality has "not known"."""
    pairs = []
    for one, other in combinations([r for r in found if not r.is_copy], 2):
        a, b = one.values, other.values
        both = (a.notna() & b.notna()).to_numpy()  # pandas' NA cannot be compared
        if not np.array_equal(a.to_numpy()[both], b.to_numpy()[both]):
            different = words(a[both]) != words(b[both])
            cells = different.index[different]
            if len(cells):
                pairs.append(Contradiction(one, other, cells[0], len(cells)))
        if one.unlabelled is not None and other.modality == WHOLE:
            cells = a.index[one.unlabelled & other.values.notna().to_numpy()]
            if len(cells):
                pairs.append(Contradiction(one, other, cells[0], len(cells)))
    return pairs


def warn_of(found: list[Contradiction]) -> None:
    """Warn about the first contradiction, and say which value is used."""
    if found:
        warnings.warn(
            f"{found[0]}; the value of the first table that has one is used, modalities before the MuData. Make the "
            "values equal",
            stacklevel=2,
        )


def word(value: Any) -> str:
    """A category as a string, which is the same for 1, 1.0, "1", " 1.0 " and b"1" (text as HDF5 stores it)."""
    if isinstance(value, float | np.floating) and np.isfinite(value) and float(value).is_integer():
        return str(int(value))
    text = (value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)).strip()
    return text.partition(".")[0] if WHOLE_NUMBER.fullmatch(text) else text


def words(values: pd.Series) -> pd.Series:
    """Categories as strings, which are the same in every table; missing values stay missing."""
    objects = values.astype(object)
    if pd.api.types.infer_dtype(objects, skipna=True) not in ONE_KIND:
        return objects.map(word, na_action="ignore")
    numbers, distinct = pd.factorize(objects)  # equates True and 1, therefore only if all are of one kind
    spelled = np.array([*map(word, distinct), None], dtype=object)
    return pd.Series(spelled[numbers], values.index, dtype=object, name=values.name)


def warn_of_not_known(found: pd.Series, what: str, unlabelled: Iterable[str] = ()) -> None:
    """Warn about values that usually mean "not known" but count as ordinary values.

    Parameters
    ----------
    found
        The values, as strings.
    what
        The name of the column, for the message.
    unlabelled
        Values that were declared to mean "not known".
    """
    for doubtful in pd.unique(found.dropna()):
        if (doubtful == "None" or doubtful.casefold() in NOT_KNOWN) and doubtful not in unlabelled:
            warnings.warn(
                f"{what} is {doubtful!r} in {int((found == doubtful).sum())} cells, which counts as a value like any "
                "other; if it means that the value is not known, set it to NaN, or for labels pass "
                f"unlabelled={doubtful!r} at registration",
                stacklevel=2,
            )


def warn_of_spellings(key: str, values: Iterable[str]) -> bool:
    """Warn once about values of a column that differ only by capital letters or leading zeros; whether some do."""
    spelled: dict[str, list[str]] = {}
    for value in sorted(values):
        spelled.setdefault(LEADING_ZEROS.sub("", value.casefold()), []).append(value)
    twice = [", ".join(map(repr, same)) for same in spelled.values() if len(same) > 1]
    if twice:
        more = f" ({len(twice) - 1} further values also have several spellings)" if len(twice) > 1 else ""
        warnings.warn(
            f"column {key!r} has the values {twice[0]}, which count as different{more}; if they mean the same, spell "
            "them in the same way",
            stacklevel=2,
        )
    return bool(twice)


def in_order(names: pd.Index, wanted: pd.Index, what: str, of: str) -> np.ndarray:
    """Positions of the wanted names among all names; numbers are compared as names.

    Parameters
    ----------
    names, wanted
        All names, and those to find.
    what, of
        The owners of `names` and `wanted`, for the message.

    Raises
    ------
    ValueError
        If a name occurs twice, or is not among both.
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
                f"{owner} has the name {str(stray[0])!r} and {other} does not ({n} names are in only one of them); "
                "give both the same names, or if the rows are in the same order, pass one without names, by .to_numpy()"
            )
    return found[0].get_indexer(found[1]).astype(np.int64)


def find(names: pd.Index, wanted: Any, noun: str, owner: str, numbers: bool = True) -> np.ndarray:
    """Numbers of cells or features, given by names, by a mask, or by numbers.

    The values of an Index are names, and a mask that is a Series is matched by its index. Arrays and lists have no
    names: masks are matched by position, and integers are positions.

    Parameters
    ----------
    names
        All names.
    wanted
        The cells or features to find; a single name is accepted.
    noun
        ``"cell"`` or ``"feature"``, for the message.
    owner
        The object that has them, for the message.
    numbers
        Whether integers are positions; if not, they are names.

    Raises
    ------
    ValueError
        If one does not exist, or none is given.
    """
    accepted = f"names{', numbers' if numbers else ''} or a mask with at least one {noun}"
    if isinstance(wanted, tuple) and len(wanted) == 1 and isinstance(wanted[0], np.ndarray):
        wanted = wanted[0]  # the result of np.where
    table = isinstance(wanted, pd.DataFrame | Mapping | Set) or hasattr(wanted, "obs_names")
    if table or np.asarray(wanted).shape == () and np.asarray(wanted).dtype == object:  # a slice, a generator, ...
        raise ValueError(f"{noun}s must be {accepted}; found a {type(wanted).__name__}")
    values = np.atleast_1d(np.asarray(wanted))
    if values.ndim != 1:
        raise ValueError(f"{noun}s must be {accepted}, in one dimension; found the shape {values.shape}")
    if values.size == 0:
        raise ValueError(f"{noun}s must be {accepted}; found none")
    kind = "boolean" if values.dtype == bool else pd.api.types.infer_dtype(values, skipna=True)
    spelled = names.astype(str)
    if kind == "boolean":
        if pd.isna(values).any():
            raise ValueError(f"the mask of {noun}s has missing values; accepted: True or False for each")
        chosen = np.flatnonzero(values.astype(bool))
        if len(chosen) and isinstance(wanted, pd.Series):
            named = wanted.index.astype(str)
            if named.has_duplicates:
                twice = str(named[named.duplicated()][0])
                raise ValueError(f"the mask has the {noun} {twice!r} twice; names must be unique")
            chosen = np.sort(
                _places(spelled, named[chosen], noun, f"{owner}; to match by position, pass mask.to_numpy()")
            )
        elif len(values) != len(names):
            raise ValueError(f"the mask must have an entry for each of the {len(names)} {noun}s; found {len(values)}")
        if len(chosen) == 0:
            raise ValueError(f"{noun}s must be {accepted}; found none")
        return chosen.astype(np.int64)
    if pd.isna(values).any():
        raise ValueError(f"{noun}s must be {accepted}; found a missing value")
    if kind == "integer" and numbers and not isinstance(wanted, pd.Index):
        positions = values.astype(np.int64)
        if isinstance(wanted, pd.Series):
            by_name = spelled.get_indexer(pd.Index(positions).astype(str))
            if (by_name >= 0).all() and (by_name != positions).any():
                raise ValueError(
                    f"a Series of integers could be names or positions of {noun}s; pass names as strings, by "
                    ".astype(str), or positions without an index, by .to_numpy()"
                )
        if len(positions) == len(names) > 2 and np.isin(positions, (0, 1)).all():
            raise ValueError(
                f"a 0 or 1 for each {noun} could be a mask or {noun} numbers; pass a mask as booleans, by .astype(bool)"
            )
        low, high = np.min(positions), np.max(positions)
        if low < 0 or high >= len(names):
            raise ValueError(f"{noun} numbers must be from 0 to {len(names) - 1}; found {low} to {high}")
        return positions
    return _places(spelled, pd.Index([str(value) for value in values], dtype=object), noun, owner)


def _places(names: pd.Index, wanted: pd.Index, noun: str, owner: str) -> np.ndarray:
    found = names.get_indexer(wanted)
    if (found < 0).any():
        raise ValueError(f"{noun} {str(wanted[found < 0][0])!r} is not in {owner}")
    return found.astype(np.int64)


def codes(values: pd.Series, categories: Iterable[str]) -> np.ndarray:
    """Position of each value among the categories; -1 for a missing or unknown value."""
    return pd.Index(list(categories), dtype=object).get_indexer(pd.Index(values, dtype=object)).astype(np.int64)


@contextmanager
def kept_apart() -> Iterator[None]:
    """Inside this context, MuData does not copy the columns of modalities into its `obs`.

    mudata 0.4 never copies them; earlier versions do by default.
    """
    import mudata

    set_options = getattr(mudata, "set_options", None)  # gone in 0.4
    with nullcontext() if set_options is None else set_options(pull_on_update=False):
        yield
