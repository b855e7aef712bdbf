"""Fresh worker processes: a new interpreter, which has imported nothing and does not run the main script."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import RLock
from types import ModuleType
from typing import Any

_launching = threading.Lock()


class Launcher:
    """What Pebble asks of a multiprocessing context; it makes processes of `WorkerProcess`.

    Attributes:
        started: the processes, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.started: list[WorkerProcess] = []
        self._spawn = get_context("spawn")

    def Process(self, **keywords: Any) -> WorkerProcess:  # noqa: N802  (multiprocessing's name)
        """A process, not yet started."""
        process = WorkerProcess(**keywords)
        self.started.append(process)
        return process

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802
        """As in multiprocessing."""
        return self._spawn.Pipe(duplex)

    def RLock(self) -> RLock:  # noqa: N802
        """As in multiprocessing."""
        return self._spawn.RLock()

    def get_start_method(self) -> str:
        """As in multiprocessing."""
        return "spawn"


class WorkerProcess(SpawnProcess):
    """A spawned process that does not run the driver's main script again, and that Ctrl-C does not reach."""

    def start(self) -> None:
        """Start it."""
        with _launching, _no_main_script(), _no_interrupt():
            super().start()


@contextlib.contextmanager
def _no_main_script() -> Iterator[None]:
    # multiprocessing would import the main script in each worker, to find what is defined there. Workers need
    # nothing of it, and it may import frameworks before `begin` sets variables, or start a campaign itself.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    # A new process inherits the mask, so that Ctrl-C prints no traceback while it still imports.
    mask: Callable[..., Any] = signal.pthread_sigmask
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        mask(signal.SIG_SETMASK, before)
