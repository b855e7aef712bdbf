"""A `.keras` file: a zip archive with the weights as an HDF5 file among its members."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints import files, patch, stored_crcs, zip_rewrite
from ckptflip.checkpoints.extents import Extent
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.hdf5.target import HDF5Checkpoint
from ckptflip.checkpoints.hdf5.window import Window
from ckptflip.checkpoints.keras import config
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.keras.names import renamed
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Changes, NewFile, Prepared, Skipped
from ckptflip.checkpoints.zips import DEFLATED, STORED, Member, Members, members
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import ChecksumEntry

WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"
_LARGEST_CONFIG = 1 << 26
_STEP = 1 << 20
# Trained numbers hardly shrink. Keras refuses the same as a bomb, from 256 MiB on.
_MOST_EXPANSION = 100
_SMALL = 1 << 28


class Archive:
    """A model in a `.keras` file. See `ckptflip.checkpoints.target.Checkpoint`.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such archive, truncated or damaged.
    """

    format = "keras"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Sequence[Path] = [path]
        self.folder: Path | None = None
        with contextlib.ExitStack() as held:
            try:
                self._file: BinaryIO = held.enter_context(open_plain(path))
            except OSError as why:
                raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
            archive = members(self._file.fileno(), path)
            self.model = _model(path, archive)
            naming = partial(_named, model=self.model)
            self._member = _weights(path, archive)
            if self._member.method == DEFLATED:
                unpacked = held.enter_context(tempfile.TemporaryFile())
                _inflate(path, self._file.fileno(), self._member, unpacked)
                place = (unpacked.fileno(), 0)
            else:
                place = (self._file.fileno(), self._member.offset)
            window = Window(*place, self._member.size, f"{WEIGHTS} in {path}")
            self._weights = HDF5Checkpoint(path, window, naming)
            held.callback(self._weights.close)
            self._held = held.pop_all()
        self.marks = self._weights.marks
        self.tensors: Sequence[Tensor] = self._weights.tensors
        if self._member.method == DEFLATED:
            self.tensors = [replace(t, layout=f"{t.layout}, deflated", offset=None) for t in self.tensors]
        self.skipped: Sequence[Skipped] = self._weights.skipped

    def close(self) -> None:
        """Release the file; closing twice is allowed."""
        self._held.close()

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order."""
        return self._weights.read(tensor, words)

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        return self._weights.blocks(tensor)

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether words of these tensors can be altered byte for byte, without writing the archive anew."""
        return self._member.method == STORED and self._weights.by_patching(tensors, words)

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: see `ckptflip.checkpoints.target.Checkpoint.prepare`.

        The archive's CRC-32 covers all of the HDF5 file, with the checksums inside it.

        Raises:
            CheckpointError: a tensor is compressed or the like, and no copy was given.
        """
        by_tensor = list(changes.by_tensor())
        tensors, words = [t for t, _ in by_tensor], [changes.word[rows] for _, rows in by_tensor]
        if not self.by_patching(tensors, words):
            if paths is None:
                name = next(self.tensors[t].name for t in tensors if not self.by_patching([t]))
                raise CheckpointError(f"{name} cannot be altered in place; write a new file with -o")
            return Prepared([], (), partial(_rewrite, paths[0], changes, checksum))
        made = self._weights.prepare(changes, checksum, paths)
        if checksum != "repair":
            return made
        stored = StoredCrc(
            "crc32", 0, self._member.offset, self._member.size, tuple((0, p) for p in self._member.crc_places)
        )
        descriptors = {0: self._file.fileno()}
        entries = (
            stored_crcs.updated([stored], [(0, p) for p in made.patches], descriptors)
            if not recorded
            else stored_crcs.restored([stored], recorded, descriptors)
        )
        target = self.path if paths is None else paths[0]
        return Prepared([*made.patches, *stored_crcs.as_patches(entries, [str(target)])], tuple(entries))

    def extents(self) -> Iterator[Extent]:
        """Every range of the file in which words lie: see `ckptflip.checkpoints.extents`."""
        if self._member.method == STORED:
            yield from self._weights.extents()
            return
        start, end = self._member.offset, self._member.offset + self._member.packed
        for tensor in range(len(self.tensors)):
            yield Extent(tensor, 0, start, end, part=f"member {WEIGHTS}")

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """One file, under any name."""
        return [NewFile(out)]


