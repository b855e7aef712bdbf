"""Where a bundle's tensors and their checksums lie: what its index claims, checked against its data files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.listing import DamagedError, bits_of, check_apart
from ckptflip.checkpoints.pieces import Layout, Piece, contiguous, strides_of
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.tensorbundle.entries import Index, Saved
from ckptflip.checkpoints.tensorbundle.slices import KEY_START, MOST_SLICES, Box, box, cover, slice_key
from ckptflip.errors import CheckpointError

STRING = 7
# TensorFlow's DataType. All take whole bytes, also those of fewer bits.
_DTYPES = {
    1: "float32",
    2: "float64",
    19: "float16",
    14: "bfloat16",
    24: "float8_e5m2",
    25: "float8_e4m3fn",
    26: "float8_e4m3fnuz",
    27: "float8_e4m3b11fnuz",
    28: "float8_e5m2fnuz",
    33: "float4_e2m1fn",
    6: "int8",
    5: "int16",
    3: "int32",
    9: "int64",
    29: "int4",
    31: "int2",
    4: "uint8",
    17: "uint16",
    22: "uint32",
    23: "uint64",
    30: "uint4",
    32: "uint2",
    10: "bool",
    8: "complex64",
    18: "complex128",
    # The quantised ones: qint8, quint8, qint32, qint16, quint16.
    11: "int8",
    12: "uint8",
    13: "int32",
    15: "int16",
    16: "uint16",
}
_OTHERS = {STRING: "strings", 20: "a resource", 21: "variants"}


class Placed(Struct, frozen=True):
    """A tensor of numbers.

    Attributes:
        key: its key, as text.
        shape: elements along each axis.
        layout: where its words lie.
        how: the layout in words.
    """

    key: str
    shape: tuple[int, ...]
    layout: Layout
    how: str


def as_text(key: bytes) -> str:
    """A key as text; bytes that are no UTF-8 are written as escapes."""
    return key.decode("utf-8", "backslashreplace")


def check_places(index: Index, files: Mapping[int, Path]) -> None:
    """Check that all entries lie in their data files, apart from each other.

    Args:
        index: what the index says.
        files: the data files, all that an entry names among them.

    Raises:
        CheckpointError: a data file ends before an entry does, or cannot be read.
        DamagedError: two entries overlap.
    """
    sizes = {shard: _size(path) for shard, path in files.items()}
    ranges: dict[int, list[tuple[int, int, str]]] = {}
    for saved in index.saved:
        if saved.slices:
            continue
        end = saved.offset + saved.size
        if end > sizes[saved.shard]:
            raise CheckpointError(
                f"{files[saved.shard]} is truncated: it has {sizes[saved.shard]} bytes, and by its index "
                f"{as_text(saved.key)!r} lies at bytes {saved.offset} to {end}. Copy or download it again"
            )
        ranges.setdefault(saved.shard, []).append((saved.offset, end, as_text(saved.key)))
    for each in ranges.values():
        check_apart(each)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None


def placed(index: Index, files: Mapping[int, int]) -> tuple[list[Placed], list[Skipped]]:
    """The tensors of numbers, and what is left out.

    Args:
        index: what the index says, already checked by `check_places`.
        files: each data file's position in the checkpoint's list of files.

    Raises:
        DamagedError: an entry contradicts itself.
    """
    slices = {s.key: s for s in index.saved if s.key.startswith(KEY_START)}
    found: list[Placed] = []
    skipped: list[Skipped] = []
    for saved in index.saved:
        if saved.key in slices:
            continue
        key = as_text(saved.key)
        if saved.dtype not in _DTYPES:
            skipped.append(Skipped(key, _OTHERS.get(saved.dtype, f"its dtype is number {saved.dtype}")))
            continue
        try:
            layout = _layout(saved, slices, files, index.order)
        except DamagedError as why:
            raise DamagedError(f"{key!r}: {why}") from None
        if isinstance(layout, str):
            skipped.append(Skipped(key, layout))
            continue
        count = len(layout.pieces)
        found.append(Placed(key, saved.shape, layout, f"{count} slices" if saved.slices else "contiguous"))
    skipped += [Skipped(as_text(key), "a slice of no tensor") for key in slices]
    return found, skipped


def stored_crcs(index: Index, files: Mapping[int, int]) -> list[StoredCrc]:
    """The CRCs of tensors, and then those of the index's blocks, which cover the former."""
    inner = [
        StoredCrc("crc32c", files[s.shard], s.offset, s.size, ((0, s.checksum),), masked=True)
        for s in index.saved
        if s.checksum is not None and s.dtype in _DTYPES and not s.slices
    ]
    # The byte that says how a block is compressed is covered too.
    return inner + [
        StoredCrc("crc32c", 0, b.start, b.length + 1, ((0, b.end + 1),), masked=True) for b in index.blocks
    ]


def _layout(saved: Saved, slices: dict[bytes, Saved], files: Mapping[int, int], order: str) -> Layout | str:
    """Where a tensor's words lie; or why it is left out. Takes its slices out of `slices`."""
    number = lookup_name(_DTYPES[saved.dtype])
    order = order if number.word_size > 1 else "<"
    if not saved.slices:
        _check_size(saved, saved.shape, number)
        return contiguous(files[saved.shard], saved.offset, number, saved.shape, order)
    bits_of(saved.shape, _width(number))
    parts: list[Saved] = []
    boxes: list[Box] = []
    for extents in saved.slices:
        part = slices.pop(slice_key(saved.key, extents), None)
        if part is not None:
            starts, lengths = box(extents, saved.shape)
            if part.dtype != saved.dtype:
                raise DamagedError("a slice of it has another dtype")
            _check_size(part, lengths, number)
            parts.append(part)
            boxes.append((starts, lengths))
    if len(parts) > MOST_SLICES:
        return f"it has more than {MOST_SLICES} slices"
    if not cover(boxes, saved.shape):
        return "some of its slices were not saved here"
    pieces = [_piece(files[p.shard], p.offset, number, b) for p, b in zip(parts, boxes, strict=True)]
    dims = saved.shape if number.parts == 1 else (*saved.shape, number.parts)
    return Layout(dims, tuple(pieces), number, order)


def _piece(file: int, offset: int, number: NumberFormat, at: Box) -> Piece:
    starts, shape = at
    if number.parts > 1:
        starts, shape = (*starts, 0), (*shape, number.parts)
    return Piece(file, offset, shape, strides_of(shape, number.word_size * 8), starts)


def _check_size(saved: Saved, shape: Sequence[int], number: NumberFormat) -> None:
    needed = bits_of(shape, _width(number)) // 8
    if tuple(shape) != saved.shape or needed != saved.size:
        raise DamagedError(
            f"{needed} bytes are needed for its shape {list(shape)}, and its entry claims {saved.size} for "
            f"{list(saved.shape)}"
        )


def _width(number: NumberFormat) -> int:
    """Bits of an element in the file."""
    return number.parts * number.word_size * 8
