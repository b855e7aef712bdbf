"""Which format a checkpoint is in: by its first bytes, then by its name."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from msgspec import Struct

from ckptflip.checkpoints.files import locked
from ckptflip.checkpoints.markers import FOLDERS, is_checkpoint, is_old_orbax, main_file
from ckptflip.checkpoints.target import Checkpoint
from ckptflip.errors import CheckpointError

ENTRY_POINTS = "ckptflip.formats"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# HDF5 may start after a user block of 512 bytes or a larger power of two.
_SIGNATURE_SEARCH = 1 << 24
_HEAD = 512
_HDF5_SUFFIXES = frozenset((".h5", ".hdf5", ".hdf", ".he5"))
_EXPORTED = ("_weights_config.json", "_constants_config.json")
_LEVELDB_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_MOST_LOCKS = 64

# What opens each format: a function, or class, that takes the path.
_OPENERS = {
    "hdf5": "ckptflip.checkpoints.hdf5.target:HDF5Checkpoint",
    "keras": "ckptflip.checkpoints.keras.archive:open_checkpoint",
    "keras sharded": "ckptflip.checkpoints.keras.shards:open_checkpoint",
    "pytorch": "ckptflip.checkpoints.torch_zip.archive:open_checkpoint",
    "torch distributed": "ckptflip.checkpoints.torch_dcp:open_checkpoint",
    "safetensors": "ckptflip.checkpoints.safetensors:open_checkpoint",
    "sharded": "ckptflip.checkpoints.sharded:open_checkpoint",
    "tensorbundle": "ckptflip.checkpoints.tensorbundle:open_checkpoint",
    "npz": "ckptflip.checkpoints.npz:open_checkpoint",
    "zarr": "ckptflip.checkpoints.zarr:open_checkpoint",
    "orbax": "ckptflip.checkpoints.orbax:open_checkpoint",
    "gguf": "ckptflip.checkpoints.gguf:open_checkpoint",
    "onnx": "ckptflip.checkpoints.onnx:open_checkpoint",
}
_INDICES = (
    (".weights.json", "keras sharded"),
    (".safetensors.index.json", "sharded"),
    (".bin.index.json", "sharded"),
)


class Format(Protocol):
    """A format that another package brings, by an entry point of the group ``ckptflip.formats``."""

    def recognises(self, path: Path, head: bytes) -> bool:
        """Whether a checkpoint is in this format.

        Args:
            path: the file or folder.
            head: its first 512 bytes; empty for a folder.
        """
        ...

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open it.

        Raises:
            CheckpointError: it is damaged.
        """
        ...


class Found(Struct, frozen=True, eq=False):
    """A checkpoint's format.

    Attributes:
        name: of the format.
        path: the checkpoint, as its opener wants it named.
        main: the file to lock: the one that names the others.
        opener: opens it.
    """

    name: str
    path: Path
    main: Path
    opener: Callable[[Path], Checkpoint]


def find(path: Path) -> Found:
    """The format of a checkpoint.

    Raises:
        CheckpointError: there is nothing, or nothing that can be altered; says what it looks like.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        index = path.with_name(f"{path.name}.index")
        if path.name and index.is_file():
            return _built_in("tensorbundle", index)
        data = next(path.parent.glob(f"{glob.escape(path.name)}.data-*-of-*"), None) if path.name else None
        if data is not None:
            raise CheckpointError(f"{index}, the index of {data.name}, does not exist")
        raise CheckpointError(f"{path} does not exist")
    if not path.is_file():
        # Opening a pipe would wait for its other end.
        raise CheckpointError(f"{path} is not a plain file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            name = _by_bytes(path, head, file.seek, file.read)
    except PermissionError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
    if name is not None:
        return _built_in(name, path)
    other = _other(path, head)
    if other is not None:
        return other
    raise CheckpointError(_unknown(path, head))


def _built_in(name: str, path: Path, main: Path | None = None) -> Found:
    module, _, function = _OPENERS[name].partition(":")
    opener = cast("Callable[[Path], Checkpoint]", getattr(import_module(module), function))
    return Found(name, path, main or path, opener)


def _in_folder(folder: Path) -> Found:
    for marker, name in FOLDERS:
        main = folder / marker
        if not main.exists():
            continue
        if name == "tensorbundle":
            main = folder / "variables" / "variables.index"
            if not main.is_file():
                raise CheckpointError(f"{folder} is a SavedModel without variables: nothing to alter")
        return _built_in(name, folder, main)
    if is_old_orbax(folder):
        return _built_in("orbax", folder)
    other = _other(folder, b"")
    if other is not None:
        return other
    inside = main_file(folder)
    hint = f"name {inside}" if inside is not None else "name a checkpoint in it"
    raise CheckpointError(f"{folder} is a folder, and no checkpoint itself: {hint}")


def _by_bytes(
    path: Path, head: bytes, seek: Callable[[int, int], int], read: Callable[[int], bytes]
) -> str | None:
    """The format that a file's bytes tell, or its name where bytes tell nothing."""
    if head.startswith(HDF5_SIGNATURE):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        # A file of a distributed checkpoint is several zips, one behind the other.
        return None if path.suffix == ".distcp" else _zip(path)
    if head.startswith(b"\x93NUMPY"):
        return "npz"
    if head.startswith((b"GGUF", b"FUGG")):
        return "gguf"
    if head[:1] == b"{":
        return next((name for suffix, name in _INDICES if path.name.endswith(suffix)), None)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    if _has_user_block(path, seek, read):
        return "hdf5"
    if path.suffix == ".index":
        seek(-min(8, path.stat().st_size), 2)
        if read(8) == _LEVELDB_MAGIC:
            return "tensorbundle"
    # A ModelProto begins with field 1, the version of its intermediate representation.
    if path.suffix == ".onnx" and head[:1] == b"\x08":
        return "onnx"
    return None


