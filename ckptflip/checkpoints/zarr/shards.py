"""Shards of zarr version 3: the index that says where each chunk lies in its file, reading and renewing it.

Source: the specification of the `sharding_indexed` codec. The index is an array of (offset, length) pairs of
64-bit words, in C order of the chunks; a chunk that was never written has the largest value in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.zarr.codecs import crc32c
from ckptflip.checkpoints.zarr.metadata import ArrayHeader, Sharding

NEVER = (1 << 64) - 1
_ENTRY = 16
_CRC = 4
# An index of 16 MiB.
_MOST_CHUNKS = 1 << 20


def counts(header: ArrayHeader) -> tuple[int, ...]:
    """How many chunks a shard has along each axis of the array."""
    return tuple(whole // part for whole, part in zip(header.grid, header.chunk, strict=True))


def index_size(header: ArrayHeader) -> int:
    """Bytes of a shard's index.

    Raises:
        DamagedError: more chunks than a shard can sensibly have.
    """
    assert header.sharding is not None
    chunks = prod(counts(header))
    if chunks > _MOST_CHUNKS:
        raise DamagedError(f"its shards claim {chunks} chunks each; at most {_MOST_CHUNKS} are read")
    return chunks * _ENTRY + _CRC * header.sharding.sealed


def index_start(header: ArrayHeader, size: int) -> int:
    """Where the index lies in a shard of `size` bytes.

    Raises:
        DamagedError: the shard cannot hold it.
    """
    assert header.sharding is not None
    length = index_size(header)
    if length > size:
        raise DamagedError(f"a shard has {size} bytes, and its index alone would have {length}")
    return size - length if header.sharding.at_end else 0


def read_index(header: ArrayHeader, raw: bytes, size: int) -> NDArray[np.uint64]:
    """The entries of a shard's index, shape (chunks, 2): offset and length.

    Args:
        header: of the array.
        raw: the index.
        size: bytes of the whole shard.

    Raises:
        DamagedError: its CRC is wrong, or chunks lie outside the shard, over each other or over the index.
    """
    sharding = header.sharding
    assert sharding is not None
    body = raw[:-_CRC] if sharding.sealed else raw
    if sharding.sealed and crc32c(body) != int.from_bytes(raw[-_CRC:], "little"):
        stored, found = int.from_bytes(raw[-_CRC:], "little"), crc32c(body)
        raise DamagedError(f"the CRC-32C of a shard's index is {found:#010x}, stored is {stored:#010x}")
    entries = np.frombuffer(body, f"{sharding.order}u8").astype(np.uint64).reshape(-1, 2)
    written = entries[(entries != NEVER).all(axis=1)]
    if ((entries == NEVER).any(axis=1) != (entries == NEVER).all(axis=1)).any():
        raise DamagedError("a shard's index has half an entry")
    low, high = (0, size - len(raw)) if sharding.at_end else (len(raw), size)
    starts, lengths = written[:, 0], written[:, 1]
    if (starts < low).any() or (starts > high).any() or (lengths > np.uint64(high) - starts).any():
        raise DamagedError("a chunk is said to lie outside its shard")
    order = np.argsort(starts, kind="stable")
    ends = (starts + lengths)[order]
    if (starts[order][1:] < ends[:-1]).any():
        raise DamagedError("two chunks of a shard overlap")
    return entries


def edited(
    header: ArrayHeader,
    old: bytes | None,
    chunks: Mapping[int, Callable[[bytes | None], bytes]],
) -> bytes:
    """A shard in which some chunks have other bytes. All others stay where they are.

    Args:
        header: of the array.
        old: the shard; None where it was never written.
        chunks: by place in the index: what makes the new bytes of the old ones (None: never written).

    Raises:
        DamagedError: the shard is damaged.
    """
    sharding = header.sharding
    assert sharding is not None
    length = index_size(header)
    if old is None:
        entries = np.full((length // _ENTRY, 2), NEVER, np.uint64)
        data = bytearray() if sharding.at_end else bytearray(length)
    else:
        at = index_start(header, len(old))
        entries = read_index(header, old[at : at + length], len(old)).copy()
        data = bytearray(old[:at] if sharding.at_end else old)
    for place, recode in chunks.items():
        start, size = (int(n) for n in entries[place])
        stored = None if start == NEVER else bytes(data[start : start + size])
        new = recode(stored)
        if stored is None or len(new) > size:
            start = len(data)
        data[start : start + len(new)] = new
        entries[place] = start, len(new)
    index = _index(sharding, entries)
    if sharding.at_end:
        return bytes(data + index)
    data[:length] = index
    return bytes(data)


def _index(sharding: Sharding, entries: NDArray[np.uint64]) -> bytes:
    """The bytes of an index."""
    index = entries.astype(f"{sharding.order}u8").tobytes()
    return index + crc32c(index).to_bytes(_CRC, "little") if sharding.sealed else index
