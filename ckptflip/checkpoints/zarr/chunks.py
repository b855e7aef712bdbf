"""Where the words of a zarr array lie: boxes in the files of its chunks, or in chunks that are coded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.pieces import Layout, Piece, strides_of
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.zarr import shards
from ckptflip.checkpoints.zarr.fill import fill_bytes
from ckptflip.checkpoints.zarr.metadata import ArrayHeader, UnsupportedError
from ckptflip.checkpoints.zarr.values import Store, Value

Place = tuple[int, ...]
# Decoded at once, and held in memory.
_LONGEST_CODED = 1 << 31
# What is coded may be a little longer than what it stands for.
_CODED_SLACK = 1 << 16
_CRC = 4


class Stored(Struct, frozen=True):
    """An array and the values that hold it.

    Attributes:
        name: in the catalogue.
        header: its metadata.
        prefix: what the keys of its chunks start with in the store.
        values: chunks or shards, by their place in the grid.
        store: where they are.
    """

    name: str
    header: ArrayHeader
    prefix: str
    values: Mapping[Place, Value]
    store: Store


class Coded(Struct, frozen=True, gc=False):
    """A chunk whose bytes do not lie in a file as they are.

    Attributes:
        array: it belongs to.
        key: of the value that holds it, or would hold it.
        value: None where that was never written.
        inner: its place in the shard's index; -1 where there are no shards.
        start: its first byte in the value.
        length: its bytes; -1 where it was never written.
        fill: an element of a chunk that was never written.
    """

    array: Stored
    key: str
    value: Value | None
    inner: int
    start: int
    length: int
    fill: bytes = b""


class Allowance:
    """How many chunks that were never written may be listed: a header can claim any number of them."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int, header: ArrayHeader) -> None:
        """Count some.

        Raises:
            UnsupportedError: they are too many.
        """
        if count > self.left:
            raise UnsupportedError(f"{count} of its chunks were never written")
        self.left -= count


class Laid(Struct, frozen=True):
    """Where an array's words lie, the CRCs that cover them, and the chunks that are coded."""

    layout: Layout
    crcs: list[StoredCrc]
    coded: list[Coded]


def key_of(header: ArrayHeader, place: Place) -> str:
    """The key of a chunk or shard, below that of its array.

    Example:
        >>> from ckptflip.checkpoints.zarr.metadata import read_v2
        >>> header = read_v2(b'{"zarr_format": 2, "shape": [4, 4], "chunks": [2, 2], "dtype": "<f4"}')
        >>> key_of(header, (0, 1))
        '0.1'
    """
    numbers = [header.prefix] if header.prefix else []
    return header.separator.join([*numbers, *map(str, place)]) or "0"


def place_of(header: ArrayHeader, key: str) -> Place | None:
    """The place of a chunk or shard in the grid; None for a key that is none of its chunks'.

    Example:
        >>> from ckptflip.checkpoints.zarr.metadata import read_v2
        >>> header = read_v2(b'{"zarr_format": 2, "shape": [4, 4], "chunks": [2, 2], "dtype": "<f4"}')
        >>> place_of(header, "0.1"), place_of(header, "0.2"), place_of(header, "0.01")
        ((0, 1), None, None)
    """
    if not header.shape:
        return () if key == key_of(header, ()) else None
    parts = key.split(header.separator)
    if header.prefix and parts.pop(0) != header.prefix:
        return None
    if len(parts) != len(header.shape) or not all(
        p.isascii() and p.isdecimal() and len(p) < 20 for p in parts
    ):
        return None
    place = tuple(map(int, parts))
    inside = all(n * g < s for n, g, s in zip(place, header.grid, header.shape, strict=True))
    return place if inside and [str(n) for n in place] == parts else None


def lay(array: Stored, files: int, allowance: Allowance) -> Laid:
    """Find the words of an array.

    Args:
        array: it and its values.
        files: number of the checkpoint's files plus that of the coded chunks of arrays before this one.
        allowance: for chunks that were never written.

    Raises:
        UnsupportedError: it cannot be altered.
        DamagedError: chunks are not what the metadata say.
    """
    return _Laying(array, files, allowance).done()


