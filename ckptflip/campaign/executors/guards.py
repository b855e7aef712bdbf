"""What a worker process does about itself: it dies with its driver, and above its memory limit."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, parent_process
from pathlib import Path

# Exit codes of workers that ended themselves; unusual ones, so that no library's code is taken for them.
OUT_OF_MEMORY = 117
ORPHANED = 118

_INTERVAL = 0.05  # seconds between two looks at the memory: 1 GB can be touched in about 0.2 s
_PR_SET_PDEATHSIG = 1
_STATM = Path("/proc/self/statm")


def resident() -> int:
    """Resident bytes of this process; where the system does not tell, the most it ever had.

    Example:
        >>> resident() > 1_000_000
        True
    """
    try:
        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, else KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Guard:
    """A thread that ends this process when it takes too much memory or its parent is gone.

    Attributes:
        limit: resident bytes, or None; set by `within`.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._deciding = threading.Lock()
        self._parent = os.getppid()

    def start(self) -> None:
        """Begin to watch; at once if the parent is gone already."""
        self._ask_kernel()
        threading.Thread(target=self._watch, name="ckptflip guard", daemon=True).start()

    @contextlib.contextmanager
    def within(self, limit: int | None) -> Iterator[None]:
        """Keep to `limit` resident bytes in this block.

        Outside it the process is never ended for its memory, so an answer on its way is never cut in two.
        """
        self.limit = limit
        try:
            yield
        finally:
            with self._deciding:
                self.limit = None

    def _ask_kernel(self) -> None:
        """Have Linux send SIGKILL when the thread that started us ends, even in a hung C function."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:
            os._exit(ORPHANED)

    def _watch(self) -> None:
        parent = parent_process()
        sentinels = [parent.sentinel] if parent is not None else []
        while True:
            if connection.wait(sentinels, timeout=_INTERVAL) or os.getppid() != self._parent:
                os._exit(ORPHANED)
            with self._deciding:
                limit = self.limit
                if limit is not None and (size := resident()) > limit:
                    note = f"ckptflip: {size:,} resident bytes are more than the limit of {limit:,}\n"
                    os.write(2, note.encode())
                    os._exit(OUT_OF_MEMORY)