def open_checkpoint(path: Path) -> Archive:
    """Open a `.keras` file.

    Raises:
        CheckpointError: it cannot be read, is truncated or damaged.
    """
    return Archive(path)


def _named(tensors: Sequence[Tensor], marks: Marks, model: config.Model | None) -> list[Tensor]:
    return renamed(tensors, marks, model)


def _as_stored(tensors: Sequence[Tensor], _: Marks) -> Sequence[Tensor]:
    return tensors


def _model(path: Path, archive: Members) -> config.Model | None:
    """The model's configuration, where the archive has one."""
    if _CONFIG not in archive:
        return None
    return config.parse(archive.read(_CONFIG, _LARGEST_CONFIG), f"{_CONFIG} in {path}")


def _weights(path: Path, archive: Members) -> Member:
    if WEIGHTS not in archive:
        raise CheckpointError(f"{path} holds no {WEIGHTS}: no model that Keras 3 saved")
    member = archive[WEIGHTS]
    if member.method not in (STORED, DEFLATED):
        raise CheckpointError(
            f"{path}: {WEIGHTS} is compressed by method {member.method}, which is not supported; save the "
            "model again with Keras"
        )
    if member.method == DEFLATED and member.size > max(_SMALL, _MOST_EXPANSION * member.packed):
        raise CheckpointError(
            f"{path}: {WEIGHTS} has {member.packed} bytes and claims to hold {member.size}; no weights do"
        )
    return member


def _inflate(path: Path, fd: int, member: Member, unpacked: BinaryIO) -> None:
    """Unpack the weights into a file of their own, never more bytes than they are said to have."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    left = member.size
    damaged = f"{path} is damaged: {WEIGHTS} cannot be unpacked"
    try:
        for raw in _steps(fd, member):
            while raw and not stream.eof:
                data = stream.decompress(raw, _STEP)
                raw, left = stream.unconsumed_tail, left - len(data)
                if left < 0:
                    raise CheckpointError(f"{damaged} (it holds more than it claims). Download it again")
                unpacked.write(data)
        unpacked.flush()
    except zlib.error as why:
        raise CheckpointError(f"{damaged} ({why}). Download it again") from None
    except OSError as why:
        raise CheckpointError(
            f"{path}: no room to unpack {WEIGHTS} in {tempfile.gettempdir()}: {why}"
        ) from None
    if left:
        raise CheckpointError(f"{damaged} ({left} bytes are missing). Download it again")


def _steps(fd: int, member: Member) -> Iterator[bytes]:
    """The bytes of a member as they are stored."""
    for at in range(0, member.packed, _STEP):
        yield os.pread(fd, min(_STEP, member.packed - at), member.offset + at)


def _rewrite(path: Path, changes: Changes, checksum: str) -> None:
    """Alter words of a copy by way of its weights as a file of their own.

    Args:
        path: the copy of the archive.
        changes: what to alter.
        checksum: ``repair`` or ``leave``.
    """
    alone = files.temporary_beside(path)
    try:
        with open_plain(path) as file, alone.open("wb+") as weights:
            member = _weights(path, members(file.fileno(), path))
            if member.method == DEFLATED:
                _inflate(path, file.fileno(), member, weights)
            else:
                for step in _steps(file.fileno(), member):
                    weights.write(step)
                weights.flush()
            inner = HDF5Checkpoint(
                alone, Window(weights.fileno(), 0, member.size, f"{WEIGHTS} in {path}"), _as_stored
            )
            try:
                prepared = inner.prepare(changes, checksum, [alone])
            finally:
                inner.close()
        patch.apply_patches(prepared.patches)
        finish: Callable[[], None] | None = prepared.finish
        if finish is not None:
            finish()
        zip_rewrite.rewrite(path, {WEIGHTS: np.fromfile(alone, np.uint8)}, checksum)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be written: {why.strerror or why}") from None
    finally:
        alone.unlink(missing_ok=True)
