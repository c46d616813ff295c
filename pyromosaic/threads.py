"""One thread at a time: all threads of a process share Pyro's handlers and settings and PyTorch's random numbers."""

import os
import threading
from contextlib import ContextDecorator
from typing import Any


class OneThread(ContextDecorator):
    """Context, or decorator, inside which there is one thread at a time; others wait until it has left.

    Without it, programs that run in two threads would see each other's sites, settings and random numbers. A thread
    that is inside may enter again.

    Examples
    --------
    >>> with one_thread, one_thread:
    ...     "inside"
    'inside'
    """

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def _renew(self) -> None:
        self.lock, self.holder, self.depth = threading.RLock(), 0, 0

    def _after_fork(self) -> None:
        """Start without a holder in a forked process, where a thread that was inside no longer exists."""
        if self.holder != threading.get_ident():
            self._renew()

    def __enter__(self) -> None:
        self.lock.acquire()
        self.holder, self.depth = threading.get_ident(), self.depth + 1

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        self.holder = self.holder if self.depth else 0
        self.lock.release()


one_thread = OneThread()
