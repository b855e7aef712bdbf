"""Row-wise quantisation in numpy, bit for bit as ATen's operators do it on x86.

Sources: ATen's ``quantized::embedding_bag_{byte,4bit,2bit}_{prepack,unpack}``, which are FBGEMM's
``FloatToFused8BitRowwiseQuantizedSBFloat`` and ``FloatToFusedNBitRowwiseQuantizedSBHalf``; FBGEMM's
``quantize_embs`` for the table-batched layouts. The tests hold every layout that ATen has to its operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckptflip.bits.formats import lookup_name
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.rowwise import Row, Rowwise, fitted, parse

_ONE = np.float32(1)
# What ATen adds to a row's range, so that a constant row has an inverse scale.
_EPSILON = np.float32(1e-8)
_MOST = np.finfo(np.float32).max
# Values that FBGEMM looks at in one step (AVX2), and columns of int8 codes that it writes in one.
_LANES, _TOGETHER = 8, 32


def quantise(table: ArrayLike, layout: str) -> NDArray[np.uint8]:
    """A table as its rows are stored.

    Args:
        table: float32[rows, D].
        layout: such as ``int8`` or ``int4-tbe``, see `ckptflip.faults.rowwise.parse`. Rows are not padded.

    Returns:
        uint8[rows, bytes of a row].

    Raises:
        UsageError: no numbers, not two axes, no columns, or another dimension than the layout names.

    Example:
        >>> quantise(np.array([[0.0, 1.0, 3.0]]), "int4").tolist()
        [[80, 15, 102, 50, 0, 0]]
    """
    kind = parse(layout)
    try:
        values = np.asarray(table, np.float32)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a table for {layout!r} holds floats in rows of one length: {error}") from None
    if values.ndim != 2 or not values.shape[1] or kind.dim not in (None, values.shape[1]):
        raise UsageError(
            f"a table for {layout!r} has two axes, rows and columns, not the shape {values.shape}"
        )
    dim = values.shape[1]
    row = Row(kind, dim, kind.packed(dim))
    stored = np.zeros((values.shape[0], row.width), np.uint8)
    if not values.shape[0]:
        return stored
    with np.errstate(all="ignore"):  # a table may hold infinities and NaN: they go where ATen sends them
        codes, scale, bias = _eight_bits(values) if kind.bits == 8 else _few_bits(values, kind.bits)
    numbers = {"scale": scale, "bias": bias}
    with np.errstate(over="ignore"):
        for field, number in numbers.items():
            at, size = row.offset(field), kind.number.word_size
            stored[:, at : at + size] = number.astype(f"<f{size}").view(np.uint8)
    at = row.offset("code")
    packed = _packed(codes, kind)
    stored[:, at : at + packed.shape[1]] = packed
    return stored


def dequantise(stored: ArrayLike, layout: str) -> NDArray[np.float32]:
    """The values that a quantised table stands for: scale · code + bias, rounded once.

    ATen multiplies and adds without rounding in between (FMA) where the processor can, as all recent ones do.
    NaN stay NaN; which of several a processor passes on is not imitated.

    Args:
        stored: uint8[rows, bytes of a row].
        layout: see `quantise`.

    Returns:
        float32[rows, D]. Without a dimension in `layout`, all codes that the rows have room for.

    Raises:
        SelectionError: rows that cannot be of this layout.

    Example:
        >>> dequantise(quantise(np.array([[0.0, 1.0, 3.0]]), "int8"), "int8").tolist()
        [[0.0, 1.0, 3.0]]
    """
    data = np.ascontiguousarray(stored)
    row = fitted(parse(layout), Tensor("the array", data.shape, lookup_name(data.dtype.name)))
    codes = unpacked(data, row)
    scale, bias = (_numbers(data, row, field) for field in ("scale", "bias"))
    return _multiply_add(codes.astype(np.float32), scale, bias)


def unpacked(stored: NDArray[np.uint8], row: Row) -> NDArray[np.uint8]:
    """The codes of stored rows, uint8[rows, D].

    Args:
        stored: uint8[rows, bytes of a row].
        row: their layout.
    """
    bits, at = row.layout.bits, row.offset("code")
    codes = stored[:, at : at + row.layout.packed(row.dim) - row.layout.overhead]
    if bits == 8:
        return codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    each: NDArray[np.uint8] = codes[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return each.reshape(stored.shape[0], codes.shape[1] * shifts.size)[:, : row.dim]


def _numbers(stored: NDArray[np.uint8], row: Row, field: str) -> NDArray[np.float32]:
    """The scales or biases of stored rows, float32[rows, 1]."""
    at, size = row.offset(field), row.layout.number.word_size
    raw = np.ascontiguousarray(stored[:, at : at + size])
    with np.errstate(invalid="ignore"):  # signalling NaN become quiet ones
        return raw.view(f"<f{size}").astype(np.float32)


def _eight_bits(values: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    low, high = _extremes(values)
    span = high - low
    codes = np.rint((values - low) * (np.float32(255) / (span + _EPSILON)))
    # Codes beyond a byte, which NaN bring about, are held within it where FBGEMM takes columns together.
    together = codes[:, : codes.shape[1] // _TOGETHER * _TOGETHER]
    if together.size and not together.max() <= 255:
        together[...] = np.clip(_narrow(together), 0, 255)
    return _whole(codes), span / np.float32(255), low


def _few_bits(values: NDArray[np.float32], bits: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    most = np.float32((1 << bits) - 1)
    least, high = _extremes(values)
    bias = least.astype(np.float16)
    low = bias.astype(np.float32)
    span = high - low
    scale = np.where(span == 0, _ONE, span / most).astype(np.float16).astype(np.float32)
    scale = np.where(scale == 0, _ONE, scale)
    inverse = _ONE / scale
    return _whole(np.clip(_narrow(np.rint((values - low) * inverse)), 0, most)), scale, bias


def _narrow(codes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codes as 32-bit integers: what is none of them becomes the least one, and that the code 0."""
    return np.where(np.abs(codes) < 2**31, codes, np.float32(0))


