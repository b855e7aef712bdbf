"""npz: a zip of npy files, stored without compression."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints.writers import Entry, raw
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64


def unfit(tensor: Tensor) -> str | None:
    """Why npz cannot hold a tensor; None if it can."""
    if any(part in ("", "..", ".") for part in tensor.name.split("/")) or "\\" in tensor.name:
        return "its name cannot be that of a file in a zip"
    return None if _dtype(tensor.number) else f"numpy's files have no {tensor.number.name}"


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file. See `ckptflip.checkpoints.writers.Writer`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry in entries:
            # A date of its own would make two conversions of one checkpoint differ.
            member = zipfile.ZipInfo(f"{entry.tensor.name}.npy")
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(_header(entry.tensor))
                for block in entry.blocks():
                    file.write(raw(block))


def _dtype(number: NumberFormat) -> np.dtype[Any] | None:
    """numpy's own dtype of this name, little-endian; None where there is none."""
    try:
        found = np.dtype(number.name)
    except TypeError:
        return None
    # ml_dtypes registers names with numpy once it is imported; npy files cannot tell them from raw bytes.
    return found.newbyteorder("<") if found.kind in "biufc" and _is_own(number) else None


def _is_own(number: NumberFormat) -> bool:
    from ckptflip.bits.formats import ML_FLOATS, ML_INTEGERS

    return number.name not in ML_FLOATS and number.name not in ML_INTEGERS


def _header(tensor: Tensor) -> bytes:
    """The header of an npy file, version 1.0 (numpy.lib.format)."""
    dtype = _dtype(tensor.number)
    assert dtype is not None
    shape = f"({tensor.shape[0]},)" if len(tensor.shape) == 1 else repr(tuple(tensor.shape))
    text = f"{{'descr': {dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(_MAGIC) + 2 + len(text) + 1) % _ALIGNMENT) + "\n"
    if len(text) > 0xFFFF:
        raise UsageError(f"{tensor.name} has too many axes for an npy file")
    return _MAGIC + len(text).to_bytes(2, "little") + text.encode("latin-1")
