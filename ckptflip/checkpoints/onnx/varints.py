"""Numbers of ONNX tensors that are stored as varints: of no fixed width, so decoded and encoded anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.onnx.model import Span, encoded, tensors, with_lengths
from ckptflip.checkpoints.protobuf import FileBytes, ProtobufError
from ckptflip.checkpoints.splice import Edit, splice
from ckptflip.errors import CheckpointError

_LONGEST = 10


class Numbers(Struct, frozen=True):
    """A list of varints in a model.

    Attributes:
        position: of its tensor among all tensors of the model.
        field: the number of the field that holds it.
        span: where it lies.
        number: the format of an element.
        count: how many varints there should be.
    """

    position: int
    field: int
    span: Span
    number: NumberFormat
    count: int


class Varints:
    """The lists of a model as decoded bytes. See `ckptflip.checkpoints.laid.Blobs`.

    Args:
        path: the model.
        lists: in the order of the blobs.
    """

    def __init__(self, path: Path, lists: Sequence[Numbers]) -> None:
        self._path = path
        self._lists = lists

    def decode(self, blob: int) -> NDArray[np.uint8]:
        """The words of a list, side by side.

        Raises:
            CheckpointError: the list is damaged.
        """
        each = self._lists[blob]
        try:
            with open_plain(self._path) as file:
                raw = FileBytes(file.fileno())[each.span.start : each.span.end]
            values, _ = parsed(np.frombuffer(raw, np.uint8), each.count)
        except OSError as why:
            raise CheckpointError(f"{self._path} cannot be read: {why.strerror or why}") from None
        except (DamagedError, ProtobufError) as why:
            raise CheckpointError(f"{self._path} is a damaged ONNX model: {why}") from None
        return values.astype(each.number.word_dtype.newbyteorder("<")).view(np.uint8)

    def extent(self, blob: int) -> tuple[int, int, int, str]:
        """Where a list is stored: file, first and end byte, and what it is."""
        span = self._lists[blob].span
        return 0, span.start, span.end, "list of varints"

    def encode(self, changed: Mapping[int, NDArray[np.uint8]], paths: Sequence[Path], checksum: str) -> None:
        """Write new words of some lists into a copy of the model, and the lengths of all that they lie in.

        Raises:
            CheckpointError: the copy is damaged, or cannot be written.
        """
        edits: list[tuple[Span, Edit]] = []
        try:
            with open_plain(paths[0]) as file:
                data = FileBytes(file.fileno())
                # In a copy with other names in it, the lists lie elsewhere.
                stored = tensors(data)
                for blob, words in changed.items():
                    each = self._lists[blob]
                    edits += _edits(data, stored[each.position].data[each.field], each, words)
        except (OSError, DamagedError, ProtobufError) as why:
            raise CheckpointError(f"{paths[0]} cannot be altered: {why}") from None
        splice(paths[0], with_lengths(edits))


def parsed(raw: NDArray[np.uint8], count: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Varints that lie side by side.

    Args:
        raw: their bytes.
        count: how many there should be.

    Returns:
        Their values, and where each begins in `raw`.

    Raises:
        DamagedError: there are more or fewer, or one is too long.

    Example:
        >>> parsed(np.array([0x96, 1, 5], np.uint8), 2)
        (array([150,   5], dtype=uint64), array([0, 2]))
    """
    last = np.flatnonzero(raw < 0x80)
    if last.size != count or (raw.size and (not last.size or last[-1] != raw.size - 1)):
        raise DamagedError(f"a list of {count} numbers holds {last.size}")
    starts = np.concatenate([[0], last[:-1] + 1])[:count].astype(np.int64)
    if not count:
        return np.empty(0, np.uint64), starts
    lengths = last - starts + 1
    if lengths.max() > _LONGEST:
        raise DamagedError(f"a number of a list has {lengths.max()} bytes, of at most {_LONGEST}")
    shifts = (np.arange(raw.size) - np.repeat(starts, lengths)) * 7
    parts = (raw & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts), starts


def _edits(
    data: FileBytes, span: Span, numbers: Numbers, words: NDArray[np.uint8]
) -> list[tuple[Span, Edit]]:
    """Edits of the numbers that differ."""
    raw = np.frombuffer(data[span.start : span.end], np.uint8)
    values, starts = parsed(raw, numbers.count)
    stored = numbers.number.word_dtype.newbyteorder("<")
    new = words.view(stored)
    ends = np.append(starts[1:], raw.size)
    return [
        (span, Edit(span.start + int(starts[i]), int(ends[i] - starts[i]), encoded(value)))
        for i, value in _wide(new, values.astype(stored), numbers.number)
    ]


def _wide(new: NDArray[Any], old: NDArray[Any], number: NumberFormat) -> list[tuple[int, int]]:
    """Positions and values of the words that differ, as the 64-bit numbers that a varint stores."""
    at = np.flatnonzero(new != old)
    found = new[at]
    if number.kind == "int" and number.part_width >= 8:
        # A negative number is stored with all 64 bits.
        found = found.astype(number.word_dtype).view(f"i{number.word_size}").astype(np.int64).view(np.uint64)
    return list(zip(at.tolist(), found.tolist(), strict=True))
