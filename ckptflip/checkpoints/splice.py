"""Writing a file anew with some ranges of its bytes replaced, by others of any length."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from ckptflip.checkpoints.files import new_file
from ckptflip.errors import CheckpointError

_STEP = 1 << 20


class Edit(Struct, frozen=True):
    """New bytes in place of some of a file's.

    Attributes:
        offset: the first byte that goes.
        length: how many go.
        data: what comes instead.
    """

    offset: int
    length: int
    data: bytes


def splice(path: Path, edits: Iterable[Edit]) -> None:
    """Put a file with replaced ranges in the place of the old one.

    Args:
        path: the file; one that nobody else has open.
        edits: of ranges that do not overlap, in any order.

    Raises:
        CheckpointError: the file cannot be read or written; it is as it was before.
    """
    with (
        path.open("rb") as old,
        new_file(path, overwrite=True, like=path) as temporary,
        temporary.open("wb") as new,
    ):
        at = 0
        for edit in sorted(edits, key=lambda e: e.offset):
            if edit.offset < at:
                raise CheckpointError(f"{path} is damaged: two of its parts share byte {edit.offset}")
            _copy(path, old, new, at, edit.offset)
            new.write(edit.data)
            at = edit.offset + edit.length
        _copy(path, old, new, at, os.fstat(old.fileno()).st_size)


def spliced(data: bytes, edits: Iterable[Edit]) -> bytes:
    """The same for bytes in memory.

    Example:
        >>> spliced(b"abcdef", [Edit(3, 1, b"--"), Edit(0, 2, b"")])
        b'c--ef'
    """
    parts: list[bytes] = []
    at = 0
    for edit in sorted(edits, key=lambda e: e.offset):
        parts += [data[at : edit.offset], edit.data]
        at = edit.offset + edit.length
    return b"".join([*parts, data[at:]])


def _copy(path: Path, old: BinaryIO, new: BinaryIO, start: int, end: int) -> None:
    old.seek(start)
    while start < end:
        step = old.read(min(_STEP, end - start))
        if not step:
            raise CheckpointError(f"{path} was truncated while it was copied")
        new.write(step)
        start += len(step)
