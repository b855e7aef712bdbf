"""Arrays as unsigned words: view, gather, XOR, count bits. No number is ever made of them here."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ckptflip.bits.formats import NumberFormat, lookup, numpy_dtype
from ckptflip.errors import UsageError

Words = NDArray[Any]


def as_words(array: NDArray[Any]) -> Words:
    """View an array's elements as unsigned words, without a copy.

    Args:
        array: any shape, any dtype of numpy or ml_dtypes, either byte order, C-contiguous.

    Returns:
        The same memory, shape ``(n * parts,)``, unsigned, in the array's byte order. Complex numbers
        give two words each, the real part first.

    Raises:
        UsageError: the dtype holds no words, or the array is not contiguous.

    Example:
        >>> a = np.array([1.0, -2.0], np.float32)
        >>> [hex(w) for w in as_words(a)]
        ['0x3f800000', '0xc0000000']
        >>> as_words(a)[0] ^= 1 << 31
        >>> a
        array([-1., -2.], dtype=float32)
    """
    number = lookup(array.dtype)
    if not array.flags.c_contiguous:
        raise UsageError("an array must be C-contiguous to be altered in place: pass a contiguous copy")
    flat = array.reshape(-1)
    return flat.view(number.word_dtype.newbyteorder(array.dtype.byteorder))


def from_words(words: Words, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """View words as an array of numbers again: the inverse of `as_words`.

    Example:
        >>> from_words(np.array([0x3f80], np.uint16), "bfloat16", (1,)).astype(float)
        array([1.])
    """
    number = lookup(dtype)
    native = np.ascontiguousarray(words, dtype=number.word_dtype)
    if number.parts == 1:
        return native.view(numpy_dtype(number)).reshape(shape)
    dtype = number.name
    if dtype in ("complex32", "bcomplex32"):
        import ml_dtypes

        dtype = getattr(ml_dtypes, dtype)
    numbers: NDArray[Any] = native.view(dtype).reshape(shape)
    return numbers


def gather(words: Words, at: NDArray[np.int64]) -> Words:
    """The words at flat positions, in native byte order.

    Example:
        >>> gather(np.array([1, 2, 3], ">u2"), np.array([2, 0]))
        array([3, 1], dtype=uint16)
    """
    taken = words[at]
    native: Words = taken.astype(taken.dtype.newbyteorder("="), copy=False)
    return native


def xor_at(words: Words, at: NDArray[np.int64], masks: NDArray[Any]) -> None:
    """XOR masks into words at flat positions, in place. A position given twice gets both masks.

    Args:
        words: 1-d unsigned words in either byte order.
        at: positions, int64.
        masks: one mask for each position; bits beyond the word's width are an error.

    Raises:
        UsageError: a mask is wider than the words.

    Example:
        >>> w = np.zeros(3, np.uint8)
        >>> xor_at(w, np.array([1, 1]), np.array([1, 2]))
        >>> w
        array([0, 3, 0], dtype=uint8)
    """
    top = np.iinfo(words.dtype).max
    wide = [m for m in (int(masks.min()), int(masks.max())) if not 0 <= m <= top] if masks.size else []
    if wide:
        raise UsageError(f"a mask of {wide[0]:#x} does not fit words of {words.dtype.itemsize * 8} bits")
    np.bitwise_xor.at(words, at, masks.astype(words.dtype))


def popcount(words: NDArray[Any]) -> int:
    """The number of one bits in all words together.

    Example:
        >>> popcount(np.array([1, 3, 255], np.uint64))
        11
    """
    if words.size == 1:
        return int(words.item()).bit_count()
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def valid_mask(number: NumberFormat) -> int:
    """The bits of a stored word that belong to the number; a float4 kept in a byte has 4.

    Example:
        >>> bin(valid_mask(lookup("float4_e2m1fn")))
        '0b1111'
    """
    return (1 << number.part_width) - 1
