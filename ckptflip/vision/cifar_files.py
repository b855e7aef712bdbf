"""Where CIFAR's files lie: in a folder, in the official folder inside it, or in the archive as downloaded."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ckptflip.checkpoints.files import open_plain
from ckptflip.errors import UsageError, WorkloadError

# CIFAR-100's python training set is the largest file, of 155 MB; the largest archive unpacks to 187 MB.
_LARGEST = 1 << 28
_MOST_MEMBERS = 64
_STEP = 1 << 20
Opened = tuple[IO[bytes], int]


@dataclass(frozen=True, slots=True)
class Files:
    """Some files by name.

    Attributes:
        where: the folder or archive, for messages.
        names: of the files in it.
        open: gives a file and its size.
    """

    where: str
    names: frozenset[str]
    open: Callable[[str], AbstractContextManager[Opened]]


@contextmanager
def files(path: Path, folders: Sequence[str]) -> Iterator[list[Files]]:
    """The places at a path where files of a data set may lie.

    Args:
        path: a folder, or an archive.
        folders: names of the official folders; the archive of ``x-y-z`` begins with ``x-y``.

    Raises:
        UsageError: there is nothing at the path.
        WorkloadError: an archive is damaged.
    """
    if path.is_file():
        with _archive(path) as found:
            yield [found]
        return
    if not path.is_dir():
        raise UsageError(f"there is no folder or archive {path}")
    places = [_folder(place) for place in (path, *(path / name for name in folders)) if place.is_dir()]
    archives = sorted({path / name for name in map(archive_name, folders) if (path / name).is_file()})
    with contextlib.ExitStack() as stack:
        places += [stack.enter_context(_archive(archive)) for archive in archives]
        yield places


def archive_name(folder: str) -> str:
    """The official archive's name, by the folder it unpacks to.

    Example:
        >>> archive_name("cifar-10-batches-py"), archive_name("cifar-100-binary")
        ('cifar-10-python.tar.gz', 'cifar-100-binary.tar.gz')
    """
    data, number, kind = folder.split("-")[0], folder.split("-")[1], folder.split("-")[-1]
    kind = {"py": "python", "bin": "binary"}.get(kind, kind)
    return f"{data}-{number}-{kind}.tar.gz"


def _folder(path: Path) -> Files:
    @contextmanager
    def opened(name: str) -> Iterator[Opened]:
        try:
            with open_plain(path / name) as file:
                yield file, (path / name).stat().st_size
        except OSError as error:
            raise WorkloadError(f"{path / name} cannot be read: {error.strerror or error}") from error

    names = frozenset(child.name for child in path.iterdir() if child.is_file())
    return Files(str(path), names, opened)


@contextmanager
def _archive(path: Path) -> Iterator[Files]:
    try:
        content = dict(_members(path))
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        raise WorkloadError(
            f"{path} is no sound .tar.gz archive ({error}): download it again, or name a folder"
        ) from error

    @contextmanager
    def opened(name: str) -> Iterator[Opened]:
        yield io.BytesIO(content[name]), len(content[name])

    yield Files(str(path), frozenset(content), opened)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The plain files in an archive, by their last name. In one pass: going back would unpack it again."""
    total = 0
    with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
        for number, member in enumerate(archive):
            total += member.size
            if number >= _MOST_MEMBERS or total > _LARGEST:
                raise WorkloadError(f"{path} is larger than any official CIFAR archive; is it another one?")
            file: Any = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield Path(member.name).name, file.read()
        # The checksum stands behind the archive's last byte, which tarfile does not care to reach.
        while total < _LARGEST and (rest := unpacked.read(_STEP)):
            total += len(rest)
