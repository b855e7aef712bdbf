"""The files of a sealed set as one stream of bytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.errors import CheckpointError


class State(Struct, frozen=True):
    """What tells whether a file was written meanwhile: size in bytes, time in nanoseconds, inode."""

    size: int
    modified: int
    inode: int


def state_of(path: Path) -> State | None:
    """The state of a plain file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    # Opening a pipe would wait for its other end.
    return State(found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


class Stream:
    """Files end to end, each taken to have the bytes that it had when it was sealed.

    Safe to be read by several threads: nothing is kept open.

    Args:
        paths: the files; None for those that are missing.
        starts: where each begins in the stream, and the end.
        whole: what is missing or unreadable is an error; else it reads as zeros.
    """

    def __init__(self, paths: Sequence[Path | None], starts: NDArray[np.int64], *, whole: bool) -> None:
        self._paths = paths
        self._starts = starts
        self._whole = whole

    def read(self, start: int, end: int) -> NDArray[np.uint8]:
        """The bytes from `start` to `end`.

        Raises:
            CheckpointError: some are missing, and all are wanted.
        """
        data = np.empty(end - start, np.uint8)
        file = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < end:
            stop = min(end, int(self._starts[file + 1]))
            if stop > at:
                view = data[at - start : stop - start]
                self._fill(self._paths[file], at - int(self._starts[file]), view)
                at = stop
            file += 1
        return data

    def _fill(self, path: Path | None, offset: int, view: NDArray[np.uint8]) -> None:
        done = 0
        try:
            done = _read(path, offset, view) if path is not None else 0
        except OSError as why:
            if self._whole:
                raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
        if done < view.size and self._whole:
            raise CheckpointError(f"{path} became shorter while it was read; seal it when nothing writes it")
        view[done:] = 0


def _read(path: Path, offset: int, view: NDArray[np.uint8]) -> int:
    """Fill a buffer from a file; how many bytes there were."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < view.size:
            count = os.preadv(descriptor, [view[done:].data], offset + done)
            if not count:
                break
            done += count
        return done
    finally:
        os.close(descriptor)
