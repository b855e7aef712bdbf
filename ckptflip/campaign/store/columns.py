"""Columns of numbers between numpy and SQLite, which knows neither unsigned words nor NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ckptflip.campaign.store.rows import Floats, Ints, Texts, Words


def signed(words: Words) -> list[int]:
    """Unsigned words as what SQLite keeps: the signed numbers of the same 64 bits.

    Args:
        words: uint64[n].

    Example:
        >>> signed(np.array([1, 2**64 - 1], dtype=np.uint64))
        [1, -1]
    """
    listed: list[int] = words.view(np.int64).tolist()
    return listed


def unsigned(stored: Sequence[int]) -> Words:
    """The words again, uint64[n].

    Example:
        >>> unsigned([1, -1]).tolist()
        [1, 18446744073709551615]
    """
    return np.array(stored, dtype=np.int64).view(np.uint64)


def integers(stored: Sequence[int | None], absent: int = 0) -> Ints:
    """Whole numbers, int64[n]; NULL becomes `absent`."""
    if None in stored:
        stored = [absent if each is None else each for each in stored]
    return np.array(stored, dtype=np.int64)


def reals(stored: Sequence[float | None]) -> Floats:
    """Numbers, float64[n]; NULL becomes NaN, which SQLite turned into NULL."""
    return np.array(stored, dtype=np.float64)


def texts(stored: Sequence[str | None]) -> Texts:
    """Text, str[n]; NULL becomes ''."""
    found = np.empty(len(stored), dtype=np.object_)
    found[:] = [each or "" for each in stored]
    return found


def columns(rows: Iterable[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    """Rows turned into `count` columns, also when there is no row.

    Example:
        >>> columns([(1, "a"), (2, "b")], 2)
        [(1, 2), ('a', 'b')]
        >>> columns([], 2)
        [(), ()]
    """
    return list(zip(*rows, strict=True)) or [()] * count