def _extremes(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the largest value of each row, float32[rows, 1], as FBGEMM finds them.

    It begins with the largest finite numbers, so that they are the extremes of rows of nothing but NaN or one
    infinity. In each of eight lanes a NaN takes the place of what was found before, and the next value its.
    """
    low = np.minimum(values.min(1, keepdims=True), _MOST)
    high = np.maximum(values.max(1, keepdims=True), -_MOST)
    odd = np.isnan(low[:, 0])
    if odd.any():
        low[odd, 0] = _lanes(values[odd], np.less)
        high[odd, 0] = _lanes(values[odd], np.greater)
    return low, high


def _lanes(values: NDArray[np.float32], better: Callable[..., NDArray[np.bool_]]) -> NDArray[np.float32]:
    """`_extremes` of rows with NaN, float32[rows]: in lanes as the instruction MINPS, then value by value."""
    rows, columns = values.shape
    start = _MOST if better is np.less else -_MOST
    lanes = np.full((rows, _LANES), start, np.float32)
    whole = columns // _LANES * _LANES
    for at in range(0, whole, _LANES):
        new = values[:, at : at + _LANES]
        lanes = np.where(better(lanes, new), lanes, new)
    best = np.full(rows, start, np.float32)
    for new in (*lanes.T, *values[:, whole:].T):
        best = np.where(better(new, best), new, best)
    return best


def _whole(codes: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.nan_to_num(codes, nan=0, posinf=0, neginf=0).astype(np.int64).astype(np.uint8)


def _packed(codes: NDArray[np.uint8], layout: Rowwise) -> NDArray[np.uint8]:
    """Codes in bytes, the first in the low bits; an odd end is filled with zeros."""
    each = 8 // layout.bits
    padded = np.zeros((codes.shape[0], -(-codes.shape[1] // each) * each), np.uint8)
    padded[:, : codes.shape[1]] = codes
    shifted = padded.reshape(codes.shape[0], padded.shape[1] // each, each) << np.arange(
        0, 8, layout.bits, dtype=np.uint8
    )
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(shifted, axis=2)
    return packed


def _multiply_add(
    codes: NDArray[np.float32], scale: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """scale · code + bias in float32, rounded once.

    In float64 the product is exact and the sum is not. Rounded to odd (an inexact sum gets an odd last bit)
    it can be rounded to float32 as if it were exact: Boldo and Melquiond, Emulation of FMA and correctly
    rounded sums, IEEE Transactions on Computers 57 (4), 2008.
    """
    with np.errstate(all="ignore"):
        product = scale.astype(np.float64) * codes
        total: NDArray[np.float64] = product + bias
        part = total - product
        lost = (product - (total - part)) + (bias - part)
        even = (total.view(np.int64) & 1 == 0) & (lost != 0) & np.isfinite(total)
        # The neighbour on the side of what was lost is odd.
        total = np.where(even, np.nextafter(total, np.copysign(np.inf, lost)), total)
        return total.astype(np.float32)
