"""Protects tables, takes the protection off again, and says which rows do not fit their check bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from ckptflip.bits.formats import lookup_name
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.rowwise import fitted, parse
from ckptflip.protect.embeddings.rows import LAYOUTS, MIX_NUMBERS, MIX_ROW, Row, position_weights

Bytes = NDArray[np.uint8]
# Rows are worked on in blocks of about so many values.
_BLOCK = 1 << 22
_FLOATS = {"fp32": "float32", "bf16": "bfloat16"}


def protect_table(stored: Any, layout: str) -> Any:
    """A table with check bytes in every row.

    Args:
        stored: row-wise codes as ATen's operators pack them, uint8[rows, bytes of a row]; or float32 or
            bfloat16[rows, D]. A numpy array or a tensor.
        layout: ``int8``, ``int4`` or ``int2`` (``int4:33`` where an odd dimension leaves it open), ``fp32``
            or ``bf16``.

    Returns:
        The same kind of array with wider rows: 4 bytes more up to 257 columns of 8-bit codes and 4369 of
        4-bit ones, else 8; floats have one (fp32) or two (bf16) columns more, which hold no numbers.

    Raises:
        SelectionError: the table cannot be of this layout.
        UsageError: a layout that is not protected, or more columns than it can stand for.

    Example:
        >>> from ckptflip.recsys.tables import quantise
        >>> stored = quantise(np.arange(12.0).reshape(3, 4), "int8")
        >>> protected = protect_table(stored, "int8")
        >>> stored.shape, protected.shape, bad_rows(protected, "int8").tolist()
        ((3, 12), (3, 16), [])
    """
    if (torch_array := _as_numpy(stored, layout)) is not None:
        return _as_tensor(protect_table(torch_array, layout), stored)
    array = np.ascontiguousarray(stored)
    row = row_of_stored(array, layout)
    rows = array.view(np.uint8).reshape(array.shape[0], row.stored_width)
    found = np.empty((rows.shape[0], row.width), np.uint8)
    for some in _blocks(rows.shape[0], row):
        found[some] = protected_rows(rows[some], row, np.arange(some.start, some.stop, dtype=np.uint64))
    return found if row.coded else found.view(array.dtype)


def unprotect_table(protected: Any, layout: str) -> Any:
    """The table as it was before it was protected; what the check bytes say is not looked at.

    Args:
        protected: as `protect_table` gave it.
        layout: as `protect_table` was told.

    Raises:
        SelectionError, UsageError: as for `protect_table`.

    Example:
        >>> table = np.arange(8, dtype=np.float32).reshape(2, 4)
        >>> np.array_equal(unprotect_table(protect_table(table, "fp32"), "fp32"), table)
        True
    """
    if (torch_array := _as_numpy(protected, layout)) is not None:
        return _as_tensor(unprotect_table(torch_array, layout), protected)
    array = np.ascontiguousarray(protected)
    row = row_of_protected(array, layout)
    found = bare(array.view(np.uint8).reshape(array.shape[0], row.width), row)
    return found if row.coded else np.ascontiguousarray(found).view(array.dtype)


def bad_rows(protected: Any, layout: str, rows: Any = None) -> NDArray[np.int64]:
    """The rows that do not fit their check bytes: all that were altered, up to the limits of the checks.

    Args:
        protected: as `protect_table` gave it.
        layout: as `protect_table` was told.
        rows: numbers of the rows to look at; None for all.

    Raises:
        SelectionError, UsageError: as for `protect_table`.

    Example:
        >>> protected = protect_table(np.ones((5, 4), np.float32), "fp32")
        >>> protected.view(np.uint32)[3, 1] ^= 1
        >>> bad_rows(protected, "fp32").tolist()
        [3]
    """
    as_numpy = _as_numpy(protected, layout)
    array = np.ascontiguousarray(protected) if as_numpy is None else as_numpy
    row = row_of_protected(array, layout)
    data = array.view(np.uint8).reshape(array.shape[0], row.width)
    wanted = np.arange(data.shape[0]) if rows is None else np.unique(np.asarray(rows, np.int64))
    found = [
        wanted[some][differing(data[wanted[some]], row, wanted[some]) != 0]
        for some in _blocks(wanted.size, row)
    ]
    return np.concatenate([np.empty(0, np.int64), *found])


def check_layout(layout: str) -> None:
    """Raise UsageError unless tables of this layout can be protected.

    Example:
        >>> check_layout("int4:33")
    """
    name = layout.strip().partition(":")[0] if isinstance(layout, str) else ""
    if name.endswith("-tbe"):
        raise UsageError(f"layout {layout!r} cannot be protected: bring the rows into ATen's layout first")
    if name not in LAYOUTS or (name in _FLOATS and layout not in _FLOATS):
        raise UsageError(
            f"layout {layout!r} cannot be protected: use {', '.join(LAYOUTS)}, those of codes with :D for "
            "the dimension where rows are wider than their codes need"
        )
    if name not in _FLOATS:
        parse(layout)


def row_of_stored(array: NDArray[Any], layout: str) -> Row:
    """The protected rows that an unprotected table will have. Raises as `protect_table`."""
    if layout in _FLOATS:
        _check_floats(array, layout)
        return Row(layout, array.shape[1])
    return Row(*_dim_of(array, layout))


def row_of_protected(array: NDArray[Any], layout: str) -> Row:
    """The rows of a protected table. Raises as `protect_table`."""
    if layout in _FLOATS:
        _check_floats(array, layout)
        return Row(layout, max(array.shape[1] - 4 // array.dtype.itemsize, 0))
    for size in (4, 8) if array.ndim == 2 else ():
        with suppress(SelectionError):
            row = Row(*_dim_of(array[:, size:], layout))
            if row.width == array.shape[1]:
                return row
    raise SelectionError(f"no protected {layout} table has rows like these: {array.dtype} {array.shape}")


def protected_rows(rows: Bytes, row: Row, numbers: NDArray[np.uint64]) -> Bytes:
    """Stored rows with their check bytes, uint8[n, row.width].

    Args:
        rows: uint8[n, row.stored_width].
        row: their layout.
        numbers: the number of each row.
    """
    found = np.zeros((rows.shape[0], row.width), np.uint8)
    found[:, : row.check], found[:, row.check + row.check_size :] = rows[:, : row.check], rows[:, row.check :]
    mixed = _mixed(rows[:, row.check :], numbers)
    if not row.coded:
        check = (_word_sum(rows[:, : row.check]) + (mixed >> np.uint64(32))).astype("<u4")
        found[:, row.check :] = check[:, None].view(np.uint8)
        return found
    total, weighted = _code_sums(rows[:, : row.check], row)
    word = np.zeros(rows.shape[0], np.uint64)
    for place in reversed(range(len(row.weights))):
        digit = np.minimum(total // row.weights[place], (1 << row.bits) - 1)
        total = total - digit * row.weights[place]
        word |= digit.astype(np.uint64) << np.uint64(place * row.bits)
    found[:, row.check : row.check + 4] = word.astype("<u4")[:, None].view(np.uint8)
    tag = ((mixed >> np.uint64(48)).astype(np.int64) + weighted & 0xFFFF).astype("<u2")
    found[:, row.tag : row.tag + 2] = tag[:, None].view(np.uint8)
    return found


def bare(rows: Bytes, row: Row) -> Bytes:
    """Protected rows without their check bytes."""
    return np.concatenate([rows[:, : row.check], rows[:, row.check + row.check_size :]], axis=1)


def differing(rows: Bytes, row: Row, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """How protected rows fit their check bytes, uint8[n]: 0; 1, the sum differs; 2, the tag differs; or 3.

    Args:
        rows: uint8[n, row.width].
        row: their layout.
        numbers: the number of each row.
    """
    fresh = protected_rows(bare(rows, row), row, numbers.astype(np.uint64))
    # A sum can be written with other digits: what counts is what they say.
    said = [_said(each[:, row.check : row.check + row.check_size], row) for each in (fresh, rows)]
    found: NDArray[np.uint8] = (said[0] != said[1]).astype(np.uint8) @ np.array([1, 2], np.uint8)
    return found


def _said(checks: Bytes, row: Row) -> NDArray[np.int64]:
    """The sum and the tag that check bytes hold, int64[n, 2]; of floats, the sum and nothing."""
    word = np.ascontiguousarray(checks[:, :4]).view("<u4")[:, 0].astype(np.int64)
    if not row.coded:
        return np.stack([word, np.zeros_like(word)], axis=1)
    most = (1 << row.bits) - 1
    total = sum((word >> (k * row.bits) & most) * weight for k, weight in enumerate(row.weights))
    tag = np.ascontiguousarray(checks[:, -2:]).view("<u2")[:, 0].astype(np.int64)
    return np.stack([np.asarray(total), tag], axis=1)


def _code_sums(codes: Bytes, row: Row) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sum of the codes of each row, and the sum weighted by position."""
    if row.bits < 8:
        shifts = np.arange(0, 8, row.bits, dtype=np.uint8)
        each = codes[:, :, None] >> shifts & np.uint8((1 << row.bits) - 1)
        codes = each.reshape(codes.shape[0], codes.shape[1] * shifts.size)
    # Exact in float64, and faster than in integers.
    values = codes.astype(np.float64)
    weighted = (values @ position_weights(codes.shape[1]).astype(np.float64)).astype(np.int64)
    return codes.sum(1, dtype=np.int64), weighted


