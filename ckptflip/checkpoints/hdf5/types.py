"""HDF5 datatypes as number formats. Names no file; asks h5py's low-level type objects only."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from h5py import h5t
from msgspec import Struct

from ckptflip.bits import NumberFormat, lookup
from ckptflip.bits.formats import COMPLEX_PARTS, ML_FLOATS, ML_INTEGERS
from ckptflip.errors import UsageError

# (bytes, (sign, exponent position, exponent bits, mantissa position, mantissa bits)) → dtype
_FLOATS = {
    (8, (63, 52, 11, 0, 52)): "float64",
    (4, (31, 23, 8, 0, 23)): "float32",
    (2, (15, 10, 5, 0, 10)): "float16",
    (2, (15, 7, 8, 0, 7)): "bfloat16",
    (1, (7, 2, 5, 0, 2)): "float8_e5m2",
    (1, (7, 3, 4, 0, 3)): "float8_e4m3fn",
}
_NO_NUMBERS = {
    h5t.STRING: "strings",
    h5t.REFERENCE: "references",
    h5t.VLEN: "variable-length data",
    h5t.TIME: "time stamps",
}
# HDF5 2.0 has a class for complex numbers; older versions store them as a compound.
_COMPLEX_CLASS = getattr(h5t, "COMPLEX", None)


class Field(Struct, frozen=True):
    """Numbers of one kind inside every record of a dataset.

    Attributes:
        suffix: what to add to the dataset's name: ``.x`` for a compound's field, else empty.
        number: the format of one element.
        order: ``<`` or ``>``.
        shape: further axes inside the record (array types).
        offset: bytes from the start of the record.
    """

    suffix: str
    number: NumberFormat
    order: str
    shape: tuple[int, ...] = ()
    offset: int = 0

    @property
    def words(self) -> int:
        """Words in one record."""
        return prod(self.shape) * self.number.parts

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype of a word as it lies in the file, byte order included."""
        return self.number.word_dtype.newbyteorder(self.order)  # type: ignore[arg-type]


class NotNumbersError(Exception):
    """A datatype that holds nothing whose bits could be altered; the message says why."""


def fields(kind: Any, named: str = "") -> list[Field]:
    """The number fields of a datatype, with those of compounds spelt out.

    Args:
        kind: a low-level h5py type.
        named: the dtype that the dataset's ``dtype`` attribute names, as Keras does for bfloat16.

    Raises:
        NotNumbersError: there are none.
    """
    cls = kind.get_class()
    if cls in _NO_NUMBERS:
        raise NotNumbersError(_NO_NUMBERS[cls])
    if cls == h5t.COMPOUND:
        if _has_variable_parts(kind):
            # The library tells where a field lies in memory, and such parts are of another size on disk.
            raise NotNumbersError("a compound with variable-length parts or region references")
        return _compound(kind)
    if cls == h5t.ARRAY:
        inner = fields(kind.get_super())
        size, dims = kind.get_super().get_size(), kind.get_array_dims()
        if len(inner) != 1 or inner[0].offset or inner[0].words * inner[0].number.word_size != size:
            raise NotNumbersError("arrays of structures")
        return [Field("", inner[0].number, inner[0].order, (*dims, *inner[0].shape))]
    if cls == h5t.OPAQUE:
        return [Field("", _named(named, kind.get_size(), "opaque bytes without a dtype attribute"), "<")]
    atom = kind.get_super() if cls in (h5t.ENUM, _COMPLEX_CLASS) else kind
    order = ">" if atom.get_order() == h5t.ORDER_BE else "<"
    return [Field("", _plain(kind, cls, named), order)]


def _plain(kind: Any, cls: int, named: str) -> NumberFormat:
    size = kind.get_size()
    if cls == h5t.FLOAT:
        name = _FLOATS.get((size, tuple(kind.get_fields())))
        if name is None or kind.get_order() not in (h5t.ORDER_LE, h5t.ORDER_BE):
            raise NotNumbersError(f"a {size * 8}-bit float of no IEEE layout")
        return lookup(name)
    if cls == h5t.ENUM:
        return lookup("bool") if _is_bool(kind) else _plain(kind.get_super(), h5t.INTEGER, "")
    if cls == h5t.BITFIELD:
        return lookup(f"uint{size * 8}") if size in (1, 2, 4, 8) else _odd(size)
    if cls == h5t.INTEGER:
        if size not in (1, 2, 4, 8) or kind.get_precision() != size * 8:
            return _odd(size)
        signed = kind.get_sign() == h5t.SGN_2
        if named and not signed:
            return _named(named, size, "")
        return lookup(f"{'int' if signed else 'uint'}{size * 8}")
    if cls == _COMPLEX_CLASS:
        part = _plain(kind.get_super(), h5t.FLOAT, "")
        return _complex_of(part)
    raise NotNumbersError("data of an unknown class")


def _odd(size: int) -> NumberFormat:
    raise NotNumbersError(f"integers of unusual width ({size} bytes, padded)")


def _complex_of(part: NumberFormat) -> NumberFormat:
    for name, half in COMPLEX_PARTS.items():
        if half == part.name:
            return lookup(name)
    raise NotNumbersError(f"complex numbers of {part.name}")


def _named(name: str, size: int, otherwise: str) -> NumberFormat:
    """The format an attribute names, if its words have the stored size."""
    if name in ML_FLOATS or name in ML_INTEGERS or name in COMPLEX_PARTS:
        number = lookup(name)
        if number.parts * number.word_size == size:
            return number
    if otherwise:
        raise NotNumbersError(otherwise)
    return lookup(f"uint{size * 8}")


def _is_bool(kind: Any) -> bool:
    return (
        kind.get_size() == 1
        and kind.get_nmembers() == 2
        and {kind.get_member_name(i).upper() for i in range(2)} == {b"FALSE", b"TRUE"}
    )


def _has_variable_parts(kind: Any) -> bool:
    """Whether a type holds anything, at any depth, that is kept elsewhere in the file."""
    cls = kind.get_class()
    if cls == h5t.COMPOUND:
        return any(_has_variable_parts(kind.get_member_type(i)) for i in range(kind.get_nmembers()))
    if cls == h5t.ARRAY:
        return _has_variable_parts(kind.get_super())
    if cls == h5t.STRING:
        return bool(kind.is_variable_str())
    return cls == h5t.VLEN or (cls == h5t.REFERENCE and not kind.equal(h5t.STD_REF_OBJ))


def _compound(kind: Any) -> list[Field]:
    count = kind.get_nmembers()
    members = [
        (kind.get_member_name(i), kind.get_member_type(i), kind.get_member_offset(i)) for i in range(count)
    ]
    if [m[0] for m in members] in ([b"r", b"i"], [b"real", b"imag"]):
        (_, real, at), (_, imag, then) = members
        if real.get_class() == h5t.FLOAT and real.equal(imag) and (at, then) == (0, real.get_size()):
            found = fields(real)[0]
            return [Field("", _complex_of(found.number), found.order)]
    found_fields: list[Field] = []
    reasons: list[str] = []
    for name, member, offset in members:
        try:
            for inner in fields(member):
                suffix = f".{name.decode('utf-8', 'backslashreplace')}{inner.suffix}"
                found_fields.append(
                    Field(suffix, inner.number, inner.order, inner.shape, offset + inner.offset)
                )
        except (NotNumbersError, UsageError) as why:
            reasons.append(str(why))
    if not found_fields:
        raise NotNumbersError(f"a compound of {', '.join(dict.fromkeys(reasons)) or 'nothing'}")
    return found_fields
