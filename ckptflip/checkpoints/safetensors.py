"""safetensors files: a length, a JSON header that says where each tensor lies, and the tensors' bytes.

Source: the format's page in the safetensors repository, and what the library at version 0.8 accepts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta, Struct

from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import Array, DamagedError, bits_of, catalogue
from ckptflip.checkpoints.pieces import contiguous
from ckptflip.checkpoints.target import Skipped
from ckptflip.errors import CheckpointError

_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")
# The library refuses longer headers.
_LONGEST_HEADER = 100_000_000
# The dtypes, and the bits of an element in the file. Where these are no whole bytes, elements lie side by
# side, the first in the low bits.
_DTYPES = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "U16": ("uint16", 16),
    "I16": ("int16", 16),
    "U32": ("uint32", 32),
    "I32": ("int32", 32),
    "U64": ("uint64", 64),
    "I64": ("int64", 64),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F32": ("float32", 32),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
}
_Size = Annotated[int, Meta(ge=0)]


class _Entry(Struct, frozen=True, gc=False):
    """A value of the header. Texts pass where ``__metadata__`` may have them: its keys are free."""

    dtype: str = ""
    shape: tuple[_Size, ...] | str | None = None
    data_offsets: tuple[_Size, _Size] | str | None = None


_HEADER = msgspec.json.Decoder(dict[str, _Entry | None])


def open_checkpoint(path: Path) -> LaidOut:
    """Open a safetensors file.

    Raises:
        CheckpointError: it cannot be read, is truncated, or its header is damaged.
    """
    try:
        with open_plain(path) as file:
            header, start, size = _header(file)
        arrays, skipped = _arrays(header, start, size)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    except DamagedError as why:
        raise CheckpointError(
            f"{path} is a damaged safetensors file: {why}. Copy or download it again"
        ) from None
    layouts = [a.layout for a in arrays]
    return LaidOut(path, "safetensors", [path], catalogue(arrays), layouts, skipped=skipped)


def _header(file: BinaryIO) -> tuple[dict[str, _Entry | None], int, int]:
    """The header, where the data begins, and the file's size."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise DamagedError(f"its {size} bytes cannot even hold the header's length")
    (length,) = _LENGTH.unpack(head)
    if length > min(_LONGEST_HEADER, size - _LENGTH.size):
        raise DamagedError(
            f"its header claims {length} bytes, of at most {_LONGEST_HEADER}; {size - _LENGTH.size} follow"
        )
    raw = file.read(length)
    try:
        header = _HEADER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as why:
        raise DamagedError(f"its header is not as it should be ({why})") from None
    # The decoder keeps the last of two entries with one name. A quote inside a text is written \" there.
    if raw.count(b'"data_offsets"') > len(header):
        _refuse_duplicates(raw)
    return header, _LENGTH.size + length, size


def _refuse_duplicates(raw: bytes) -> None:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in pairs:
            if name in found:
                raise DamagedError(f"its header has {name!r} twice")
            found[name] = value
        return found

    json.loads(raw, object_pairs_hook=unique)


def _arrays(header: Mapping[str, _Entry | None], start: int, size: int) -> tuple[list[Array], list[Skipped]]:
    """The tensors, and those of an unknown dtype. Together they must fill the data: the library insists."""
    arrays: list[Array] = []
    skipped: list[Skipped] = []
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == _METADATA:
            continue
        try:
            dtype, shape, first, last = _claims(entry)
            ranges.append((first, last, name))
            if dtype not in _DTYPES:
                skipped.append(Skipped(name, f"the dtype {dtype!r} is not known"))
                continue
            number, bits = lookup_name(_DTYPES[dtype][0]), _DTYPES[dtype][1]
            _check_bytes(shape, bits, last - first)
        except DamagedError as why:
            raise DamagedError(f"{name!r}: {why}") from None
        arrays.append(Array(name, shape, contiguous(0, start + first, number, shape, bits=bits & 7 and bits)))
    _check_filled(ranges, size - start)
    return arrays, skipped


def _claims(entry: _Entry | None) -> tuple[str, tuple[int, ...], int, int]:
    """The dtype and shape of a tensor, and where its bytes begin and end in the data."""
    if entry is None or not entry.dtype:
        raise DamagedError("its dtype is missing")
    if not isinstance(entry.shape, tuple) or not isinstance(entry.data_offsets, tuple):
        raise DamagedError("its shape or its data_offsets are missing")
    first, last = entry.data_offsets
    if first > last:
        raise DamagedError(f"its data would begin at byte {first} and end at byte {last}")
    return entry.dtype, entry.shape, first, last


def _check_bytes(shape: tuple[int, ...], width: int, count: int) -> None:
    bits = bits_of(shape, width)
    if bits % 8:
        raise DamagedError(f"{bits // width} elements of {width} bits do not fill whole bytes")
    if bits != count * 8:
        raise DamagedError(f"its shape {list(shape)} needs {bits // 8} bytes, not {count}")


def _check_filled(ranges: list[tuple[int, int, str]], size: int) -> None:
    """Refuse tensors that overlap, and bytes that belong to none."""
    at = 0
    for first, last, name in sorted(ranges):
        if first != at:
            verb = (
                "overlaps the one before it" if first < at else f"leaves {first - at} bytes before it unused"
            )
            raise DamagedError(f"{name!r} at byte {first} of the data {verb}")
        at = last
    if at != size:
        raise DamagedError(f"its tensors end at byte {at} of the data, which has {size} bytes")
