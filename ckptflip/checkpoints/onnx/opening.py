"""ONNX models: their weights and constants, in the model's own file and in files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path

from msgspec.structs import replace

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import Array, DamagedError, bits_of, catalogue, without_repeats
from ckptflip.checkpoints.onnx.external import Relocatable, locations, read_model, relocated, renamed
from ckptflip.checkpoints.onnx.model import (
    DOUBLE_DATA,
    FLOAT_DATA,
    INT32_DATA,
    INT64_DATA,
    RAW_DATA,
    UINT64_DATA,
    Entry,
    Stored,
)
from ckptflip.checkpoints.onnx.varints import Numbers, Varints
from ckptflip.checkpoints.pieces import contiguous
from ckptflip.checkpoints.target import Checkpoint, Skipped

__all__ = ["open_checkpoint", "relocated"]

_MOST_DIGITS = 19
_STRINGS = 8
# By the number of the data type: the dtype; its bits in raw data, packed from the low bits up; and the field
# that holds its numbers where they are no raw data.
_TYPES = {
    1: ("float32", 32, FLOAT_DATA),
    2: ("uint8", 8, INT32_DATA),
    3: ("int8", 8, INT32_DATA),
    4: ("uint16", 16, INT32_DATA),
    5: ("int16", 16, INT32_DATA),
    6: ("int32", 32, INT32_DATA),
    7: ("int64", 64, INT64_DATA),
    9: ("bool", 8, INT32_DATA),
    10: ("float16", 16, INT32_DATA),
    11: ("float64", 64, DOUBLE_DATA),
    12: ("uint32", 32, UINT64_DATA),
    13: ("uint64", 64, UINT64_DATA),
    14: ("complex64", 64, FLOAT_DATA),
    15: ("complex128", 128, DOUBLE_DATA),
    16: ("bfloat16", 16, INT32_DATA),
    17: ("float8_e4m3fn", 8, INT32_DATA),
    18: ("float8_e4m3fnuz", 8, INT32_DATA),
    19: ("float8_e5m2", 8, INT32_DATA),
    20: ("float8_e5m2fnuz", 8, INT32_DATA),
    21: ("uint4", 4, INT32_DATA),
    22: ("int4", 4, INT32_DATA),
    23: ("float4_e2m1fn", 4, INT32_DATA),
    24: ("float8_e8m0fnu", 8, INT32_DATA),
    25: ("uint2", 2, INT32_DATA),
    26: ("int2", 2, INT32_DATA),
    27: ("float6_e2m3fn", 6, INT32_DATA),
    28: ("float6_e3m2fn", 6, INT32_DATA),
}


class _LeftOutError(Exception):
    """A tensor that is no target, and why."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open an ONNX model.

    Raises:
        CheckpointError: it cannot be read, is truncated or damaged, or names files that it must not.
    """
    stored = read_model(path)
    beside = locations(path, stored)
    files = {file: i for i, file in enumerate(dict.fromkeys((path, *beside.values())))}
    arrays, skipped, lists = _arrays(stored, beside, files)
    laid = LaidOut(
        path,
        "onnx",
        list(files),
        catalogue(arrays, len(files)),
        [a.layout for a in arrays],
        skipped=skipped,
        blobs=Varints(path, lists) if lists else None,
        renaming=partial(renamed, path, beside),
    )
    return Relocatable(laid, stored) if beside else laid


def _arrays(
    stored: Sequence[Stored], beside: Mapping[str, Path], files: Mapping[Path, int]
) -> tuple[list[Array], list[Skipped], list[Numbers]]:
    arrays: list[Array] = []
    skipped: list[Skipped] = []
    lists: list[Numbers] = []
    for position, tensor in enumerate(stored):
        try:
            if tensor.external is not None:
                array = _outside(tensor, tensor.external, beside, files)
            else:
                array = _inside(tensor, position, len(files), lists)
        except _LeftOutError as why:
            skipped.append(Skipped(tensor.name, str(why)))
        except DamagedError as why:
            skipped.append(Skipped(tensor.name, f"damaged: {why}"))
        else:
            arrays.append(array)
    arrays, shared = _shared(arrays, len(files))
    arrays, repeated = without_repeats(arrays)
    return arrays, [*skipped, *shared, *repeated], lists


def _type(tensor: Stored) -> tuple[NumberFormat, int, int]:
    """The format of a tensor's elements, their bits in raw data, and the field of its numbers."""
    if tensor.segment:
        raise _LeftOutError("a segment of a larger tensor")
    if tensor.kind not in _TYPES:
        known = tensor.kind == _STRINGS
        raise _LeftOutError("strings" if known else f"of the data type {tensor.kind}, which is not known")
    name, width, numbers = _TYPES[tensor.kind]
    return lookup_name(name), width, numbers


