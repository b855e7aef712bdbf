"""Row-wise quantised tables: how a user names their layout, and where the fields of a row lie.

A table of dimension D is stored as uint8[rows, bytes of a row]. Every row has its codes, one per column, and
a scale and a bias of its own: a value is scale · code + bias. Sources: ATen's
``quantized::embedding_bag_{byte,4bit,2bit}_prepack``, and FBGEMM's table-batched embeddings, which put scale
and bias first and may round a row up to a multiple of bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import lookup_name
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults.catalogue import Tensor

FIELDS = ("code", "scale", "bias")
LAYOUTS = ("int8", "int4", "int2", "int8-tbe", "int4-tbe", "int2-tbe")
# How the catalogue's `layout` of a field begins; the layout's name follows.
_MARK = "row-wise "
_SPEC = re.compile(r"int([842])(-tbe)?(?::(\d{1,9}))?")
# What table-batched rows are rounded up to, on one device or another.
_ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Rowwise(Struct, frozen=True):
    """A layout of row-wise quantised tables.

    Attributes:
        bits: of a code: 8, 4 or 2.
        batched: whether it is the table-batched one: scale and bias first, both fp16.
        dim: the tables' dimension, where the width of a row leaves it open; else None.
    """

    bits: int
    batched: bool = False
    dim: int | None = None

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"int{self.bits}{'-tbe' * self.batched}{'' if self.dim is None else f':{self.dim}'}"

    @property
    def number(self) -> NumberFormat:
        """The format of scale and bias."""
        return lookup_name("float32" if self.bits == 8 and not self.batched else "float16")

    @property
    def overhead(self) -> int:
        """Bytes of scale and bias together."""
        return 2 * self.number.word_size

    def packed(self, dim: int) -> int:
        """Bytes of a row of `dim` columns, not rounded up.

        Example:
            >>> parse("int4").packed(33), parse("int8").packed(64), parse("int8-tbe").packed(64)
            (21, 72, 68)
        """
        return -(-dim * self.bits // 8) + self.overhead


class Row(Struct, frozen=True):
    """Where the fields of every row of one table lie.

    Attributes:
        layout: of the table.
        dim: its dimension.
        width: bytes of a row.
    """

    layout: Rowwise
    dim: int
    width: int

    def offset(self, field: str) -> int:
        """The first byte of a field in a row."""
        size = self.layout.number.word_size
        if self.layout.batched:
            return {"scale": 0, "bias": size, "code": 2 * size}[field]
        codes = self.layout.packed(self.dim) - 2 * size
        return {"code": 0, "scale": codes, "bias": codes + size}[field]

    def number(self, field: str) -> NumberFormat:
        """The format of a field's words."""
        return lookup_name(f"uint{self.layout.bits}") if field == "code" else self.layout.number


def parse(spec: str) -> Rowwise:
    """Read the name of a layout.

    Args:
        spec: ``int8``, ``int4`` or ``int2``: ATen's, codes first; with ``-tbe``: table-batched, scale and
            bias first, both fp16. ``:D`` gives the dimension where rows are wider than their codes need:
            padded, or of an odd number of 4-bit codes.

    Raises:
        UsageError: anything else.

    Example:
        >>> parse("int4-tbe:20")
        Rowwise(bits=4, batched=True, dim=20)
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or match[3] == "0":
        raise UsageError(
            f"rowwise {spec!r} is not a layout of quantised tables: use {', '.join(LAYOUTS)}, "
            "with :D for the dimension where rows are padded"
        )
    return Rowwise(int(match[1]), match[2] is not None, None if match[3] is None else int(match[3]))


def check_fields(fields: Iterable[str]) -> None:
    """Raise UsageError unless these are fields of a row."""
    for field in fields:
        if field not in FIELDS:
            raise UsageError(f"fields {field!r} is not one of {', '.join(FIELDS)}")


def fitted(layout: Rowwise, tensor: Tensor) -> Row:
    """The rows of a stored tensor as a table in this layout.

    Raises:
        SelectionError: it cannot be one: its dtype, its axes, or the width of its rows.

    Example:
        >>> table = Tensor("emb_l.0.weight", (1000, 72), lookup_name("uint8"))
        >>> fitted(parse("int8"), table).dim
        64
    """
    where = f"{tensor.name} is no row-wise {layout.name} table"
    if tensor.number.name != "uint8" or len(tensor.shape) != 2:
        raise SelectionError(
            f"{where}: it is {tensor.dtype} {tensor.shape}, and a table is uint8 (rows, bytes of a row). "
            "Select the tables alone, by name"
        )
    width = tensor.shape[1]
    if width <= layout.overhead:
        raise SelectionError(
            f"{where}: its rows have {width} bytes, of which scale and bias take {layout.overhead}; "
            "is it another layout?"
        )
    dim = layout.dim or (width - layout.overhead) * 8 // layout.bits
    needed = layout.packed(dim)
    rounded = {-(-needed // a) * a for a in (_ALIGNMENTS if layout.batched else (1,))}
    if width not in rounded:
        padded = ", or that rounded up to a multiple of 2, 4, … 128" if layout.batched else ""
        raise SelectionError(
            f"{where}: its rows have {width} bytes, and {dim} columns take {needed}{padded}; give the right "
            "dimension, or another layout"
        )
    return Row(layout, dim, width)


def described(row: Row, layout: str) -> str:
    """How the catalogue's `layout` of a field reads.

    Args:
        row: of the table.
        layout: of the stored tensor.
    """
    return f"{_MARK}{row.layout.name}, {layout}"


def layout_of(layout: str) -> Rowwise | None:
    """The layout of the table that a tensor is a field of, by the catalogue's `layout`; None: it is none.

    Example:
        >>> layout_of("row-wise int4:33, contiguous").name, layout_of("contiguous")
        ('int4:33', None)
    """
    name, comma, _ = layout.removeprefix(_MARK).partition(", ")
    if not layout.startswith(_MARK) or not comma or _SPEC.fullmatch(name) is None:
        return None
    return parse(name)


def of_fields(
    chosen: Sequence[int], tensors: Sequence[Tensor], fields: Sequence[str], rowwise: str | None
) -> list[int]:
    """Those of the chosen tensors that are the wanted fields of row-wise tables.

    Args:
        chosen: positions in the catalogue.
        tensors: the catalogue, tables as their fields.
        fields: of `FIELDS`; () for all.
        rowwise: the layout that was named, or None.

    Raises:
        SelectionError: a tensor that should be a table is none; no field is selected.
    """
    tables = [i for i in chosen if layout_of(tensors[i].layout) is not None]
    if rowwise is not None and len(tables) < len(chosen):
        name = next(tensors[i].name for i in chosen if i not in set(tables))
        raise SelectionError(
            f"rowwise {rowwise!r} was asked for, and {name} is not seen as such a table: here the target has "
            "to be wrapped first (docs/tables.md)"
        )
    if not tables:
        raise SelectionError(
            f"fields {', '.join(fields)} are those of row-wise quantised tables, and none is selected; say "
            f"how the tables are stored with rowwise: {', '.join(LAYOUTS)}"
        )
    found = [i for i in tables if not fields or tensors[i].name.rpartition(".")[2] in fields]
    if not found:
        raise SelectionError(f"no field {', '.join(fields)} is among the selected tensors")
    return found