class _Laying:
    """The pieces of one array, as they are found."""

    def __init__(self, array: Stored, files: int, allowance: Allowance) -> None:
        header = array.header
        self.array, self.header, self.files = array, header, files
        self.allowance = allowance
        self.pieces: list[Piece] = []
        self.crcs: list[StoredCrc] = []
        self.coded: list[Coded] = []
        width = header.number.word_size * 8
        stored = strides_of(tuple(header.chunk[a] for a in header.chain.axes), header.item_bytes * 8)
        self.strides = tuple(stored[header.chain.axes.index(a)] for a in range(len(stored)))
        self.tail = () if header.number.parts == 1 else (header.number.parts,)
        self.tail_strides = (width,) if self.tail else ()
        self.fill: bytes | None = None

    def done(self) -> Laid:
        """All of it."""
        header, values = self.header, self.array.values
        if prod(header.shape):
            cells = [-(-n // g) for n, g in zip(header.shape, header.grid, strict=True)]
            missing = prod(cells) - len(values)
            if missing:
                each = prod(shards.counts(header)) if header.sharding else 1
                self.allowance.take(missing * each, header)
            places = product(*map(range, cells)) if missing else sorted(values)
            for place in places:
                self._value(place, values.get(place))
        dims = (*header.shape, *self.tail)
        layout = Layout(dims, tuple(self.pieces), header.number, header.chain.order)
        return Laid(layout, self.crcs, self.coded)

    def _value(self, place: Place, value: Value | None) -> None:
        """A chunk, or a shard."""
        origin = tuple(p * g for p, g in zip(place, self.header.grid, strict=True))
        if self.header.sharding is None:
            self._chunk(origin, place, value, -1, 0, -1 if value is None else value.size)
            return
        entries = self._index(value)
        steps = self._index_steps()
        spans = [
            range(min(c, -(-(n - o) // g)))
            for c, n, o, g in zip(
                shards.counts(self.header), self.header.shape, origin, self.header.chunk, strict=True
            )
        ]
        for inner in product(*spans):
            at = sum(i * s for i, s in zip(inner, steps, strict=True))
            start, length = (0, -1) if entries is None else entries[at]
            corner = tuple(o + i * g for o, i, g in zip(origin, inner, self.header.chunk, strict=True))
            never = length in (-1, shards.NEVER)
            self._chunk(corner, place, value, at, 0 if never else start, -1 if never else length)

    def _index(self, value: Value | None) -> list[tuple[int, int]] | None:
        """The entries of a shard's index; None for a shard that was never written."""
        if value is None:
            return None
        start = shards.index_start(self.header, value.size)
        raw = self.array.store.read(value, start, shards.index_size(self.header))
        try:
            entries = shards.read_index(self.header, raw, value.size)
        except DamagedError as why:
            raise DamagedError(f"{value.key}: {why}") from None
        return list(zip(entries[:, 0].tolist(), entries[:, 1].tolist(), strict=True))

    def _index_steps(self) -> tuple[int, ...]:
        """How far the places of neighbouring chunks lie apart in a shard's index, along each axis."""
        assert self.header.sharding is not None
        axes, inside = self.header.sharding.axes, shards.counts(self.header)
        steps = strides_of(tuple(inside[a] for a in axes), 1)
        return tuple(steps[axes.index(a)] for a in range(len(axes)))

    def _chunk(
        self, corner: Place, place: Place, value: Value | None, inner: int, start: int, length: int
    ) -> None:
        """A chunk whose first element has these coordinates."""
        header, chain = self.header, self.header.chain
        if value is not None and length >= 0:
            self._check_length(value, length)
        if value is not None and value.file >= 0 and length >= 0 and chain.compressor is None:
            file, at = value.file, value.offset + start
            for i in range(chain.inner):
                covered = header.chunk_bytes + i * _CRC
                self.crcs.append(StoredCrc("crc32c", file, at, covered, ((file, at + covered),)))
        else:
            file, at = self.files + len(self.coded), 0
            self._code(place, value, inner, start, length)
        shape = tuple(min(g, n - c) for g, n, c in zip(header.chunk, header.shape, corner, strict=True))
        begin = (*corner, 0) if self.tail else corner
        self.pieces.append(Piece(file, at, shape + self.tail, self.strides + self.tail_strides, begin))

    def _check_length(self, value: Value, length: int) -> None:
        """Refuse a chunk of a size that it cannot have."""
        header, chain = self.header, self.header.chain
        exact = header.chunk_bytes + chain.inner * _CRC
        if chain.compressor is None and length != exact:
            raise DamagedError(f"{value.key} holds a chunk of {length} bytes, where {exact} are due")
        if chain.compressor is not None and not 0 < length <= 2 * exact + _CODED_SLACK:
            raise DamagedError(
                f"{value.key} holds a compressed chunk of {length} bytes, which would be {exact}"
            )

    def _code(self, place: Place, value: Value | None, inner: int, start: int, length: int) -> None:
        if self.header.chunk_bytes > _LONGEST_CODED:
            raise UnsupportedError(f"coded chunks of {self.header.chunk_bytes} bytes each")
        if length < 0 and self.fill is None:
            self.fill = fill_bytes(self.header)
        key = value.key if value is not None else f"{self.array.prefix}{key_of(self.header, place)}"
        fill = self.fill or b"" if length < 0 else b""
        self.coded.append(Coded(self.array, key, value, inner, start, length, fill))
