"""The user's `obs` tables: of the whole and of each modality, kept apart, and read by one rule."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import pandas as pd

WHOLE = ""


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


def look_up(tables: Iterable[Table], key: str, cells: pd.Index, first: str = WHOLE) -> pd.Series | None:
    """A column for these cells, each value from the first table that knows it; None if no table has the column.

    Parameters
    ----------
    tables
        Where to look.
    key
        Name of the column. ``"rna:batch"`` is the column ``"batch"`` of modality ``"rna"``, whether or not MuData
        has copied it into the whole.
    cells
        Names of the cells.
    first
        Whose table comes first. That of the whole follows, then those of the other modalities in their order.

    Returns
    -------
    pandas.Series
        Of objects, so that holes do not turn whole numbers into floats. Missing where no table knows the cell.
    """
    modality, _, name = key.partition(":")
    order = sorted(tables, key=lambda table: (table.modality != first, table.modality != WHOLE))
    places = [
        table.obs[name].set_axis(table.cells) for table in order if table.modality == modality and name in table.obs
    ]
    places += [table.obs[key].set_axis(table.cells) for table in order if key in table.obs]
    if not places:
        return None
    column = pd.Series(None, index=cells, dtype=object)
    for place in places:
        column = column.where(column.notna(), place.astype(object).reindex(cells))
    return column.rename(key)


def words(values: pd.Series) -> pd.Series:
    """Categories as words, so that they mean the same in every table; missing values stay missing."""
    return values.astype(object).map(str, na_action="ignore")


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
