"""Words at byte offsets of an open file: read them, or XOR masks into them. Costs grow with the words alone.

Neighbouring words are read and written together; a word on its own costs one small read and one small write.
Nothing is memory-mapped: a hole in a sparse file on a full disk must be an error, not a signal.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.errors import CheckpointError, PartlyAlteredError

# Below this gap, reading on is cheaper than another system call.
_GAP = 4096
_SPAN_LIMIT = 1 << 22
_BATCH_BYTES = 1 << 24
_TORN = (
    "writing failed, and so did putting the old bytes back: the file is partly altered. Mend the disk, then "
    "undo with the record"
)


class Patch(Struct, frozen=True, eq=False):
    """Masks for words of one kind in one file.

    Attributes:
        path: the file.
        dtype: the words' dtype as stored, byte order included.
        offsets: where each word starts, in bytes, int64, ascending and not overlapping.
        masks: what to XOR into each, any unsigned dtype.
    """

    path: str
    dtype: np.dtype[Any]
    offsets: NDArray[np.int64]
    masks: NDArray[Any]


class _Batch(Struct, frozen=True, eq=False):
    """Some spans of a file, read into one buffer."""

    starts: list[int]
    ends: list[int]
    buffer: bytearray
    words: slice
    at: NDArray[np.int64]

    def word_bytes(self, size: int) -> NDArray[np.uint8]:
        """The bytes of each word, shape (words, size)."""
        taken: NDArray[np.uint8] = np.frombuffer(self.buffer, np.uint8)[self.at[:, None] + np.arange(size)]
        return taken


def read_words(fd: int, dtype: np.dtype[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """The words at ascending offsets, in native byte order.

    Raises:
        CheckpointError: an offset lies beyond the end of the file.
    """
    found = np.empty(offsets.size, dtype.newbyteorder("="))
    for batch in _batches(fd, offsets, dtype.itemsize):
        found[batch.words] = batch.word_bytes(dtype.itemsize).view(dtype)[:, 0]
    return found


def xor_words(fd: int, dtype: np.dtype[Any], offsets: NDArray[np.int64], masks: NDArray[Any]) -> None:
    """XOR masks into the words at ascending offsets. On an error the file is as it was before.

    Raises:
        CheckpointError: an offset lies beyond the end of the file, or a write failed (a full disk).
        PartlyAlteredError: a write failed, and so did putting the old bytes back.
    """
    done = 0
    try:
        for batch in _batches(fd, offsets, dtype.itemsize):
            altered = batch.word_bytes(dtype.itemsize)
            altered.view(dtype)[:, 0] ^= masks[batch.words].astype(dtype)
            original = bytes(batch.buffer)
            np.frombuffer(batch.buffer, np.uint8)[batch.at[:, None] + np.arange(dtype.itemsize)] = altered
            try:
                _write_spans(fd, batch, memoryview(batch.buffer))
            except OSError:
                _write_spans(fd, batch, memoryview(original), best_effort=True)
                if not _holds(fd, batch, original):
                    raise PartlyAlteredError(_TORN) from None
                raise
            done = batch.words.stop
    except (OSError, CheckpointError) as why:
        if done:
            with _putting_back():
                xor_words(fd, dtype, offsets[:done], masks[:done])
        if isinstance(why, CheckpointError):
            raise
        raise CheckpointError(
            f"writing failed ({why.strerror}); every byte written so far was put back"
        ) from why


def apply_patches(patches: list[Patch]) -> None:
    """Apply all patches or none.

    Raises:
        CheckpointError: a file cannot be opened for writing, or a write failed; all files are as before.
        PartlyAlteredError: a write failed, and so did putting the old bytes back.
    """
    done: list[Patch] = []
    try:
        for patch in patches:
            _apply_one(patch)
            done.append(patch)
    except CheckpointError:
        with _putting_back():
            for patch in reversed(done):
                _apply_one(patch)
        raise


@contextlib.contextmanager
def _putting_back() -> Iterator[None]:
    """Say so when what was written cannot be taken back."""
    try:
        yield
    except CheckpointError:
        raise PartlyAlteredError(_TORN) from None


def _apply_one(patch: Patch) -> None:
    try:
        fd = os.open(patch.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError as why:
        raise CheckpointError(f"{patch.path} cannot be opened for writing: {why.strerror}") from None
    try:
        xor_words(fd, patch.dtype, patch.offsets, patch.masks)
    finally:
        os.close(fd)


def _batches(fd: int, offsets: NDArray[np.int64], size: int) -> Iterator[_Batch]:
    """Spans of neighbouring words, read in batches of bounded size."""
    if not offsets.size:
        return
    step = np.diff(offsets)
    if offsets[0] < 0 or (step < size).any():
        raise CheckpointError(
            "words at negative, overlapping or unordered offsets: the file's index is damaged"
        )
    breaks = (step > _GAP) | (np.diff(offsets // _SPAN_LIMIT) != 0)
    firsts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    starts = offsets[firsts]
    ends = offsets[np.append(firsts[1:], offsets.size) - 1] + size
    lengths = ends - starts
    in_buffer = np.cumsum(lengths) - lengths
    batch_of = in_buffer // _BATCH_BYTES
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(batch_of)) + 1, [starts.size]])
    for low, high in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        words = slice(int(firsts[low]), int(firsts[high]) if high < starts.size else offsets.size)
        span_of = np.repeat(np.arange(low, high), np.diff(np.append(firsts[low:high], words.stop)))
        at = offsets[words] - starts[span_of] + in_buffer[span_of] - in_buffer[low]
        first, last = starts[low:high].tolist(), ends[low:high].tolist()
        buffer = bytearray().join([os.pread(fd, e - s, s) for s, e in zip(first, last, strict=True)])
        if len(buffer) != int(lengths[low:high].sum()):
            raise CheckpointError(
                f"data is said to lie up to byte {last[-1]}, beyond the end of the file "
                f"({os.fstat(fd).st_size} bytes)"
            )
        yield _Batch(first, last, buffer, words, at)


def _holds(fd: int, batch: _Batch, data: bytes) -> bool:
    """Whether the spans of a batch hold these bytes now."""
    spans = zip(batch.starts, batch.ends, strict=True)
    return b"".join(os.pread(fd, end - start, start) for start, end in spans) == data


def _write_spans(fd: int, batch: _Batch, data: memoryview, *, best_effort: bool = False) -> None:
    at = 0
    for start, end in zip(batch.starts, batch.ends, strict=True):
        view = data[at : at + end - start]
        at += end - start
        while view:
            try:
                written = os.pwrite(fd, view, start)
            except OSError:
                if not best_effort:
                    raise
                break
            start += written
            view = view[written:]
