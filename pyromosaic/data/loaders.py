"""The order of the cells in minibatches, and the split into training, validation and test cells."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from pyromosaic.accepted import Count, Rate, Seed, Whole, checked
from pyromosaic.data.minibatch import Minibatch, measured
from pyromosaic.data.mosaic import Mosaic

BLOCK = 256  # neighbouring cells that stay together where measurements are read from files
N_HELD = 16_384  # cells of the next minibatches that are read from files at once


class _Minibatches(Dataset[Minibatch]):
    """Turns an array of cell numbers, perhaps with those of the next minibatches, into a minibatch."""

    def __init__(self, mosaic: Mosaic, n_cells: int) -> None:
        self.mosaic, self.n_cells = mosaic, n_cells

    def __getitem__(self, item: Any) -> Minibatch:
        index, ahead = item if isinstance(item, tuple) else (item, None)
        for modality in self.mosaic.modalities.values() if ahead is not None else ():
            rows = modality.rows[ahead]
            for matrix in (modality.matrix, modality.exposures):
                if matrix is not None:
                    matrix.hold(rows[rows >= 0])
        return measured(self.mosaic, index, self.n_cells)


def _on_disk(mosaic: Mosaic) -> bool:
    """Whether measurements are read from files."""
    return not all(modality.matrix.in_memory for modality in mosaic.modalities.values())


class Divided(Sampler[Any]):
    """Minibatches that several processes divide: each in the same order, and of every few the one that is its own.

    Every process has the same number of minibatches, and every cell of an epoch is in one of them. Cells that are read
    from files are shuffled in blocks of neighbours, and within so many blocks as are read at once.

    Parameters
    ----------
    n
        Number of cells to divide.
    size
        Largest number of cells in a minibatch.
    generator
        Generator of the order, in the same state in every process; None leaves the order as it is.
    on_disk
        Whether cells are read from files; then a minibatch is yielded together with the cells of some that follow.
    """

    def __init__(self, n: int, size: int, generator: np.random.Generator | None, on_disk: bool) -> None:
        self.n, self.size, self.generator, self.on_disk = n, size, generator, on_disk
        self.rank, self.n_processes = 0, 1

    def divide(self, rank: int, n_processes: int) -> None:
        """Yield the minibatches of one of several processes."""
        self.rank, self.n_processes = rank, n_processes

    def __len__(self) -> int:
        return max(1, min(-(-self.n // (self.size * self.n_processes)), self.n // self.n_processes))

    def __iter__(self) -> Iterator[Any]:
        # Lazily, because a loader with workers also makes an iterator that it does not use.
        every = self.portions(len(self) * self.n_processes)
        own = (portion for portion in islice(every, self.rank, None, self.n_processes) if len(portion))
        if not self.on_disk:
            yield from own
        while ahead := list(islice(own, max(1, N_HELD // self.size))):
            together = np.concatenate(ahead)
            yield from ((portion, together) for portion in ahead)

    def portions(self, n: int) -> Iterator[np.ndarray]:
        """The minibatches of all processes."""
        raise NotImplementedError

    def ordered(self, cells: np.ndarray) -> np.ndarray:
        """The cells in the order of this epoch."""
        if self.generator is None or not self.on_disk:
            return cells if self.generator is None else self.generator.permutation(cells)
        blocks = np.array_split(np.sort(cells), -(-len(cells) // BLOCK))
        order, n = self.generator.permutation(len(blocks)), max(1, N_HELD // BLOCK)
        together = (np.concatenate([blocks[i] for i in order[k : k + n]]) for k in range(0, len(order), n))
        return np.concatenate([self.generator.permutation(some) for some in together])


class _Portions(Divided):
    """Portions of nearly equal size, so that no minibatch is a remainder of one or two cells."""

    def __init__(self, cells: np.ndarray, size: int, generator: np.random.Generator | None, on_disk: bool) -> None:
        super().__init__(len(cells), size, generator, on_disk)
        self.cells = cells

    def portions(self, n: int) -> Iterator[np.ndarray]:
        yield from np.array_split(self.ordered(self.cells), n)


@checked
def loader(
    mosaic: Mosaic, cells: np.ndarray, batch_size: Count, seed: Seed | None = None, n_workers: Whole = 0
) -> DataLoader[Minibatch]:
    """Minibatches over `cells`, shuffled again in each epoch if a seed is given.

    Parameters
    ----------
    mosaic
        The data.
    cells
        Numbers of the cells in the mosaic.
    batch_size
        Largest number of cells in a minibatch. The sizes of minibatches differ by at most one cell.
    seed
        Seed of the shuffling; None leaves the order as it is.
    n_workers
        Processes that read ahead; 0 reads in the process itself.

    Returns
    -------
    torch.utils.data.DataLoader
        Yields a `Minibatch` at a time.

    Raises
    ------
    ValueError
        If there is no cell, or `batch_size` is below 1.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> [len(minibatch) for minibatch in loader(mosaic, mosaic.find(None), batch_size=40, seed=0)]
    [30, 30, 30]
    """
    if len(cells) == 0:
        raise ValueError("minibatches need at least one cell; found none")
    generator = None if seed is None else np.random.default_rng(seed)
    return DataLoader(
        _Minibatches(mosaic, len(cells)),
        sampler=_Portions(cells, batch_size, generator, _on_disk(mosaic)),
        batch_size=None,
        num_workers=n_workers,
    )


class _Pairs(Divided):
    """Minibatches of as many background as target cells; an epoch has each cell of the larger cohort once."""

    def __init__(
        self,
        cohorts: tuple[np.ndarray, np.ndarray],
        size: int,
        generator: np.random.Generator | None,
        on_disk: bool,
        replay: bool,
    ) -> None:
        super().__init__(max(len(cells) for cells in cohorts), size, generator, on_disk)
        self.cohorts, self.replay = cohorts, replay

    def divide(self, rank: int, n_processes: int) -> None:
        if self.replay and n_processes > 1:
            raise ValueError(
                "replay=True repeats the minibatches of a run in one process; train in one, or leave it out"
            )
        super().divide(rank, n_processes)

    def portions(self, n: int) -> Iterator[np.ndarray]:
        yield from self._replayed(n) if self.replay else self._resampled(n)

    def _resampled(self, n_pairs: int) -> Iterator[np.ndarray]:
        """When the smaller cohort is used up, it begins again in a new order."""
        longs = []
        for cells in self.cohorts:
            passes = [self.ordered(cells) for _ in range(-(-self.n // len(cells)))]
            longs.append(np.concatenate(passes)[: self.n])
        for background, target in zip(*(np.array_split(long, n_pairs) for long in longs), strict=True):
            yield np.concatenate([background, target])

    def _replayed(self, n_pairs: int) -> Iterator[np.ndarray]:
        """The minibatches of the smaller cohort repeat in the same order; the longer of two is cut to the shorter."""
        parts = []
        for cells in self.cohorts:
            order = self.ordered(cells)
            parts.append([order[i : i + self.size] for i in range(0, len(order), self.size)])
        for step in range(n_pairs):
            background, target = (part[step % len(part)] for part in parts)
            m = min(len(background), len(target))
            yield np.concatenate([background[:m], target[:m]])


@checked
def contrastive_loader(
    mosaic: Mosaic,
    cells: np.ndarray,
    batch_size: Count,
    seed: Seed | None = None,
    n_workers: Whole = 0,
    *,
    replay: bool = False,
) -> DataLoader[Minibatch]:
    """Minibatches of as many background cells as target cells, background first.

    Therefore both cohorts have the same weight in the objective, whatever their sizes. An epoch has each cell of the
    larger cohort once.

    Parameters
    ----------
    mosaic
        The data, with cohorts.
    cells
        Numbers of the cells in the mosaic; cells of neither cohort are left out.
    batch_size
        Largest number of cells of each cohort in a minibatch.
    seed
        Seed of the shuffling; None leaves the order as it is.
    n_workers
        Processes that read ahead; 0 reads in the process itself.
    replay
        Whether to repeat the minibatches of the smaller cohort within an epoch in the same order, and to cut the longer
        of two minibatches to the shorter, as the reference implementation does. If False, the smaller cohort is
        shuffled again.

    Returns
    -------
    torch.utils.data.DataLoader
        Yields a `Minibatch` at a time.

    Raises
    ------
    ValueError
        If a cohort has no cell, or `batch_size` is below 1.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50}, treated=1 / 3)[0])
    >>> mosaic = mosaic.with_cohorts("condition", background="control")
    >>> [minibatch.groups.bincount().tolist() for minibatch in contrastive_loader(mosaic, mosaic.find(None), 20)]
    [[20, 20], [20, 20], [20, 20]]
    """
    if mosaic.groups is None:
        raise ValueError("the mosaic has no cohorts; choose background and target cells by mosaic.with_cohorts")
    cohorts = cells[mosaic.groups[cells] == 0], cells[mosaic.groups[cells] > 0]
    if min(map(len, cohorts)) == 0:
        raise ValueError(
            "both cohorts need cells for training and (unless validation=0) for validation; "
            f"found {len(cohorts[0])} background and {len(cohorts[1])} target cells"
        )
    generator = None if seed is None else np.random.default_rng(seed)
    return DataLoader(
        _Minibatches(mosaic, 2 * max(map(len, cohorts))),
        sampler=_Pairs(cohorts, batch_size, generator, _on_disk(mosaic), replay),
        batch_size=None,
        num_workers=n_workers,
    )


@dataclass(frozen=True)
class Split:
    """Numbers of the cells for training, validation and test.

    Parameters
    ----------
    train, validation, test
        Numbers of the cells in the mosaic, each sorted, without overlap.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> parts = split(Mosaic.from_mudata(simulate(100, {"rna": 50})[0]), validation=0.1, test=0.2)
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (70, 10, 20)
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@checked
def split(mosaic: Mosaic, validation: Rate = 0.1, test: Rate = 0.0, seed: Seed = 0) -> Split:
    """Random split within each pattern of modalities and each cohort.

    Numbers of cells are rounded down; therefore few cells of a kind are all in the training part. If the mosaic has
    cohorts, cells of neither cohort are in no part.

    Parameters
    ----------
    mosaic
        The data.
    validation, test
        Shares of the cells; their sum must be below 1.
    seed
        Seed of the split.

    Returns
    -------
    Split
        Numbers of the cells of each part.

    Raises
    ------
    ValueError
        If the shares are negative or leave nothing to train on.

    Examples
    --------
    >>> from pyromosaic import Mosaic, simulate
    >>> mosaic = Mosaic.from_mudata(simulate(90, {"rna": 50, "adt": 5})[0], batch_key="batch")
    >>> parts = split(mosaic, validation=0.1, test=0.1)
    >>> len(parts.train), len(parts.validation), len(parts.test)
    (72, 9, 9)
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            f"validation and test must be at least 0, and their sum below 1; found {validation} and {test}"
        )
    generator = np.random.default_rng(seed)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    groups = np.zeros(mosaic.n_cells, dtype=np.int64) if mosaic.groups is None else mosaic.groups
    kinds = (mosaic.presence.to_numpy() @ (1 << np.arange(len(mosaic.modalities)))) + (groups << len(mosaic.modalities))
    for kind in np.unique(kinds[groups >= 0]):
        cells = generator.permutation(np.flatnonzero(kinds == kind))
        n_validation, n_test = int(validation * len(cells)), int(test * len(cells))
        for part, chosen in zip(
            parts, np.split(cells, [len(cells) - n_validation - n_test, len(cells) - n_test]), strict=True
        ):
            part.append(chosen)
    return Split(*(np.sort(np.concatenate(part)) for part in parts))
