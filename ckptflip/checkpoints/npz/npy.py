"""What the header of a .npy file says: the dtype, the shape, and where the data begins.

Source: NEP 1, "A simple file format for NumPy arrays", and `numpy.lib.format` at version 2.4.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.listing import Array, DamagedError, bits_of
from ckptflip.checkpoints.npz.literals import literal
from ckptflip.checkpoints.pieces import Layout, Piece, strides_of
from ckptflip.checkpoints.target import Skipped

MAGIC = b"\x93NUMPY"
# Six times what numpy itself reads unless told otherwise.
_LONGEST = 1 << 16
_DTYPE = re.compile(r"([<>|=]?)([a-zA-Z?])(\d{0,9})(?:\[.*\])?")
# By kind and bytes. ml_dtypes has one type that numpy calls f1. Of its others a file keeps only the size;
# their bits can be altered all the same, as those of whole numbers.
_NUMBERS = {
    "b1": "bool",
    "?": "bool",
    "i1": "int8",
    "i2": "int16",
    "i4": "int32",
    "i8": "int64",
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "u8": "uint64",
    "f1": "float8_e5m2",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
    "V1": "uint8",
    "V2": "uint16",
}
_REASONS = {
    "O": "pickled Python objects, which are never loaded",
    "M": "dates",
    "m": "time spans",
    "V": "raw bytes of no stated type",
    **dict.fromkeys("SaUT", "strings"),
}


class Field(Struct, frozen=True):
    """Numbers of one kind inside every element of an array.

    Attributes:
        suffix: what to add to the array's name: ``.x`` for a structure's field, else empty.
        number: the format of a number; None where there are no numbers.
        order: ``<`` or ``>``.
        offset: bytes from the start of the element.
        shape: further axes inside the element.
        strides: bits from one number to the next along each of these.
        note: why there are no numbers, or what is not known of them.
    """

    suffix: str
    number: NumberFormat | None
    order: str
    offset: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    note: str = ""


class Header(Struct, frozen=True):
    """A parsed header.

    Attributes:
        shape: of the array.
        fortran: whether the first axis is the innermost one.
        fields: what an element consists of.
        itemsize: bytes of an element.
        start: where the data begins, counted from the magic bytes.
    """

    shape: tuple[int, ...]
    fortran: bool
    fields: tuple[Field, ...]
    itemsize: int
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return bits_of(self.shape, self.itemsize)

    @property
    def pickled(self) -> bool:
        """Whether the data is a pickle: one field of objects makes it one."""
        return any(f.note == _REASONS["O"] for f in self.fields)


def read_header(head: Callable[[int], bytes]) -> Header:
    """Parse a header.

    Args:
        head: gives so many bytes from the start of the file, or fewer where it ends.

    Raises:
        DamagedError: it is no header, or one that cannot be true.
    """
    start = head(12)
    if len(start) < 12 or not start.startswith(MAGIC):
        raise DamagedError("it does not begin as a .npy file does")
    version = (start[6], start[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise DamagedError(f"its version is {version[0]}.{version[1]}, and those known are 1.0 to 3.0")
    skip = 10 if version == (1, 0) else 12
    length = int.from_bytes(start[8:skip], "little")
    if length > _LONGEST:
        raise DamagedError(f"its header claims {length} bytes, of at most {_LONGEST}")
    raw = head(skip + length)[skip:]
    if len(raw) < length:
        raise DamagedError("it ends within its header")
    try:
        text = raw.decode("utf-8" if version == (3, 0) else "latin-1")
    except UnicodeDecodeError:
        raise DamagedError("its header is not UTF-8") from None
    return _header(literal(text), skip + length)


def arrays(header: Header, name: str, file: int, offset: int, how: str) -> tuple[list[Array], list[Skipped]]:
    """The arrays of numbers in a .npy file, and what is left out.

    Args:
        header: of the file.
        name: of the array; a structure's fields are added after a dot.
        file: position of the file that holds the data, or of the blob.
        offset: where the .npy file begins in it.
        how: the layout in words.
    """
    if header.pickled:
        return [], [Skipped(name, _REASONS["O"])]
    found: list[Array] = []
    skipped: list[Skipped] = []
    for field in header.fields:
        if field.number is None:
            skipped.append(Skipped(name + field.suffix, field.note))
            continue
        whole = (*header.shape, *field.shape)
        bits_of(whole, field.number.width)
        layout = _layout(header, field, field.number, file, offset + header.start)
        words = ", ".join(filter(None, (how, "Fortran order" if header.fortran else "", field.note)))
        found.append(Array(name + field.suffix, whole, layout, words))
    return found, skipped


def _layout(header: Header, field: Field, number: NumberFormat, file: int, start: int) -> Layout:
    width = header.itemsize * 8
    if header.fortran:
        outer = tuple(accumulate(header.shape[:-1], mul, initial=width))
    else:
        outer = strides_of(header.shape, width)
    parts = ((number.parts,), (number.word_size * 8,)) if number.parts > 1 else ((), ())
    dims = (*header.shape, *field.shape, *parts[0])
    piece = Piece(file, start + field.offset, dims, (*outer, *field.strides, *parts[1]))
    return Layout(dims, (piece,), number, field.order)


def _header(said: Any, start: int) -> Header:
    if not isinstance(said, dict) or set(said) != {"descr", "fortran_order", "shape"}:
        raise DamagedError("its header is no dict of descr, fortran_order and shape")
    shape, fortran = said["shape"], said["fortran_order"]
    if not _is_shape(shape) or not isinstance(fortran, bool):
        raise DamagedError(f"its shape {shape!r} or its order {fortran!r} is none")
    fields, itemsize = _fields(said["descr"], "", 0)
    header = Header(shape, fortran and len(shape) > 1, tuple(fields), itemsize, start)
    bits_of(shape, max(itemsize, 1) * 8)
    return header


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int for n in value)


def _fields(descr: Any, suffix: str, at: int) -> tuple[list[Field], int]:
    """The fields of a dtype that begins at byte `at` of an element, and its size."""
    if isinstance(descr, str):
        field, size = _plain(descr, suffix, at)
        return [field], size
    if not isinstance(descr, list):
        raise DamagedError(f"its dtype {descr!r} is none")
    found: list[Field] = []
    names: set[str] = set()
    end = at
    for i, part in enumerate(descr):
        name, inner, shape = _member(part, i)
        if name in names:
            raise DamagedError(f"its dtype has two fields named {name!r}")
        names.add(name)
        several, size = _fields(inner, f"{suffix}.{name}", end)
        end += bits_of(shape, size)
        strides = strides_of(shape, size * 8)
        if part[0] == "" and isinstance(inner, str) and "V" in inner:
            continue  # padding
        for each in several:
            found.append(replace(each, shape=(*shape, *each.shape), strides=(*strides, *each.strides)))
    return found, end - at


def _member(part: Any, position: int) -> tuple[str, Any, tuple[int, ...]]:
    """Name, dtype and shape of a structure's member."""
    if not isinstance(part, tuple) or len(part) not in (2, 3):
        raise DamagedError(f"its dtype has the member {part!r}")
    name, shape = part[0], part[2] if len(part) == 3 else ()
    if isinstance(name, tuple) and len(name) == 2:
        name = name[1]  # the first one is a title
    shape = (shape,) if type(shape) is int else shape
    if not isinstance(name, str) or not _is_shape(shape):
        raise DamagedError(f"its dtype has the member {part!r}")
    return name or f"f{position}", part[1], shape


def _plain(descr: str, suffix: str, at: int) -> tuple[Field, int]:
    """The only field of a dtype that is no structure, and its size."""
    parsed = _DTYPE.fullmatch(descr)
    if parsed is None:
        raise DamagedError(f"its dtype {descr!r} is none")
    order, kind, digits = parsed.groups()
    size = 8 if kind in "OMm" else int(digits or 1) * (4 if kind == "U" else 1)
    order = order if order in ("<", ">") else "<" if sys.byteorder == "little" else ">"
    name = _NUMBERS.get(kind + digits)
    if name is None:
        note = _REASONS.get(kind, f"of the dtype {descr}, which has no IEEE layout")
        return Field(suffix, None, order, at, note=note), size
    note = "type not stored" if kind == "V" else ""
    return Field(suffix, lookup_name(name), order if size > 1 else "<", at, note=note), size
