"""Which format a file is in: by its first bytes, then by its suffix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from ckptflip.checkpoints.files import locked
from ckptflip.checkpoints.target import Checkpoint
from ckptflip.errors import CheckpointError

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# HDF5 may start after a user block of 512 bytes or a larger power of two.
_SIGNATURE_SEARCH = 1 << 24
_FORMATS = {"hdf5": "ckptflip.checkpoints.hdf5.target:HDF5Checkpoint"}
_HDF5_SUFFIXES = frozenset((".h5", ".hdf5", ".hdf", ".he5"))


def sniff(path: Path) -> str:
    """The format of a file.

    Raises:
        CheckpointError: no format that can be altered; says what the file looks like.
    """
    with path.open("rb") as file:
        head = file.read(512)
        if head.startswith(HDF5_SIGNATURE):
            return "hdf5"
        at = 512
        while at < min(_SIGNATURE_SEARCH, path.stat().st_size):
            file.seek(at)
            if file.read(8) == HDF5_SIGNATURE:
                return "hdf5"
            at *= 2
    if not head:
        raise CheckpointError(f"{path} is empty")
    if path.suffix.lower() in _HDF5_SUFFIXES:
        raise CheckpointError(
            f"{path} is named like HDF5, but its signature is missing: damaged, or another format"
        )
    raise CheckpointError(f"{path} is not an HDF5 checkpoint ({_looks_like(head)})")


def _looks_like(head: bytes) -> str:
    if head.startswith(b"PK\x03\x04"):
        return (
            "it looks like a zip, as .pt, .keras and .npz files are; a PyTorch state can be saved anew with "
            "ckptflip.torch_h5.save(torch.load(path, weights_only=True), 'new.h5')"
        )
    if head.startswith(b"\x80") and head[1:2] in b"\x02\x03\x04\x05":
        return "it looks like a Python pickle"
    if b"\0" not in head:
        return "it looks like text"
    return "its first bytes are of no known format"


@contextlib.contextmanager
def opened(path: str | Path, *, exclusive: bool = False) -> Iterator[Checkpoint]:
    """An open checkpoint, under its lock.

    Args:
        path: the file.
        exclusive: it will be altered in place.

    Raises:
        CheckpointError: missing, damaged, in use or of an unknown format.
    """
    path = Path(path)
    with locked(path, exclusive=exclusive):
        module, _, name = _FORMATS[sniff(path)].partition(":")
        checkpoint: Checkpoint = getattr(import_module(module), name)(path)
        try:
            yield checkpoint
        finally:
            checkpoint.close()
