"""The table in a TensorBundle's index: sorted keys and values in blocks, as LevelDB writes it.

    data blocks … | metaindex block | index block | footer of 48 bytes

A block is its contents, one byte that says how they are compressed, and a masked CRC-32C of both. Its
contents are entries, each of which repeats a part of the key before it, and then the offsets of entries that
repeat nothing (restart points), which reading from the start does not need. The index block names the data
blocks.

Source: LevelDB's doc/table_format.md, and TensorFlow's tsl/lib/io/format.h.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.protobuf import ProtobufError, varint

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER = 48
# One byte for the compression, four for the CRC.
TRAILER = 5
_HANDLES = FOOTER - len(MAGIC)
_MOST_ENTRIES = 300_000
# Keys that repeat a long one could claim far more memory than the file has bytes.
_MOST_KEY_BYTES = 1 << 25
_COMPRESSIONS = {1: "snappy", 2: "zstd"}


class Block(Struct, frozen=True, gc=False):
    """Where the contents of a block lie.

    Attributes:
        start: its first byte in the file.
        length: bytes of its contents, trailer not counted.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the contents: that of the trailer."""
        return self.start + self.length


class Entry(Struct, frozen=True, gc=False):
    """A key, and where its value lies.

    Attributes:
        key: the key.
        start: the value's first byte in the file.
        end: the byte after the value.
    """

    key: bytes
    start: int
    end: int


class Table(Struct, frozen=True):
    """What a table holds.

    Attributes:
        blocks: its data blocks, in their order in the file.
        entries: their entries, keys ascending.
    """

    blocks: list[Block]
    entries: list[Entry]


def read_table(data: bytes) -> Table:
    """The table that fills the bytes of a file.

    Raises:
        DamagedError: they are damaged, truncated, compressed, or claim more than any index has.
    """
    if len(data) < FOOTER or not data.endswith(MAGIC):
        raise DamagedError("its last 8 bytes are not those of a table")
    footer = len(data) - FOOTER
    try:
        _, at = _handle(data, footer, footer + _HANDLES)
        index, _ = _handle(data, at, footer + _HANDLES)
        _check(data, index, 0, footer, "the index block")
        blocks = list(_data_blocks(data, index))
        entries: list[Entry] = []
        key_bytes = 0
        for block in blocks:
            last = entries[-1].key if entries else None
            for entry in _entries(data, block):
                if last is not None and entry.key <= last:
                    raise DamagedError(f"the key before byte {entry.start} is out of order")
                last = entry.key
                key_bytes += len(last)
                entries.append(entry)
                if len(entries) > _MOST_ENTRIES or key_bytes > _MOST_KEY_BYTES:
                    raise DamagedError("it claims more entries, or longer keys, than any index has")
    except ProtobufError as why:
        raise DamagedError(str(why)) from None
    return Table(blocks, entries)


def _data_blocks(data: bytes, index: Block) -> Iterator[Block]:
    """The blocks that the index block names. They follow each other, and the index block follows them."""
    free = 0
    for entry in _entries(data, index):
        block, _ = _handle(data, entry.start, entry.end)
        _check(data, block, free, index.start, "a data block")
        free = block.end + TRAILER
        yield block


def _check(data: bytes, block: Block, low: int, high: int, what: str) -> None:
    """Refuse a block that does not lie between two bytes, or is compressed."""
    if not low <= block.start <= block.end + TRAILER <= high:
        raise DamagedError(
            f"{what} would lie at bytes {block.start} to {block.end + TRAILER}, not between {low} and {high}"
        )
    compression = data[block.end]
    if compression:
        name = _COMPRESSIONS.get(compression, f"method {compression}")
        raise DamagedError(
            f"{what} at byte {block.start} is compressed ({name}), which TensorFlow never writes"
        )


def _handle(data: bytes, at: int, end: int) -> tuple[Block, int]:
    """A block's offset and length as two varints, and the byte after them."""
    start, at = varint(data, at, end)
    length, at = varint(data, at, end)
    return Block(start, length), at


def _entries(data: bytes, block: Block) -> Iterator[Entry]:
    """The entries of a block. Each key begins with some bytes of the key before it."""
    at, end, key = block.start, _restarts(data, block), b""
    while at < end:
        first = at
        shared, at = varint(data, at, end)
        fresh, at = varint(data, at, end)
        length, at = varint(data, at, end)
        value = at + fresh
        if shared > len(key) or value + length > end:
            raise DamagedError(f"the entry at byte {first} claims more than its block holds")
        key = key[:shared] + data[at:value]
        at = value + length
        yield Entry(key, value, at)


def _restarts(data: bytes, block: Block) -> int:
    """The byte where a block's restart points begin, and its entries end."""
    if block.length < 4:
        raise DamagedError(f"the block at byte {block.start} is too short")
    count = int.from_bytes(data[block.end - 4 : block.end], "little")
    start = block.end - 4 - 4 * count
    if start < block.start:
        raise DamagedError(
            f"the block at byte {block.start} claims {count} restart points, more than it holds"
        )
    return start
