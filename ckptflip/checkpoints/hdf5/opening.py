"""Opening an HDF5 file, or saying why that cannot be."""

from __future__ import annotations

from pathlib import Path

import h5py

from ckptflip.checkpoints.hdf5.window import Window


def open_file(path: Path, member: Window | None) -> h5py.File:
    """Open for reading under the lock that the caller holds, so without HDF5's own."""
    if member is not None:
        return h5py.File(member, "r")
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as why:
        if "locking flag" not in str(why):
            raise
        # This very process holds the file open, with locks; then HDF5 insists on them here too.
        return h5py.File(path, "r")


def why_unreadable(path: Path, member: Window | None, why: OSError) -> str:
    """What to say when the library does not open a file."""
    text = str(why)
    where, size = (path, path.stat().st_size) if member is None else (member.where, member.length)
    if "truncated" in text:
        return f"{where} is a truncated HDF5 file: its end is missing. Copy or download it again"
    if "file signature not found" in text or size == 0:
        return f"{where} is not an HDF5 file (its signature is missing)"
    return f"{where} is damaged HDF5: {text}"
