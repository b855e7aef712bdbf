"""Stored values by key: what a zarr array asks of its store, and a folder as such a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from ckptflip.errors import CheckpointError


class Value(Struct, frozen=True, gc=False):
    """A stored value: a chunk, or a shard.

    Attributes:
        key: its name in the store.
        file: position of the file that holds it, among the checkpoint's files; -1 where it lies coded in the
            store's own index.
        offset: its first byte in that file.
        size: its bytes.
    """

    key: str
    file: int
    offset: int
    size: int


class Writer(Protocol):
    """The values of a copy of a store."""

    def read(self, key: str) -> bytes | None:
        """A value; None where there is none."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Set a value."""
        ...


class Store(Protocol):
    """Where the values of some arrays are."""

    def read(self, value: Value, start: int, length: int) -> bytes:
        """Some bytes of a value.

        Raises:
            CheckpointError: they cannot be read, or there are fewer.
        """
        ...

    def writing(self, root: Path) -> contextlib.AbstractContextManager[Writer]:
        """The values of a copy, to be altered; it is complete when the block ends.

        Args:
            root: the copy of the checkpoint's folder.

        Raises:
            CheckpointError: they cannot be written.
        """
        ...


class Folder:
    """A store whose values are files. Keys are paths from the checkpoint's folder, with slashes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, value: Value, start: int, length: int) -> bytes:
        """See `Store.read`."""
        path = self._root / value.key
        try:
            with open(path, "rb", opener=_no_link) as file:
                file.seek(start)
                data = file.read(length)
        except OSError as why:
            raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
        if len(data) != length:
            raise CheckpointError(f"{path} was truncated while it was read")
        return data

    @contextlib.contextmanager
    def writing(self, root: Path) -> Iterator[Writer]:
        """See `Store.writing`."""
        try:
            yield _Files(root)
        except OSError as why:
            raise CheckpointError(f"the altered copy cannot be written: {why.strerror or why}") from None


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW)


class _Files:
    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str) -> bytes | None:
        path = self._root / key
        return path.read_bytes() if path.exists() else None

    def write(self, key: str, data: bytes) -> None:
        path = self._root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