def _inside(tensor: Stored, position: int, files: int, lists: list[Numbers]) -> Array:
    """A tensor in the model itself; a list of varints is added to `lists`."""
    number, width, numbers = _type(tensor)
    bits = bits_of(tensor.dims, width)
    if tensor.scattered:
        raise _LeftOutError("its numbers are stored one by one; save the model anew")
    fixed = (
        RAW_DATA if RAW_DATA in tensor.data or numbers in (INT32_DATA, INT64_DATA, UINT64_DATA) else numbers
    )
    if fixed in tensor.data or not bits:
        span = tensor.data.get(fixed)
        held = span.end - span.start if span else 0
        if held != -(-bits // 8):
            raise DamagedError(f"its shape {list(tensor.dims)} needs {-(-bits // 8)} bytes, not {held}")
        at = span.start if span else 0
        return Array(
            tensor.name, tensor.dims, contiguous(0, at, number, tensor.dims, bits=width & 7 and width)
        )
    if numbers not in tensor.data:
        raise DamagedError("its numbers are missing")
    span = tensor.data[numbers]
    # Below six bits, several elements share a number.
    each = 8 // width if width in (2, 4) else 1
    count = -(-(bits // width) // each)
    if count > span.end - span.start:
        raise DamagedError(f"its shape {list(tensor.dims)} needs {count} numbers")
    lists.append(Numbers(position, numbers, span, number, count))
    packed = width if each > 1 else 0
    layout = contiguous(files + len(lists) - 1, 0, number, tensor.dims, bits=packed)
    return Array(tensor.name, tensor.dims, layout, "varints")


def _outside(
    tensor: Stored, external: Mapping[str, Entry], beside: Mapping[str, Path], files: Mapping[Path, int]
) -> Array:
    """A tensor in a file beside the model."""
    number, width, _ = _type(tensor)
    size = -(-bits_of(tensor.dims, width) // 8)
    file = beside[external["location"].value if "location" in external else ""]
    offset = _whole(external, "offset", 0)
    rest = 0 if "length" in external else file.stat().st_size - offset
    length = _whole(external, "length", rest)
    if length != size:
        raise DamagedError(f"its shape {list(tensor.dims)} needs {size} bytes, not {length}")
    layout = contiguous(files[file], offset, number, tensor.dims, bits=width & 7 and width)
    return Array(tensor.name, tensor.dims, layout, "external")


def _whole(external: Mapping[str, Entry], key: str, default: int) -> int:
    if key not in external:
        return default
    text = external[key].value
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise DamagedError(f"its {key} is {text!r}")
    return int(text)


def _shared(arrays: Sequence[Array], files: int) -> tuple[list[Array], list[Skipped]]:
    """Make one of tensors that are the same bytes of a file; leave out those that share some otherwise."""
    skipped: list[Skipped] = []
    aliases: dict[int, list[str]] = {}
    gone: set[int] = set()
    outside = [i for i, a in enumerate(arrays) if 0 < a.layout.pieces[0].file < files]
    last, owner = (0, 0), 0
    for i in sorted(outside, key=lambda i: _range(arrays[i])):
        file, start, end = _range(arrays[i])
        if start == end:
            continue
        if (file, start) >= last:
            last, owner = (file, end), i
            continue
        gone.add(i)
        one = replace(arrays[i], name=arrays[owner].name) == arrays[owner]
        if one:
            aliases.setdefault(owner, []).append(arrays[i].name)
        else:
            skipped.append(Skipped(arrays[i].name, f"shares bytes with {arrays[owner].name}"))
    kept = [replace(a, aliases=tuple(aliases.get(i, ()))) for i, a in enumerate(arrays) if i not in gone]
    return kept, skipped


def _range(array: Array) -> tuple[int, int, int]:
    """The file of an array, its first byte, and the byte after its last."""
    piece, number = array.layout.pieces[0], array.layout
    return piece.file, piece.offset, piece.offset - (-prod(number.dims) * number.width // 8)
