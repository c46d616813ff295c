"""One bar for one long task, with the time left, wherever it is seen: in a terminal, a notebook or a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import RLock
from typing import Any, Self, TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
MINUTE = 60.0


class _Tqdm(tqdm):
    _lock = RLock()  # tqdm's own is a semaphore, which a killed process leaves behind
    monitor_interval = 0  # and a thread


class Bar:
    """A progress bar on the standard error.

    A terminal and a notebook show one line, which is updated in place; a notebook stores only the last state. A log
    gets a line a minute, and none of a task that takes less.

    Parameters
    ----------
    task
        What is being done.
    total
        Number of steps.

    Examples
    --------
    >>> with Bar("Counting", total=3) as bar:
    ...     for _ in range(3):
    ...         bar.advance()
    """

    def __init__(self, task: str, total: int) -> None:
        file, width, pause = _place()
        self._bar = _Tqdm(
            desc=task,
            total=total,
            file=file,
            bar_format=FORMAT,
            mininterval=pause,
            delay=pause if pause == MINUTE else 0,
            miniters=1,
            ncols=width,
            dynamic_ncols=width is None,
        )

    def advance(self, n_steps: int = 1) -> None:
        """So many steps more are done."""
        self._bar.update(n_steps)

    def say(self, task: str, note: str = "") -> None:
        """What is being done now, and a note on it."""
        self._bar.set_description_str(task, refresh=False)
        self._bar.set_postfix_str(note, refresh=False)

    @property
    def done(self) -> int:
        """Number of steps that are done."""
        return int(self._bar.n)

    @done.setter
    def done(self, n_steps: int) -> None:
        self._bar.n = self._bar.initial = n_steps  # those of an earlier run took no time of this one

    @property
    def total(self) -> int:
        """Number of steps in all."""
        return int(self._bar.total)

    @total.setter
    def total(self, n_steps: int) -> None:
        self._bar.total = n_steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()


def shown(wanted: bool | Bar, task: str, total: int) -> AbstractContextManager[Bar | None]:
    """The bar of a task: a new one, one that is there already, or none.

    Parameters
    ----------
    wanted
        Whether to show a bar; or the bar of a larger task, of which this one is a part.
    task, total
        As in `Bar`, for a new one.
    """
    if isinstance(wanted, Bar):
        return nullcontext(wanted)
    return Bar(task, total) if wanted else nullcontext(None)


_WATCHER: ContextVar[Callable[[int], object] | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Callable[[int], object]) -> Iterator[None]:
    """Context inside which every method that goes through cells says how many more are done.

    Parameters
    ----------
    watcher
        Called with a number of cells, e.g. `Bar.advance`.

    Examples
    --------
    >>> from pyromosaic import Mosaic, MultiVI, simulate
    >>> model, done = MultiVI(Mosaic.from_mudata(simulate(60, {"rna": 50, "adt": 5})[0])), []
    >>> with watched(done.append):
    ...     found = model.get_imputed_values("adt", n_samples=2)
    >>> sum(done)
    60
    """
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def tell(n_cells: int) -> None:
    """Tell the watcher, if there is one, that so many cells are done."""
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher(n_cells)


def _place() -> tuple[Any, int | None, float]:
    """Where a bar is seen: a file, its width (None: that of the terminal), and seconds between two updates."""
    if _in_notebook():
        return _Notebook(), 100, 0.5
    if sys.stderr is not None and sys.stderr.isatty():
        return sys.stderr, None, 0.1
    return _Log(sys.stderr), 100, MINUTE


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class _Notebook:
    """A file whose one line is an output of the cell, displayed when it is first written and then updated."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._output: Any = None

    def write(self, text: str) -> None:
        from IPython.display import display

        if not text.strip():
            return
        content = {"text/plain": text.strip()}
        if self._output is None:
            self._output = display(content, raw=True, display_id=True)
        else:
            self._output.update(content, raw=True)

    def flush(self) -> None:
        """Nothing is held back."""


class _Log:
    """A file in which every state is a line of its own."""

    encoding = "utf-8"

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if text.strip() and self._file is not None:
            print(text.strip(), file=self._file, flush=True)

    def flush(self) -> None:
        """Nothing is held back."""
