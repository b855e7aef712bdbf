"""Files: locks, copies, and new files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import BinaryIO

from ckptflip.errors import CheckpointError, InUseError, UsageError

Progress = Callable[[int], None]
_COPY_STEP = 1 << 26
# Up to this size a digest of the whole file costs less than starting the program.
DIGEST_LIMIT = 1 << 24
_serial = count()


@contextlib.contextmanager
def locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock that HDF5 itself takes on an open file, while its bytes are read or altered.

    Args:
        path: the file.
        exclusive: for altering it (nobody else may hold it open); else for reading (no writer may).

    Raises:
        CheckpointError: the file is missing, not a plain file, or may not be read or written.
        InUseError: another process holds it.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for its other end.
        raise CheckpointError(f"{path} is not a plain file")
    try:
        fd = os.open(path, os.O_RDWR if exclusive else os.O_RDONLY)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as why:
        verb = "altered" if exclusive else "read"
        hint = "; make it writable, or write a new file with -o" if exclusive else ""
        raise CheckpointError(f"{path} cannot be {verb}: {why.strerror}{hint}") from None
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"{path} is open in another process; close it there and try again. Nothing was altered"
            ) from None
        except OSError:
            pass  # a file system without locks: HDF5 goes on without one too
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool, like: Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the final name.
        overwrite: whether an existing file may be replaced.
        like: a file whose permissions the new one gets.

    Raises:
        UsageError: `path` exists and may not be replaced, or is no plain file.
        CheckpointError: the folder is missing or cannot be written, or the disk is full.
    """
    with new_files([path], overwrite=overwrite, like=None if like is None else [like]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def new_files(
    paths: Sequence[Path],
    *,
    overwrite: bool,
    like: Sequence[Path] | None = None,
    follow: bool = False,
) -> Iterator[list[Path]]:
    """The same for several files, which appear all or none. The first one appears last.

    Args:
        paths: the final names.
        overwrite: whether existing files may be replaced.
        like: for each, a file whose permissions it gets.
        follow: replace what a link stands for. Otherwise the link itself is replaced: what it stands for may
            be anybody's.

    Raises:
        UsageError, CheckpointError: as for `new_file`.
    """
    if follow:
        paths = [p.resolve() if p.is_symlink() else p for p in paths]
    for path in paths:
        check_new(path, overwrite=overwrite)
    made: list[Path] = []
    try:
        for path in paths:
            made.append(_created(path))
        yield list(made)
        for i, temporary in enumerate(made):
            temporary.chmod(0o666 & ~_umask() if like is None else like[i].stat().st_mode & 0o7777)
        _publish_all(made, paths, overwrite=overwrite)
    except OSError as why:
        raise CheckpointError(
            f"{paths[0]} cannot be written: {why.strerror or why}; nothing was left behind"
        ) from None
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A name for something temporary in the folder of `path`, that nothing has yet."""
    return path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")


def _created(path: Path) -> Path:
    temporary = temporary_beside(path)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as why:
        raise CheckpointError(f"{path} cannot be written: {why.strerror} ({path.parent})") from None
    return temporary


def swap(temporary: Path, folder: Path) -> None:
    """Put a folder in the place of another, which is deleted."""
    aside = temporary_beside(folder)
    folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    import shutil

    shutil.rmtree(aside, ignore_errors=True)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a file may be written under this name."""
    if not path.name:
        raise UsageError(f"{str(path)!r} names no file; name the new file with -o")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a folder or a device, not a plain file; name another")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise UsageError(f"{path} exists; name another, or replace it with --overwrite")


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading; a pipe or device that would never end is refused.

    Raises:
        OSError: it is missing, cannot be read, or is no plain file.
    """
    if path.exists() and not path.is_file():
        raise OSError(0, "not a plain file", str(path))
    return path.open("rb")


def _publish_all(temporaries: Sequence[Path], paths: Sequence[Path], *, overwrite: bool) -> None:
    """Give new files their names, the first one last; on an error those already given are taken back."""
    if len(paths) == 1:
        _publish(temporaries[0], paths[0], overwrite=overwrite)
        return
    done: list[tuple[Path, Path | None]] = []
    try:
        for temporary, path in reversed(list(zip(temporaries, paths, strict=True))):
            if overwrite and (path.exists() or path.is_symlink()):
                done.append((path, _replace(temporary, path)))
            else:
                _publish(temporary, path, overwrite=overwrite)
                done.append((path, None))
    except BaseException:
        for path, aside in reversed(done):
            path.unlink() if aside is None else aside.replace(path)
        raise
    for _, aside in done:
        if aside is not None:
            aside.unlink()


def _replace(temporary: Path, path: Path) -> Path:
    """Give a new file the name of an old one, which is kept under the name that is returned."""
    aside = temporary_beside(path)
    path.rename(aside)
    try:
        temporary.replace(path)
    except OSError:
        aside.replace(path)
        raise
    return aside


def _publish(temporary: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise UsageError(f"{path} was created by another process meanwhile; name another") from None
    except OSError:
        temporary.replace(path)  # a file system without hard links


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Copy a file's bytes, by the kernel's own copy where there is one.

    Raises:
        OSError: the disk is full, or a file cannot be read or written.
    """
    with source.open("rb") as read, target.open("wb") as write:
        left = os.fstat(read.fileno()).st_size
        while left:
            step = _copy_step(read.fileno(), write.fileno(), min(left, _COPY_STEP))
            if not step:
                raise OSError(0, f"{source} shrank while it was copied")
            left -= step
            if progress:
                progress(step)


def _copy_step(read: int, write: int, count: int) -> int:
    try:
        return os.copy_file_range(read, write, count)
    except (AttributeError, OSError) as why:
        if isinstance(why, OSError) and why.errno not in _NO_COPY_RANGE:
            raise
    data = os.read(read, count)
    view = memoryview(data)
    while view:
        view = view[os.write(write, view) :]
    return len(data)


def _errnos(*names: str) -> frozenset[int]:
    import errno

    return frozenset(getattr(errno, n) for n in names if hasattr(errno, n))


_NO_COPY_RANGE = _errnos("ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "EPERM", "EBADF")


def sync(path: Path) -> None:
    """Force a file and its name in its folder to disk."""
    for each, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
        fd = os.open(each, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def digest(path: Path, *, limit: int | None = DIGEST_LIMIT) -> str | None:
    """SHA-256 of a file as ``sha256:…``, or None when the file is larger than `limit` bytes."""
    if limit is not None and path.stat().st_size > limit:
        return None
    import hashlib

    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
