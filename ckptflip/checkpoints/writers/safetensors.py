"""safetensors: the length of a JSON header, the header, the tensors one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.checkpoints.writers import Entry, raw
from ckptflip.faults.catalogue import Tensor

# The names of the format's own document (safetensors 0.8) for formats of whole bytes.
DTYPES = {
    "bool": "BOOL",
    **{f"{kind}int{n}": f"{letter}{n}" for kind, letter in (("", "I"), ("u", "U")) for n in (8, 16, 32, 64)},
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    "bfloat16": "BF16",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
}
_ALIGNMENT = 8


def unfit(tensor: Tensor) -> str | None:
    """Why safetensors cannot hold a tensor; None if it can."""
    if tensor.name == "__metadata__":
        return "safetensors keeps this name for itself"
    return None if tensor.number.name in DTYPES else f"safetensors has no {tensor.number.name}"


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file. See `ckptflip.checkpoints.writers.Writer`."""
    # Wide words first, so that each tensor begins at a multiple of its word size.
    ordered = sorted(entries, key=lambda e: -e.tensor.number.word_size)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in ordered:
        tensor = entry.tensor
        header[tensor.name] = {
            "dtype": DTYPES[tensor.number.name],
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.nbytes),
        }
        at += tensor.nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            for block in entry.blocks():
                file.write(raw(block))
