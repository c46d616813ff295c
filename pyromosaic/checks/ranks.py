"""Ranks of true values among draws that should be exchangeable with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from pyromosaic.accepted import Count, Level, Seed, checked


@dataclass(frozen=True)
class Ranks:
    """Ranks of true values among draws from the distributions under test.

    If a distribution is right, the true value is like another draw from it, and its rank is uniform.

    Parameters
    ----------
    below, equal
        Number of draws below the true value, and equal to it: cells × quantities. The columns have the levels
        ``variable`` (a latent variable or a modality) and ``name``; NaN where a cell has no such quantity.
    n_samples
        Number of draws.

    Examples
    --------
    >>> columns = pd.MultiIndex.from_tuples([("z", "z_0")], names=["variable", "name"])
    >>> below = pd.DataFrame(np.arange(1000)[:, None] % 100, columns=columns)  # of 99 draws, evenly: all is right
    >>> ranks = Ranks(below, 0 * below, n_samples=99)
    >>> bool(ranks.test()["p_value"].item() > 0.05)
    True
    >>> bool(abs(ranks.coverage([0.9])["randomised"].item() - 0.9) < 0.02)
    True
    """

    below: pd.DataFrame
    equal: pd.DataFrame
    n_samples: int

    def __repr__(self) -> str:
        variables = ", ".join(
            f"{name} ({n})" for name, n in self.below.columns.get_level_values(0).value_counts().items()
        )
        return f"Ranks of {len(self.below)} cells among {self.n_samples} draws: {variables}"

    @checked
    def uniform(self, seed: Seed = 0) -> pd.DataFrame:
        """Ranks as numbers between 0 and 1, uniform if the distributions are right.

        If a true value equals some draws, as counts often do, it gets a random rank among them. Therefore ranks are
        uniform for discrete values too: this is the randomised probability integral transform.

        Parameters
        ----------
        seed
            Seed of the random ranks.
        """
        places = np.random.default_rng(seed).random(self.below.shape)
        return (self.below + places * (self.equal + 1)) / (self.n_samples + 1)

    @checked
    def coverage(
        self, levels: Sequence[Level] = (0.5, 0.9), by: pd.Series | None = None, seed: Seed = 0
    ) -> pd.DataFrame:
        """Share of true values inside central intervals of the draws, over cells and quantities of each variable.

        Parameters
        ----------
        levels
            Levels of the intervals, between 0 and 1.
        by
            Group of each cell, matched by name; all cells together by default.
        seed
            Seed of `uniform`.

        Returns
        -------
        pandas.DataFrame
            By variable, group (if any) and level: ``interval``, the share in the closed interval between two quantiles
            of the draws; ``randomised``, the share whose rank (see `uniform`) is in the middle; and ``n``, the number
            of values. Both shares are the same for continuous values. For counts, the closed interval contains more
            than its level even for right distributions, because it includes all draws equal to an end; if most counts
            are 0, it contains nearly everything. The randomised share equals the level for right distributions.
        """
        uniform = self.uniform(seed)
        groups = (
            {(): self.below.index} if by is None else {(k,): i for k, i in by.groupby(by, observed=True).groups.items()}
        )
        table = {}
        for variable in self.below.columns.unique(0):
            for group, cells in groups.items():
                within = self.below.index.intersection(cells)
                below, equal, place = (t.loc[within, variable].to_numpy() for t in (self.below, self.equal, uniform))
                known = ~np.isnan(below)
                if not known.any():
                    continue
                below, equal, place = (values[known] for values in (below, equal, place))
                for level in levels:
                    tail = (1 - level) / 2
                    inside = (below + equal >= tail * self.n_samples) & (below <= (1 - tail) * self.n_samples)
                    middle = np.abs(place - 0.5) <= level / 2
                    table[(variable, *group, level)] = (inside.mean(), middle.mean(), len(below))
        names = ["variable", *([] if by is None else [by.name or "group"]), "level"]
        index = pd.MultiIndex.from_tuples(list(table), names=names)
        return pd.DataFrame(list(table.values()), index, ["interval", "randomised", "n"])

    @checked
    def test(self, n_bins: Count = 20, seed: Seed = 0) -> pd.DataFrame:
        """Chi-square test of uniformity of each quantity over cells.

        Parameters
        ----------
        n_bins
            Number of bins of equal width.
        seed
            Seed of `uniform`.

        Returns
        -------
        pandas.DataFrame
            By variable and name: ``chi2``, ``p_value``, and the number ``n`` of cells.
        """
        rows = []
        uniform = self.uniform(seed)
        for column in uniform:
            values = uniform[column].dropna()
            counts = np.histogram(values, n_bins, (0, 1))[0]
            rows.append((*stats.chisquare(counts), len(values)))
        return pd.DataFrame(rows, uniform.columns, ["chi2", "p_value", "n"])
