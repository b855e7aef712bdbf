"""A checkpoint whose words lie at known places of its files: what most formats come down to."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints import patch, stored_crcs
from ckptflip.checkpoints.extents import Extent, in_piece
from ckptflip.checkpoints.patch import Patch
from ckptflip.checkpoints.pieces import Layout, is_plain, located
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Changes, NewFile, Prepared, Skipped
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import ChecksumEntry

_BLOCK_BYTES = 1 << 24
# Words whose places are worked out one by one take some fifty bytes each meanwhile.
_BLOCK_WORDS = 1 << 20
_MOST_OPEN = 64
_KEPT_BLOBS = 4

Renaming = Callable[[Path], Sequence[NewFile]]


class Blobs(Protocol):
    """Data that is stored coded: a compressed chunk, a deflated member, a list of varints.

    One that knows where a blob lies also has ``extent(blob)``: the file, its first and end byte and a name of
    the part, or None.
    """

    def decode(self, blob: int) -> NDArray[np.uint8]:
        """The decoded bytes of a blob.

        Raises:
            CheckpointError: it is damaged, or decodes to another size than it should.
        """
        ...

    def encode(self, changed: Mapping[int, NDArray[np.uint8]], paths: Sequence[Path], checksum: str) -> None:
        """Write the new decoded bytes of some blobs into copies of the checkpoint's files.

        Args:
            changed: new bytes by blob, of the old length.
            paths: the copies, in the order of the checkpoint's files.
            checksum: ``repair`` or ``leave`` what covers them.
        """
        ...


class LaidOut:
    """A checkpoint over pieces of files. See `ckptflip.checkpoints.target.Checkpoint`.

    Args:
        path: the checkpoint as its framework names it.
        format: the format's short name.
        files: all its files, the one that names the others first.
        tensors: the catalogue; names are unique.
        layouts: where the words of each tensor lie.
        skipped: what the catalogue leaves out.
        crcs: stored CRCs, innermost first.
        blobs: what is stored coded.
        folder: the folder that is the checkpoint, if one is.
        renaming: names of all files for another name of the checkpoint; needed where there are several files
            and no folder.

    Raises:
        CheckpointError: a piece lies outside its file.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        files: Sequence[Path],
        tensors: Sequence[Tensor],
        layouts: Sequence[Layout],
        *,
        skipped: Sequence[Skipped] = (),
        crcs: Sequence[StoredCrc] = (),
        blobs: Blobs | None = None,
        folder: Path | None = None,
        renaming: Renaming | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.files = files
        self.folder = folder
        self.tensors = tensors
        self.skipped = skipped
        self.layouts = layouts
        self.crcs = crcs
        self.blobs = blobs
        self.renaming = renaming
        self._open: OrderedDict[int, int] = OrderedDict()
        self._decoded: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._check_inside()

    def close(self) -> None:
        """Release the files; closing twice is allowed."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._decoded.clear()

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order.

        Raises:
            CheckpointError: the data cannot be read.
        """
        layout = self.layouts[tensor]
        found = np.empty(words.size, layout.number.word_dtype)
        filled = 0
        for piece, rows, bits in located(layout, words):
            fetch = self._packed if layout.bits else self._whole
            values = fetch(piece.file, layout, bits)
            found[rows] = values
            filled += values.size
        if filled != words.size:
            raise CheckpointError(f"{self.path}: parts of {self.tensors[tensor].name} lie in no file")
        return found

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        layout, total = self.layouts[tensor], self.tensors[tensor].words
        if is_plain(layout) and layout.pieces[0].file < len(self.files):
            yield from self._plain_blocks(layout, total)
            return
        for start in range(0, total, _BLOCK_WORDS):
            yield self.read(tensor, np.arange(start, min(total, start + _BLOCK_WORDS), dtype=np.int64))

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether none of these words is stored coded."""
        if self.blobs is None:
            return True
        for i, tensor in enumerate(tensors):
            layout = self.layouts[tensor]
            if all(p.file < len(self.files) for p in layout.pieces):
                continue
            if words is None or any(p.file >= len(self.files) for p, _, _ in located(layout, words[i])):
                return False
        return True

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: see `ckptflip.checkpoints.target.Checkpoint.prepare`."""
        targets = [str(p) for p in paths or self.files]
        data, coded = self._grouped(changes)
        if coded and paths is None:
            name = next(self.tensors[t].name for t, _ in changes.by_tensor() if not self.by_patching([t]))
            raise CheckpointError(f"{name} cannot be altered in place; write a new checkpoint with -o")
        patches = [Patch(targets[f], d, at, masks) for f, d, at, masks in data]
        entries: list[ChecksumEntry] = []
        if checksum == "repair" and self.crcs:
            with self._descriptors() as descriptors:
                entries = (
                    stored_crcs.updated(
                        self.crcs, [(f, Patch("", d, at, m)) for f, d, at, m in data], descriptors
                    )
                    if recorded is None
                    else stored_crcs.restored(self.crcs, recorded, descriptors)
                )
            patches += stored_crcs.as_patches(entries, targets)
        finish = None
        if coded:
            finish = lambda: self._recode(coded, [Path(t) for t in targets], checksum)  # noqa: E731
        return Prepared(patches, tuple(entries), finish)

    def extents(self) -> Iterator[Extent]:
        """Every range of a file in which words lie: see `ckptflip.checkpoints.extents`."""
        coded = getattr(self.blobs, "extent", None)
        for tensor, layout in enumerate(self.layouts):
            for piece in layout.pieces if self.tensors[tensor].words else ():
                if piece.file < len(self.files):
                    span = piece.span(layout.width)
                    yield Extent(tensor, piece.file, *span, locate=in_piece(layout, piece))
                elif coded is not None:
                    found = coded(piece.file - len(self.files))
                    if found is not None:
                        file, start, end, part = found
                        yield Extent(tensor, file, start, end, part=part)

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """The files under another name."""
        if self.renaming is not None:
            return self.renaming(out)
        if len(self.files) > 1:
            raise UsageError(f"{self.path} has several files: name a checkpoint of the same kind, not {out}")
        return [NewFile(out)]

    def _check_inside(self) -> None:
        """Refuse pieces outside their files: a header can claim anything."""
        sizes = [_size(f) for f in self.files]
        for tensor, layout in zip(self.tensors, self.layouts, strict=True):
            if not tensor.words:
                continue
            for piece in layout.pieces:
                if piece.file >= len(sizes):
                    continue
                first, end = piece.span(layout.width)
                if first < 0 or end > sizes[piece.file]:
                    raise CheckpointError(
                        f"{self.files[piece.file]} is damaged or truncated: {tensor.name} would lie at bytes "
                        f"{first} to {end} of a file of {sizes[piece.file]} bytes"
                    )

    def _plain_blocks(self, layout: Layout, total: int) -> Iterator[NDArray[Any]]:
        piece, size = layout.pieces[0], layout.stored.itemsize
        step = _BLOCK_BYTES // size
        for start in range(0, total, step):
            count = min(step, total - start) * size
            raw = os.pread(self._descriptor(piece.file), count, piece.offset + start * size)
            if len(raw) != count:
                raise CheckpointError(f"{self.files[piece.file]} was truncated while it was read")
            yield np.frombuffer(raw, layout.stored).astype(layout.number.word_dtype, copy=False)

    def _whole(self, file: int, layout: Layout, bits: NDArray[np.int64]) -> NDArray[Any]:
        """Words that fill whole bytes, at addresses in bits."""
        return self._fetch(file, layout.stored, bits >> 3)

    def _packed(self, file: int, layout: Layout, bits: NDArray[np.int64]) -> NDArray[Any]:
        """Words packed tighter than bytes: each from the one or two bytes that it lies in."""
        first, shift = bits >> 3, bits & 7
        straddles = shift + layout.bits > 8
        wanted = np.unique(np.concatenate([first, first[straddles] + 1]))
        stored = self._fetch(file, np.dtype("u1"), wanted)
        words = stored[np.searchsorted(wanted, first)].astype(np.uint16)
        words[straddles] |= stored[np.searchsorted(wanted, first[straddles] + 1)].astype(np.uint16) << 8
        return (words >> shift.astype(np.uint16) & ((1 << layout.bits) - 1)).astype(np.uint8)

    def _fetch(self, file: int, stored: np.dtype[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Words at byte offsets, in any order."""
        if file >= len(self.files):
            data = self._blob(file - len(self.files))
            if offsets.size and int(offsets.max()) + stored.itemsize > data.size:
                raise CheckpointError(f"{self.path}: a compressed part holds less than its index says")
            raw = data[offsets[:, None] + np.arange(stored.itemsize)]
            words: NDArray[Any] = raw.view(stored)[:, 0].astype(stored.newbyteorder("="), copy=False)
            return words
        if offsets.size and (np.diff(offsets) < 0).any():
            order = np.argsort(offsets)
            found = np.empty(offsets.size, stored.newbyteorder("="))
            found[order] = patch.read_words(self._descriptor(file), stored, offsets[order])
            return found
        return patch.read_words(self._descriptor(file), stored, offsets)

    def _blob(self, blob: int) -> NDArray[np.uint8]:
        assert self.blobs is not None
        if blob not in self._decoded:
            self._decoded[blob] = self.blobs.decode(blob)
            if len(self._decoded) > _KEPT_BLOBS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(blob)
        return self._decoded[blob]

    def _grouped(self, changes: Changes) -> tuple[list[_Group], dict[int, list[_Group]]]:
        """Masks by file and word size, offsets ascending: of plain files, and of each blob."""
        groups: dict[tuple[int, np.dtype[Any]], list[tuple[NDArray[np.int64], NDArray[Any]]]] = {}
        for tensor, rows in changes.by_tensor():
            layout = self.layouts[tensor]
            words, masks = changes.word[rows], changes.mask[rows]
            for piece, part, bits in located(layout, words):
                at, xored = _bytes_of(bits, masks[part], layout)
                groups.setdefault((piece.file, layout.stored), []).append((at, xored))
        plain: list[_Group] = []
        coded: dict[int, list[_Group]] = {}
        for (file, stored), several in groups.items():
            at = np.concatenate([a for a, _ in several])
            xored = np.concatenate([m for _, m in several])
            order = np.argsort(at, kind="stable")
            group = (file, stored, *_merged(at[order], xored[order]))
            if file < len(self.files):
                plain.append(group)
            else:
                coded.setdefault(file - len(self.files), []).append(group)
        return plain, coded

    def _recode(self, coded: Mapping[int, list[_Group]], paths: Sequence[Path], checksum: str) -> None:
        assert self.blobs is not None
        changed = {}
        for blob, groups in coded.items():
            data = self.blobs.decode(blob).copy()
            for _, stored, offsets, masks in groups:
                at = offsets[:, None] + np.arange(stored.itemsize)
                data[at] ^= masks.astype(stored)[:, None].view(np.uint8)
            changed[blob] = data
        self._decoded.clear()
        self.blobs.encode(changed, paths, checksum)

    def _descriptor(self, file: int) -> int:
        if file not in self._open:
            if len(self._open) >= _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            try:
                self._open[file] = os.open(self.files[file], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as why:
                raise CheckpointError(f"{self.files[file]} cannot be read: {why.strerror}") from None
        self._open.move_to_end(file)
        return self._open[file]

    @contextlib.contextmanager
    def _descriptors(self) -> Iterator[Mapping[int, int]]:
        """All files, each opened when it is asked for."""
        yield _Lazy(self._descriptor, len(self.files))


class _Lazy(Mapping[int, int]):
    """A mapping that is worked out when asked."""

    def __init__(self, get: Callable[[int], int], count: int) -> None:
        self._get = get
        self._count = count

    def __getitem__(self, key: int) -> int:
        return self._get(key)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def __len__(self) -> int:
        return self._count


# The file's position, the words' dtype, byte offsets (ascending), masks.
_Group = tuple[int, "np.dtype[Any]", NDArray[np.int64], NDArray[Any]]


def _bytes_of(
    bits: NDArray[np.int64], masks: NDArray[np.uint64], layout: Layout
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Byte offsets and masks of altered words, packed ones as the bytes that they lie in."""
    if not layout.bits:
        return bits >> 3, masks.astype(layout.number.word_dtype)
    shifted = masks.astype(np.uint16) << (bits & 7).astype(np.uint16)
    at = np.concatenate([bits >> 3, (bits >> 3) + 1])
    xored = np.concatenate([shifted & 0xFF, shifted >> 8]).astype(np.uint8)
    return at[xored != 0], xored[xored != 0]


def _merged(at: NDArray[np.int64], masks: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Several packed words of one byte as one mask."""
    firsts = np.flatnonzero(np.diff(at, prepend=-1))
    if firsts.size == at.size:
        return at, masks
    return at[firsts], np.bitwise_xor.reduceat(masks, firsts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