def _has_user_block(path: Path, seek: Callable[[int, int], int], read: Callable[[int], bytes]) -> bool:
    at, size = 512, path.stat().st_size
    while at < min(_SIGNATURE_SEARCH, size):
        seek(at, 0)
        if read(8) == HDF5_SIGNATURE:
            return True
        at *= 2
    return False


def _zip(path: Path) -> str | None:
    """The format of a zip, by the names of its members."""
    from ckptflip.checkpoints.zips import members

    with path.open("rb") as file:
        names = list(members(file.fileno(), path))
    if "model.weights.h5" in names:
        return "keras"
    if any(m.endswith((".npy", ".npz")) for m in names):
        return "npz"
    # An exported program (.pt2) lists its weights in JSON.
    if any(m.rpartition("/")[2] == "data.pkl" or m.endswith(_EXPORTED) for m in names):
        return "pytorch"
    return None


def _other(path: Path, head: bytes) -> Found | None:
    """A format that another package brings."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        try:
            brought = cast("Format", entry.load())
        except ImportError as why:
            raise CheckpointError(f"the format {entry.name!r} cannot be loaded: {why}") from None
        if brought.recognises(path, head):
            return Found(entry.name, path, path, brought.open_checkpoint)
    return None


def _unknown(path: Path, head: bytes) -> str:
    """What to say of a file of no known format."""
    if not head:
        return f"{path} is empty"
    if path.suffix.lower() in _HDF5_SUFFIXES:
        return f"{path} is named like HDF5, but its signature is missing: damaged, or another format"
    if path.name == ".metadata" or path.suffix == ".distcp":
        return f"{path} is part of a distributed checkpoint: name its folder, {path.parent}"
    if ".data-" in path.name and "-of-" in path.name:
        index = f"{path.name.partition('.data-')[0]}.index"
        return f"{path} is part of a TensorFlow checkpoint: name its index, {path.with_name(index)}"
    if is_checkpoint(path.parent):
        return f"{path} is part of a checkpoint: name its folder, {path.parent}"
    from ckptflip.checkpoints.torch_zip import legacy_reason

    return legacy_reason(path, head) or (
        f"{path} is no checkpoint of a known format ({_looks_like(head)}); docs/formats/README.md lists them"
    )


def _looks_like(head: bytes) -> str:
    if head.startswith(b"PK"):
        return "it looks like a zip that no framework wrote"
    if b"\0" not in head:
        return "it looks like text"
    return "its first bytes tell nothing"


@contextlib.contextmanager
def opened(path: str | Path, *, exclusive: bool = False) -> Iterator[Checkpoint]:
    """An open checkpoint, under its locks.

    Args:
        path: the checkpoint as its framework names it: a file, a folder, a prefix, an index.
        exclusive: it will be altered in place.

    Raises:
        CheckpointError: missing, damaged, in use or of an unknown format.
    """
    found = find(Path(path))
    with contextlib.ExitStack() as held:
        if found.main.is_file():
            held.enter_context(locked(found.main, exclusive=exclusive))
        checkpoint = found.opener(found.path)
        held.callback(checkpoint.close)
        for file in checkpoint.files[:_MOST_LOCKS]:
            if file.resolve() != found.main.resolve():
                held.enter_context(locked(file, exclusive=exclusive))
        yield checkpoint
