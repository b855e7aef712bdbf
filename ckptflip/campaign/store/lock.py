"""One writer: a lock beside the store, which the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ckptflip.errors import CampaignError

# Somebody who only asks who holds the lock takes it for an instant: that must not turn a writer away.
_TRIES = 10
_PAUSE = 0.03


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The process that writes a store.

    Attributes:
        host: name of its machine; '' where it is not known.
        pid: its process; 0 likewise.
        since: when it began, UTC, ISO 8601; '' likewise.
    """

    host: str = ""
    pid: int = 0
    since: str = ""

    def __str__(self) -> str:
        where = f"process {self.pid} on {self.host}" if self.pid else "another process"
        return f"{where}, since {self.since}" if self.since else where


# Locks of this process: to the kernel they are no obstacle to it, and closing the file would drop them.
_held: dict[str, Holder] = {}


@contextlib.contextmanager
def only_writer(store: Path) -> Iterator[None]:
    """Be the only process that writes a store, for as long as the block runs.

    Args:
        store: the store's file, which need not exist yet; the lock is ``<store>.lock`` beside it.

    Raises:
        CampaignError: somebody else writes it (the message says who), or its folder cannot be written.
    """
    path = lock_path(store)
    if (other := _own(path)) is not None:
        raise CampaignError(_in_use(store, other))
    fd = _acquired(store, path)
    holder = Holder(host=socket.gethostname(), pid=os.getpid(), since=_now())
    _held[str(path)] = holder
    try:
        # For people and `status` alone: the kernel's lock is what counts.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, msgspec.json.encode(holder), 0)
        yield
    finally:
        # A child that was forked in between holds nothing, and takes nothing away.
        if _own(path) is not None:
            del _held[str(path)]
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        os.close(fd)


def holder_of(store: Path) -> Holder | None:
    """The process that writes a store now; None: nobody does."""
    path = lock_path(store)
    if (own := _own(path)) is not None:
        return own
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _lock(fd, fcntl.LOCK_SH) else _read(fd)
    finally:
        os.close(fd)


def lock_path(store: Path) -> Path:
    """The lock of a store: the same one under whatever name it is reached.

    Example:
        >>> lock_path(Path("/data/runs.db")).name
        'runs.db.lock'
    """
    real = Path(os.path.realpath(store))
    return real.with_name(f"{real.name}.lock")


def _own(path: Path) -> Holder | None:
    holder = _held.get(str(path))
    return holder if holder is not None and holder.pid == os.getpid() else None


def _acquired(store: Path, path: Path) -> int:
    """An open, locked descriptor of the file that has this name now."""
    holder = Holder()
    for _ in range(_TRIES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as why:
            raise CampaignError(
                f"{store} cannot be written: {why.strerror} ({path}). "
                "Keep it in a folder that you may write in"
            ) from None
        try:
            if _lock(fd, fcntl.LOCK_EX):
                if _still_named(fd, path):
                    return fd
                os.close(fd)
                continue
            holder = _read(fd)
        except OSError as why:
            os.close(fd)
            raise CampaignError(
                f"{store} cannot be locked: {why.strerror} ({path}). Keep it on a file system with locks"
            ) from None
        os.close(fd)
        time.sleep(_PAUSE)
    raise CampaignError(_in_use(store, holder))


def _lock(fd: int, kind: int) -> bool:
    """Take a lock at once or not at all. These locks are a process's own: a forked worker holds none."""
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _still_named(fd: int, path: Path) -> bool:
    # The one who held it before may have deleted it in between: then nobody else would meet this lock.
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _read(fd: int) -> Holder:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except (OSError, msgspec.MsgspecError):
        return Holder()


def _in_use(store: Path, holder: Holder) -> str:
    return (
        f"{store} is in use: {holder} writes it. Wait until it is done, or end it first; "
        "`ckptflip status` may look at any time"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
