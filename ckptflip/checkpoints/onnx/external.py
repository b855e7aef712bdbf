"""The files beside an ONNX model that hold tensors of it: which they may be, and giving them other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.onnx.model import Stored, tensors, with_lengths
from ckptflip.checkpoints.patch import Patch
from ckptflip.checkpoints.protobuf import FileBytes, ProtobufError
from ckptflip.checkpoints.splice import Edit, spliced
from ckptflip.checkpoints.target import Changes, NewFile, Prepared
from ckptflip.errors import CheckpointError
from ckptflip.faults.record import ChecksumEntry

# The format's own limit for a message.
_LARGEST_MODEL = (1 << 31) - 1


class Relocatable:
    """A model with files beside it. See `ckptflip.checkpoints.target.Checkpoint`.

    A copy of it names files of other names, so that the numbers inside the model itself lie elsewhere there.

    Args:
        laid: the model and its files.
        stored: the model's tensors.
    """

    def __init__(self, laid: LaidOut, stored: Sequence[Stored]) -> None:
        self._laid = laid
        self._starts = _starts(stored)
        self.path, self.format, self.folder = laid.path, laid.format, laid.folder
        self.files, self.tensors, self.skipped = laid.files, laid.tensors, laid.skipped
        self.read, self.blocks, self.by_patching = laid.read, laid.blocks, laid.by_patching
        self.renamed, self.close, self.extents = laid.renamed, laid.close, laid.extents

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: see `ckptflip.checkpoints.target.Checkpoint.prepare`."""
        prepared = self._laid.prepare(changes, checksum, paths, recorded)
        if paths is None:
            return prepared
        moves = _starts(read_model(paths[0])) - self._starts
        patches = [self._moved(p, moves) if p.path == str(paths[0]) else p for p in prepared.patches]
        return replace(prepared, patches=patches)

    def _moved(self, each: Patch, moves: NDArray[np.int64]) -> Patch:
        held = np.searchsorted(self._starts, each.offsets, side="right") - 1
        return replace(each, offsets=each.offsets + moves[held])


def read_model(path: Path) -> list[Stored]:
    """The tensors that a model's file describes.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    try:
        with open_plain(path) as file:
            return tensors(FileBytes(file.fileno()))
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    except (DamagedError, ProtobufError) as why:
        raise CheckpointError(
            f"{path} is a damaged or truncated ONNX model: {why}. Copy or download it again"
        ) from None


def locations(path: Path, stored: Sequence[Stored]) -> dict[str, Path]:
    """The files that a model names, by the location as it is written there.

    Raises:
        CheckpointError: one of them is missing, or lies elsewhere than in the model's folder.
    """
    found: dict[str, Path] = {}
    one: dict[Path, Path] = {}
    for tensor in stored:
        if tensor.external is None:
            continue
        location = tensor.external["location"].value if "location" in tensor.external else ""
        if location not in found:
            file = _beside(path, location)
            # A link beside what it stands for is no file of its own.
            found[location] = one.setdefault(file.resolve(), file)
    return found


def _beside(path: Path, location: str) -> Path:
    """The file at a location, which must lie in the model's folder, or in one below."""
    parts = PurePosixPath(location).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in location or "\\" in location:
        raise CheckpointError(f"{path} names the file {location!r}; only files in its own folder are read")
    folder = path.parent
    file = folder.joinpath(*parts)
    try:
        inside = file.resolve().is_relative_to(folder.resolve()) and file.resolve() != path.resolve()
        found = file.is_file()
    except (OSError, RuntimeError):
        inside = found = False
    if found and not inside:
        raise CheckpointError(
            f"{path} names the file {location!r}, which is a link to elsewhere, or the model itself. Put the "
            "file into the model's folder"
        )
    if not found:
        raise CheckpointError(f"{path} names the file {location!r}, which is missing. Copy it there too")
    return file


def relocated(path: Path, names: Mapping[str, str]) -> bytes:
    """A model that names other files, in bytes.

    Args:
        path: the model.
        names: the new location of each file by its old one; other locations stay.

    Raises:
        CheckpointError: the model cannot be read, is damaged, or larger than 2 GiB.
    """
    try:
        with open_plain(path) as file:
            data = file.read(_LARGEST_MODEL + 1)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    if len(data) > _LARGEST_MODEL:
        raise CheckpointError(f"{path} has more than 2 GiB, which no ONNX model can have")
    entries = [t.external["location"] for t in read_model(path) if t.external and "location" in t.external]
    return spliced(
        data,
        with_lengths(
            [
                (e.span, Edit(e.span.start, e.span.end - e.span.start, names[e.value].encode()))
                for e in entries
                if e.value in names
            ]
        ),
    )


def renamed(path: Path, locations: Mapping[str, Path], out: Path) -> list[NewFile]:
    """The model under another name, and the files that it names, which get names to match."""
    files = list(dict.fromkeys(locations.values()))
    relative = {f: f.relative_to(path.parent).as_posix() for f in files}
    names = {
        f: name if out.name == path.name else _follow(name, path.stem, out.stem)
        for f, name in relative.items()
    }
    if len(set(names.values())) < len(names) or out.name in names.values():
        names = {f: f"{out.stem}-{i}-{f.name}" for i, f in enumerate(files)}
    data = None if names == relative else relocated(path, {at: names[f] for at, f in locations.items()})
    return [NewFile(out, data), *(NewFile(out.parent / names[f]) for f in files)]


def _follow(name: str, old: str, new: str) -> str:
    flat = name.replace("/", "-")
    return new + flat.removeprefix(old) if flat.startswith(old) else f"{new}-{flat}"


def _starts(stored: Sequence[Stored]) -> NDArray[np.int64]:
    """Where numbers begin in the model itself, in the order of the file."""
    starts = [span.start for t in stored for span in t.data.values()]
    return np.array(sorted(starts), np.int64)