def _word_sum(values: Bytes) -> NDArray[np.uint64]:
    """The sum of each row's bytes as little-endian words of 32 bits, a rest filled up with zeros."""
    padded = np.zeros((values.shape[0], -(-values.shape[1] // 4) * 4), np.uint8)
    padded[:, : values.shape[1]] = values
    total: NDArray[np.uint64] = padded.view("<u4").sum(1, dtype=np.uint64)
    return total


def _mixed(numbers: Bytes, rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scale, bias and row number, multiplied into 64 bits."""
    padded = np.zeros((numbers.shape[0], 8), np.uint8)
    padded[:, : numbers.shape[1]] = numbers
    mixed: NDArray[np.uint64] = padded.view("<u8")[:, 0] * np.uint64(MIX_NUMBERS) + rows * np.uint64(MIX_ROW)
    return mixed


def _blocks(rows: int, row: Row) -> Iterator[slice]:
    size = max(1, _BLOCK // row.dim)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _dim_of(array: NDArray[Any], layout: str) -> tuple[str, int]:
    check_layout(layout)
    kind = parse(layout)
    found = fitted(kind, Tensor("the table", array.shape, lookup_name(array.dtype.name)))
    return f"int{kind.bits}", found.dim


def _check_floats(array: NDArray[Any], layout: str) -> None:
    if array.ndim != 2 or array.dtype.name != _FLOATS[layout]:
        raise SelectionError(
            f"a table in {layout} is {_FLOATS[layout]} with two axes, rows and columns, not {array.dtype} "
            f"{array.shape}"
        )


def _as_numpy(tensor: Any, layout: str) -> NDArray[Any] | None:
    """A PyTorch tensor on the CPU as an array of the same memory; None for what is no tensor."""
    if not type(tensor).__module__.startswith("torch"):
        return None
    plain = tensor.detach().cpu().contiguous()
    if layout == "bf16" and str(plain.dtype) == "torch.bfloat16":
        import torch

        array: NDArray[Any] = plain.view(torch.int16).numpy().view(bfloat16)
        return array
    converted: NDArray[Any] = plain.numpy()
    return converted


def _as_tensor(array: NDArray[Any], like: Any) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(like.device)
    return torch.from_numpy(array).to(like.device)
