"""PyTorch's dtypes and the storage classes of its files: the numbers they hold, and how they are packed."""

from __future__ import annotations

from math import prod

from msgspec import Struct

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.torch_zip.values import Global


class Dtype(Struct, frozen=True):
    """How elements lie in a storage.

    Attributes:
        number: the format of one word's element.
        itemsize: bytes from one element to the next.
        packed: bits of a word where several share a byte, else 0.
        counted: whether sizes and strides count the words that share a byte (quint4x2), or whole bytes.
    """

    number: NumberFormat
    itemsize: int
    packed: int = 0
    counted: bool = False

    @property
    def per_item(self) -> int:
        """Elements in what PyTorch counts as one."""
        return 8 // self.packed if self.packed and not self.counted else 1

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Bytes of an array in C order."""
        return -(-prod(shape) * self.packed // 8) if self.counted else prod(shape) * self.itemsize


_SAME_NAME = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
)
_OTHER_NAMES = {
    "double": "float64", "float": "float32", "half": "float16", "cdouble": "complex128",
    "cfloat": "complex64", "chalf": "complex32", "short": "int16", "int": "int32", "long": "int64",
    "qint8": "int8", "quint8": "uint8", "qint32": "int32", "bits8": "uint8", "bits16": "uint16",
    "bits1x8": "uint8", "bits2x4": "uint8", "bits4x2": "uint8",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}  # fmt: skip


def dtype_named(name: str) -> Dtype | None:
    """The dtype that PyTorch calls ``torch.<name>``; None for one that is not known.

    Example:
        >>> dtype_named("half").number.name, dtype_named("float4_e2m1fn_x2").per_item
        ('float16', 2)
    """
    if name == "float4_e2m1fn_x2":
        return Dtype(lookup_name("float4_e2m1fn"), 1, 4)
    if name in ("quint4x2", "quint2x4"):
        bits = int(name[5])
        return Dtype(lookup_name(f"uint{bits}"), 1, bits, counted=True)
    plain = _OTHER_NAMES.get(name, name if name in _SAME_NAME else None)
    if plain is None:
        return None
    number = lookup_name(plain)
    return Dtype(number, number.parts * number.word_size)


def dtype_of(value: object) -> Dtype | None:
    """The dtype of a `Global` such as ``torch.float32``."""
    return dtype_named(value.name) if isinstance(value, Global) and value.module == "torch" else None


def storage_dtype(value: object) -> Dtype | None:
    """The dtype of a storage class, such as ``torch.FloatStorage``."""
    if not isinstance(value, Global) or value.module.partition(".")[0] != "torch":
        return None
    name = _STORAGES.get(value.name)
    return None if name is None else dtype_named(name)
