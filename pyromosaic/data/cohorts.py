"""Cohorts: which cells are background and which are target, for models that contrast them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyromosaic.data.tables import word

if TYPE_CHECKING:
    from pyromosaic.data.mosaic import Mosaic

BACKGROUND, NEITHER = 0, -1


@dataclass(frozen=True)
class Cohorts:
    """One background cohort and one or several target groups.

    Parameters
    ----------
    key
        The column of `obs` that distinguishes them; None if the cells themselves were given.
    names
        Names of the groups, the background first.
    values
        For each group, its values in the column.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(60, {"rna": 50}, treated=0.5)[0])
    >>> cohorts = Cohorts("condition", ("control", "treated"), (("control",), ("treated",)))
    >>> np.bincount(cohorts.codes(mosaic))
    array([30, 30])
    """

    key: str | None
    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    def codes(self, mosaic: "Mosaic") -> np.ndarray:
        """Group number of every cell, shape (N,): 0 background, 1, 2, … target groups, -1 neither."""
        codes = np.full(mosaic.n_cells, NEITHER, dtype=np.int64)
        if self.key is not None and mosaic.has_column(self.key):
            column = mosaic.words(self.key)
            for code, values in enumerate(self.values):
                codes[column.isin(list(map(word, values))).to_numpy()] = code
        return codes


def from_column(mosaic: "Mosaic", key: str, background: Any, target: Any) -> tuple[Cohorts, np.ndarray]:
    """Cohorts from the values of a column of `obs`, and the group number of every cell."""
    there = tuple(sorted(mosaic.words(key).dropna().unique()))
    controls = _words(background)
    targets = tuple(v for v in there if v not in controls) if target is None else _words(target)
    for value in (*controls, *targets):
        if value not in there:
            raise ValueError(f"column {key!r} has no value {value!r}; it has {', '.join(map(repr, there))}")
    both = [value for value in targets if value in controls]
    if both:
        raise ValueError(f"{both[0]!r} is both background and target; cohorts must not overlap")
    if not targets:
        raise ValueError(f"column {key!r} has only values of the background: {', '.join(map(repr, controls))}")
    cohorts = Cohorts(key, ("+".join(controls), *targets), (controls, *((value,) for value in targets)))
    return cohorts, cohorts.codes(mosaic)


def from_cells(mosaic: "Mosaic", background: Any, target: Any) -> tuple[Cohorts, np.ndarray]:
    """Cohorts from names, numbers or masks of cells, and the group number of every cell."""
    if background is None or target is None:
        which, several = ("background", "") if background is None else ("target", " or a dictionary of these")
        raise ValueError(f"{which} must be cells (names, numbers or a mask){several}; found None")
    groups = {"background": background, **(target if isinstance(target, Mapping) else {"target": target})}
    codes = np.full(mosaic.n_cells, NEITHER, dtype=np.int64)
    for code, (name, cells) in enumerate(groups.items()):
        try:
            numbers = mosaic.find(cells)
        except ValueError as error:
            raise ValueError(f"cohort {name!r}: {error}") from error
        taken = numbers[codes[numbers] != NEITHER]
        if len(taken):
            other = list(groups)[codes[taken[0]]]
            raise ValueError(
                f"cell {mosaic.obs_names[taken[0]]!r} is in cohort {other!r} and in {name!r}; cohorts must not overlap"
            )
        codes[numbers] = code
    return Cohorts(None, tuple(groups), tuple(() for _ in groups)), codes


def _words(values: Any) -> tuple[str, ...]:
    if isinstance(values, Mapping | pd.DataFrame):
        raise ValueError(f"a cohort must be a value or values of the column; found a {type(values).__name__}")
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes)
    found = tuple(map(word, values)) if several else (word(values),)
    if not found:
        raise ValueError("a cohort needs at least one value of the column; found an empty list")
    return found
