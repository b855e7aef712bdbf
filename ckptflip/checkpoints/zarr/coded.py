"""Chunks that are stored coded: compressed, never written, or kept in a store's own index."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.zarr import shards
from ckptflip.checkpoints.zarr.chunks import Coded
from ckptflip.checkpoints.zarr.codecs import compress, crc32c, decompress
from ckptflip.checkpoints.zarr.metadata import Chain
from ckptflip.errors import CheckpointError

_CRC = 4
# A row of an array may pass through many chunks; they are not decoded anew for each row.
_KEPT_BYTES = 1 << 26


class CodedChunks:
    """The coded chunks of some arrays. See `ckptflip.checkpoints.laid.Blobs`.

    Args:
        path: the checkpoint, for messages.
        chunks: all of them.
        depth: how many folders the first of the checkpoint's files lies below the checkpoint's own.
    """

    def __init__(self, path: Path, chunks: Sequence[Coded], depth: int) -> None:
        self._path = path
        self._chunks = chunks
        self._depth = depth
        self._kept: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._held = 0

    def decode(self, blob: int) -> NDArray[np.uint8]:
        """The words of a chunk, as bytes."""
        if blob not in self._kept:
            self._kept[blob] = self._decoded(self._chunks[blob])
            self._held += self._kept[blob].size
            while len(self._kept) > 1 and self._held > _KEPT_BYTES:
                self._held -= self._kept.popitem(last=False)[1].size
        self._kept.move_to_end(blob)
        return self._kept[blob]

    def extent(self, blob: int) -> tuple[int, int, int, str] | None:
        """Where a chunk is stored: file, first and end byte, and its name; None where that is in no file."""
        chunk = self._chunks[blob]
        value = chunk.value
        if value is None or value.file < 0 or chunk.length < 0:
            return None
        start = value.offset + chunk.start
        inner = f", part {chunk.inner}" if chunk.inner >= 0 else ""
        return value.file, start, start + chunk.length, f"chunk {chunk.key}{inner}"

    def encode(self, changed: Mapping[int, NDArray[np.uint8]], paths: Sequence[Path], checksum: str) -> None:
        """Write new words of some chunks into a copy of the checkpoint's folder."""
        by_value: dict[tuple[int, str], list[int]] = {}
        for blob in sorted(changed):
            each = self._chunks[blob]
            by_value.setdefault((id(each.array.store), each.key), []).append(blob)
        stores = {id(self._chunks[b].array.store): self._chunks[b].array.store for b in changed}
        root = paths[0].parents[self._depth]
        for store, values in stores.items():
            with values.writing(root) as writer:
                for (owner, key), blobs in by_value.items():
                    if owner == store:
                        news = {b: changed[b].tobytes() for b in blobs}
                        writer.write(key, self._renewed(writer.read(key), news, checksum))
        self._kept.clear()
        self._held = 0

    def _decoded(self, chunk: Coded) -> NDArray[np.uint8]:
        header = chunk.array.header
        if chunk.length < 0 or chunk.value is None:
            return np.frombuffer(_filled(chunk), np.uint8)
        raw = chunk.array.store.read(chunk.value, chunk.start, chunk.length)
        try:
            return np.frombuffer(_opened(header.chain, raw, header.chunk_bytes)[0], np.uint8)
        except DamagedError as why:
            raise self._damaged(chunk, why) from None

    def _renewed(self, old: bytes | None, news: Mapping[int, bytes], checksum: str) -> bytes:
        """A value in which some chunks have other words."""
        chunks = {blob: self._chunks[blob] for blob in news}
        first = next(iter(chunks.values()))
        recode: dict[int, Callable[[bytes | None], bytes]] = {
            chunk.inner: partial(_recoded, chunk, news[blob], checksum) for blob, chunk in chunks.items()
        }
        try:
            if first.inner < 0:
                return recode[-1](old)
            return shards.edited(first.array.header, old, recode)
        except DamagedError as why:
            raise self._damaged(first, why) from None

    def _damaged(self, chunk: Coded, why: DamagedError) -> CheckpointError:
        return CheckpointError(f"{self._path}: the chunk {chunk.key} of {chunk.array.name} is damaged: {why}")


def _filled(chunk: Coded) -> bytes:
    """The words of a chunk that was never written."""
    header = chunk.array.header
    return chunk.fill * (header.chunk_bytes // header.item_bytes)


def _recoded(chunk: Coded, words: bytes, checksum: str, old: bytes | None) -> bytes:
    """The bytes of a chunk with other words; a stored CRC that was right stays right, if it is repaired."""
    chain, size = chunk.array.header.chain, chunk.array.header.chunk_bytes
    if old is None:
        old = _sealed(chain, _filled(chunk))
    before, inner, outer = _opened(chain, old, size)
    packed = _followed(before, words, inner, leave=checksum == "leave")
    if chain.compressor is None:
        return packed
    coded = compress(chain.compressor, packed)
    # A coder need not give the same bytes twice: a CRC over them, left as it is, would still be wrong once
    # the words are right again. So it becomes wrong by as much as a CRC over the words would be.
    drift = crc32c(before) ^ crc32c(words) if checksum == "leave" else 0
    return _followed(old[: len(old) - _CRC * chain.outer], coded, outer, drift=drift)


def _opened(chain: Chain, raw: bytes, size: int) -> tuple[bytes, list[int], list[int]]:
    """The words of a chunk, and the CRCs that are stored inside and outside of its compression."""
    outer: list[int] = []
    if chain.compressor is not None:
        body, outer = _parted(raw, chain.outer)
        raw = decompress(chain.compressor, body, size + _CRC * chain.inner)
    words, inner = _parted(raw, chain.inner)
    if len(words) != size:
        raise DamagedError(f"it holds {len(words)} bytes of words, where {size} are due")
    return words, inner, outer


def _sealed(chain: Chain, words: bytes) -> bytes:
    """A chunk's bytes, anew."""
    packed = _anew(words, chain.inner)
    return packed if chain.compressor is None else _anew(compress(chain.compressor, packed), chain.outer)


def _anew(data: bytes, count: int) -> bytes:
    """Bytes with so many CRCs after them."""
    for _ in range(count):
        data += crc32c(data).to_bytes(_CRC, "little")
    return data


def _parted(raw: bytes, count: int) -> tuple[bytes, list[int]]:
    """Bytes, and the CRCs that follow them."""
    end = len(raw) - _CRC * count
    if end < 0:
        raise DamagedError(f"it has {len(raw)} bytes, fewer than its checksums alone would have")
    return raw[:end], [int.from_bytes(raw[end + _CRC * i :][:_CRC], "little") for i in range(count)]


def _followed(old: bytes, new: bytes, stored: Sequence[int], *, leave: bool = False, drift: int = 0) -> bytes:
    """New bytes with the CRCs that follow them.

    Args:
        old: what the stored CRCs cover.
        new: what takes its place.
        stored: the CRCs, innermost first; each covers those before it.
        leave: keep them. Else they change as the bytes change: one that was wrong stays wrong by the same
            difference.
        drift: what else to XOR into them.
    """
    for each in stored:
        value = each if leave else each ^ crc32c(old) ^ crc32c(new) ^ drift
        old += each.to_bytes(_CRC, "little")
        new += value.to_bytes(_CRC, "little")
    return new
