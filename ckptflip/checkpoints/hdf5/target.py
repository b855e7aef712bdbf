"""An HDF5 checkpoint: its catalogue, its words, and how they are altered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from h5py import h5d, h5s
from numpy.typing import NDArray

from ckptflip.checkpoints import patch
from ckptflip.checkpoints.extents import Extent
from ckptflip.checkpoints.hdf5.checksums import TouchedWords, checksum_patches
from ckptflip.checkpoints.hdf5.extents import of_dataset
from ckptflip.checkpoints.hdf5.opening import open_file, why_unreadable
from ckptflip.checkpoints.hdf5.places import (
    Chunks,
    Part,
    Place,
    element_space,
    intra_record,
    segments_of,
    split,
)
from ckptflip.checkpoints.hdf5.rewrite import rewrite
from ckptflip.checkpoints.hdf5.types import Field
from ckptflip.checkpoints.hdf5.walker import Dataset, walk
from ckptflip.checkpoints.hdf5.window import Window
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.target import Changes, NewFile, Prepared, Skipped
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import ChecksumEntry

_BLOCK_BYTES = 1 << 24
# What h5py may raise of a damaged file.
_LIBRARY_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError)

Naming = Callable[[Sequence[Tensor], Marks], Sequence[Tensor]]


class HDF5Checkpoint:
    """Any HDF5 file, whoever wrote it. See `ckptflip.checkpoints.target.Checkpoint`.

    Args:
        path: the file. The caller holds its lock (`ckptflip.checkpoints.files.locked`).
        member: where in `path` the HDF5 file lies, if it is not all of it; made from a descriptor that stays
            open until `close`.
        naming: gives the catalogue the names that users see; by default those of Keras to Keras' files.

    Raises:
        CheckpointError: not HDF5, truncated or damaged.
    """

    format = "hdf5"

    def __init__(self, path: Path, member: Window | None = None, naming: Naming | None = None) -> None:
        self.path = path
        self.files: Sequence[Path] = [path]
        self.folder: Path | None = None
        try:
            self._file = open_file(path, member)
        except OSError as why:
            raise CheckpointError(why_unreadable(path, member, why)) from None
        try:
            self._size = path.stat().st_size if member is None else member.length
            self._user_block = self._file.userblock_size
            found = walk(self._file.id, self._size, self._user_block, member)
        except _LIBRARY_ERRORS as why:
            self._file.close()
            # A KeyError shows its text in quotes.
            where = path if member is None else member.where
            raise CheckpointError(f"{where} is damaged HDF5: {why.args[0] if why.args else why}") from None
        self._start = 0 if member is None else member.start
        self._descriptor = os.open(path, os.O_RDONLY) if member is None else os.dup(member.descriptor)
        self._datasets, self._fields = found.datasets, found.fields
        # By their paths in the file.
        self._stored: Sequence[Tensor] = found.tensors
        self.marks = found.marks
        self.tensors: Sequence[Tensor] = (naming or _names)(found.tensors, found.marks)
        self.skipped: Sequence[Skipped] = found.skipped
        self._chunks: dict[bytes, Chunks] = {}

    def close(self) -> None:
        """Release the file; closing twice is allowed."""
        if self._descriptor >= 0:
            self._file.close()
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order.

        Raises:
            CheckpointError: the data cannot be read.
        """
        with self._readable(tensor):
            return self._read(tensor, words)

    @contextlib.contextmanager
    def _readable(self, tensor: int) -> Iterator[None]:
        """Errors of the library as ours."""
        try:
            yield
        except _LIBRARY_ERRORS as why:
            raise CheckpointError(f"{self.path}: {self.tensors[tensor].name} cannot be read: {why}") from None

    def _read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        place = self._datasets[tensor]
        stored = self._fields[tensor].stored
        if not words.size:
            return np.empty(0, stored.newbyteorder("="))
        if place.kind in ("flat", "external"):
            found = np.empty(words.size, stored.newbyteorder("="))
            for part in self._flat_places(tensor, words):
                found[part.rows] = part.read(stored)
            return found
        if place.kind == "chunked":
            return self._read_chunked(tensor, words, stored)
        records, inner = split(words, self._fields[tensor])
        raw = self._library_records(place, records)
        return intra_record(raw, inner, self._fields[tensor], stored)

    def _read_chunked(self, tensor: int, words: NDArray[np.int64], stored: np.dtype[Any]) -> NDArray[Any]:
        place, field = self._datasets[tensor], self._fields[tensor]
        found = np.empty(words.size, stored.newbyteorder("="))
        chunks = self._chunks_of(place)
        records, inner = split(words, field)
        for part in chunks.locate(records):
            if part.offset is not None and not place.coded and not part.filter_mask:
                offsets = _in_file(part, field, place, inner)
                order = np.argsort(offsets)
                found[part.rows[order]] = patch.read_words(self._descriptor, stored, offsets[order])
            else:
                chunk = chunks.decoded(part.coordinates)
                found[part.rows] = intra_record(chunk[part.within], inner[part.rows], field, stored)
        return found

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of some 16 MiB, native byte order."""
        place, field = self._datasets[tensor], self._fields[tensor]
        number = self.tensors[tensor].number
        total = self.tensors[tensor].words
        if not total:
            return
        plain = place.record == field.words * number.word_size
        step = max(1, _BLOCK_BYTES // number.word_size)
        by_rows = plain and place.shape and place.kind in ("chunked", "library")
        if by_rows:
            # Whole rows of chunks, so that no chunk is decoded twice.
            per_row, together = prod(place.shape[1:]) * field.words, (place.chunk or (1,))[0]
            step = max(1, step // (per_row * together)) * together * per_row
        stored = self._fields[tensor].stored
        for start in range(0, total, step):
            end = min(total, start + step)
            if place.kind == "flat" and plain:
                raw = os.pread(
                    self._descriptor, (end - start) * stored.itemsize, place.offset + start * stored.itemsize
                )
                yield np.frombuffer(raw, stored).astype(stored.newbyteorder("="), copy=False)
            elif by_rows:
                take = self._chunk_rows if place.kind == "chunked" else self._library_rows
                with self._readable(tensor):
                    rows = take(tensor, start // per_row, -(-end // per_row), stored)
                yield rows
            else:
                yield self.read(tensor, np.arange(start, end, dtype=np.int64))

    def _chunk_rows(self, tensor: int, first: int, last: int, stored: np.dtype[Any]) -> NDArray[Any]:
        """Rows first … last-1 of a chunked tensor of plain records, chunk by chunk."""
        place = self._datasets[tensor]
        rows = np.empty((last - first, *place.shape[1:]), f"V{place.record}")
        chunks = self._chunks_of(place)
        for origin in chunks.origins(first, last):
            here = tuple(
                slice(o - (first if axis == 0 else 0), min(o + c, n) - (first if axis == 0 else 0))
                for axis, (o, c, n) in enumerate(
                    zip(origin, place.chunk, (last, *place.shape[1:]), strict=True)
                )
            )
            kept = tuple(slice(s.stop - s.start) for s in here)
            chunk = chunks.decoded(origin)
            rows[here] = chunk.view(f"V{place.record}").reshape(place.chunk)[kept]
        return rows.reshape(-1).view(stored).astype(stored.newbyteorder("="), copy=False)

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether these words can be altered byte for byte, without rewriting the file.

        Args:
            tensors: positions in the catalogue.
            words: for each, the words meant; unallocated chunks among them need a rewrite.
        """
        return all(self._patchable(t, None if words is None else words[i]) for i, t in enumerate(tensors))

    def _patchable(self, tensor: int, words: NDArray[np.int64] | None) -> bool:
        place = self._datasets[tensor]
        if place.kind != "chunked":
            return place.kind in ("flat", "external")
        if place.coded:
            return False
        if words is None:
            return True
        records, _ = split(words, self._fields[tensor])
        return all(p.offset is not None and not p.filter_mask for p in self._chunks_of(place).locate(records))

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: by patching, or in a copy by whatever the layout needs.

        Args:
            changes: masks by tensor and word.
            checksum: ``repair``: Fletcher-32 checksums are made right again where they were right before;
                ``leave``: they stay as they are.
            paths: the copy, alone in a list. None: this very file.
            recorded: not needed: chunks are small enough to be summed again.

        Raises:
            CheckpointError: the change cannot be made.
        """
        patches: list[patch.Patch] = []
        touched: dict[bytes, list[TouchedWords]] = {}
        rest: dict[int, slice] = {}
        target = self.path if paths is None else paths[0]
        for tensor, rows in changes.by_tensor():
            words = changes.word[rows]
            if not self._patchable(tensor, words) or (
                paths is not None and self._datasets[tensor].kind == "external"
            ):
                if paths is None:
                    raise CheckpointError(
                        f"{self.tensors[tensor].name} cannot be altered in place; write a new file with -o"
                    )
                rest[tensor] = rows
                continue
            patches += self._patches(tensor, words, changes.mask[rows], target)
            place = self._datasets[tensor]
            if checksum == "repair" and place.filters:
                touched.setdefault(place.key, []).append(
                    TouchedWords(self._fields[tensor], words, changes.mask[rows], changes.fault[rows])
                )
        checksums = [
            p
            for key, several in touched.items()
            for p in checksum_patches(self._chunks[key], several, self._descriptor, target)
        ]
        # Checksums last: until then the old ones prove, after a kill, which words are still to be undone.
        entries = self._entries(checksums)
        return Prepared([*patches, *checksums], entries, self._finish(target, changes, rest, checksum))

    def _entries(self, checksums: Sequence[patch.Patch]) -> tuple[ChecksumEntry, ...]:
        """Altered checksums as the record lists them."""
        return tuple(
            ChecksumEntry(0, offset, before, before ^ mask)
            for each in checksums
            for offset, before, mask in zip(
                each.offsets.tolist(),
                patch.read_words(self._descriptor, each.dtype, each.offsets).tolist(),
                each.masks.tolist(),
                strict=True,
            )
            if mask
        )

    def _finish(
        self, target: Path, changes: Changes, rest: dict[int, slice], checksum: str
    ) -> Callable[[], None] | None:
        """What the library has to rewrite in the copy."""
        if not rest:
            return None
        gathered = {t: self._gather(t) for t in rest if self._is_gathered(t)}
        tensors, datasets, fields = self._stored, self._datasets, self._fields
        return lambda: rewrite(target, changes, rest, tensors, datasets, fields, checksum, gathered)

    def extents(self) -> Iterator[Extent]:
        """Every range of the file in which words lie: see `ckptflip.checkpoints.extents`."""
        for tensor, (place, field) in enumerate(zip(self._datasets, self._fields, strict=True)):
            with self._readable(tensor):
                yield from of_dataset(tensor, place, field, partial(self._chunks_of, place))

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """One file, under any name."""
        return [NewFile(out)]

    def _is_gathered(self, tensor: int) -> bool:
        """Whether a copy must hold the data itself, because the original lies in other files."""
        return self._datasets[tensor].kind == "external" or self._datasets[tensor].virtual

    def _gather(self, tensor: int) -> NDArray[np.uint8]:
        """All records of a tensor's dataset, shape (records, bytes of a record)."""
        place = self._datasets[tensor]
        if place.virtual:
            return self._library_records(place, np.arange(place.records, dtype=np.int64))
        every = np.arange(0, place.records * place.record, dtype=np.int64)
        parts = segments_of(place, every, 1, self.path, self.tensors[tensor].name)
        return np.concatenate([p.read(np.dtype("u1")) for p in parts]).reshape(-1, place.record)

    def _patches(
        self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64], target: Path
    ) -> list[patch.Patch]:
        stored = self._fields[tensor].stored
        masks = masks.astype(stored.newbyteorder("="))
        if self._datasets[tensor].kind != "chunked":
            parts = self._flat_places(tensor, words)
            return [
                patch.Patch(
                    str(target) if p.path == str(self.path) else p.path, stored, p.offsets, masks[p.rows]
                )
                for p in parts
            ]
        offsets = self._chunk_offsets(tensor, words)
        order = np.argsort(offsets)
        return [patch.Patch(str(target), stored, offsets[order], masks[order])]

    def _chunk_offsets(self, tensor: int, words: NDArray[np.int64]) -> NDArray[np.int64]:
        place, field = self._datasets[tensor], self._fields[tensor]
        records, inner = split(words, field)
        offsets = np.empty(words.size, np.int64)
        for part in self._chunks_of(place).locate(records):
            offsets[part.rows] = _in_file(part, field, place, inner)
        return offsets

    def _flat_places(self, tensor: int, words: NDArray[np.int64]) -> list[Place]:
        place, field = self._datasets[tensor], self._fields[tensor]
        records, inner = split(words, field)
        logical = records * place.record + field.offset + inner * field.number.word_size
        if place.kind == "flat":
            return [Place(str(self.path), place.offset + logical, np.arange(words.size), self._descriptor)]
        return segments_of(place, logical, field.number.word_size, self.path, self.tensors[tensor].name)

    def _chunks_of(self, place: Dataset) -> Chunks:
        if place.key not in self._chunks:
            dataset = h5d.open(self._file.id, place.key)
            self._chunks[place.key] = Chunks(
                dataset, place, self._size, self._descriptor, self._user_block, self._start
            )
        return self._chunks[place.key]

    def _library_rows(self, tensor: int, first: int, last: int, stored: np.dtype[Any]) -> NDArray[Any]:
        """Rows first … last-1 of plain records, through the library."""
        place = self._datasets[tensor]
        dataset = h5d.open(self._file.id, place.key)
        space = dataset.get_space()
        count = (last - first, *place.shape[1:])
        space.select_hyperslab((first, *(0 for _ in count[1:])), count)
        rows = np.empty(count, f"V{place.record}")
        dataset.read(h5s.create_simple(count), space, rows, dataset.get_type())
        return rows.reshape(-1).view(stored).astype(stored.newbyteorder("="), copy=False)

    def _library_records(self, place: Dataset, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Records that only the library reaches, shape (records, bytes)."""
        dataset = h5d.open(self._file.id, place.key)
        kind = dataset.get_type()
        if not place.shape:
            scalar = np.empty((), f"V{place.record}")
            dataset.read(h5s.ALL, h5s.ALL, scalar, kind)
            return np.repeat(scalar.reshape(1), records.size).view(np.uint8).reshape(-1, place.record)
        wanted, back = np.unique(records, return_inverse=True)
        space = element_space(dataset, place, wanted)
        found = np.empty(wanted.size, f"V{place.record}")
        dataset.read(h5s.create_simple(found.shape), space, found, kind)
        return found[back].view(np.uint8).reshape(-1, place.record)


def _in_file(part: Part, field: Field, place: Dataset, inner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the words of one chunk that is stored byte for byte lie in the file."""
    assert part.offset is not None
    return part.offset + part.within * place.record + field.offset + inner[part.rows] * field.number.word_size


def _names(tensors: Sequence[Tensor], marks: Marks) -> Sequence[Tensor]:
    """The names that users see: of Keras' files the real ones, of others the paths in the file."""
    if not marks.any:
        return tensors
    from ckptflip.checkpoints.keras.names import renamed

    return renamed(tensors, marks)
