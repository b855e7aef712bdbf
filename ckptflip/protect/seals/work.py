"""Many small pieces of work on a few threads, of which never more than a few are under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from ckptflip.errors import UsageError

T = TypeVar("T")
_MOST = 8


def workers_for(wanted: int | None) -> int:
    """How many threads: as many as were asked for, else one for each processor up to eight.

    Raises:
        UsageError: less than one was asked for.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"workers must be 1 or more, not {wanted}")
    return wanted if wanted is not None else min(_MOST, os.cpu_count() or 1)


def over(pieces: Iterable[T], work: Callable[[T], None], workers: int) -> None:
    """Do all pieces of work, in any order. The first error ends it and is raised.

    Args:
        pieces: taken one by one, when a thread has nothing to do.
        work: done on threads that share the processors while it hashes, reads or XORs.
        workers: threads; 1 works on the caller's own.
    """
    if workers == 1:
        for piece in pieces:
            work(piece)
        return
    left = iter(pieces)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with lock:
                piece = next(left, _END)
            if piece is _END:
                return
            try:
                work(piece)  # type: ignore[arg-type]
            except BaseException as why:
                errors.append(why)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as why:  # an interrupt, which reaches the main thread alone
        errors.append(why)
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]


_END = object()
