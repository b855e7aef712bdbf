"""A generated log written as a file in Criteo's layout, for `criteo` and for other readers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import WorkloadError
from ckptflip.recsys.data.clicks import Generated

Bytes = NDArray[np.uint8]

_DIGITS = 9
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def write(path: str | Path, slices: Iterable[Generated]) -> int:
    """Write slices of a log, one after the other, as tab-separated lines.

    Ids are written as their row numbers in eight hexadecimal digits, row 0 of every table as an empty cell: a
    missing value. Read with `ids.Exact(spec.tables)`, the file gives the same log.

    Returns:
        How many rows were written.

    Raises:
        WorkloadError: the file cannot be written.
    """
    rows = 0
    try:
        with Path(path).open("wb") as file:
            for one in slices:
                file.write(text(one))
                rows += len(one.log)
    except OSError as error:
        raise WorkloadError(f"{path} cannot be written: {error.strerror}") from None
    return rows


def text(one: Generated) -> bytes:
    """A slice's lines: a table of characters in which 0 stands for none, with those taken out."""
    n = len(one.log)
    label = (one.log.labels.astype(np.uint8) + ord("0"))[:, None]
    tab = np.full((n, 1), ord("\t"), np.uint8)
    parts = [label]
    for column in range(one.counts.shape[1]):
        parts += [tab, _decimal(one.counts[:, column], one.missing[:, column])]
    for table in range(one.log.ids.shape[1]):
        parts += [tab, _hexadecimal(one.log.ids[:, table])]
    parts.append(np.full((n, 1), ord("\n"), np.uint8))
    flat = np.concatenate(parts, axis=1).ravel()
    written: bytes = flat[flat != 0].tobytes()
    return written


def _decimal(counts: NDArray[np.int64], missing: NDArray[np.bool_]) -> Bytes:
    """uint8[n, 10]: a sign and up to nine digits."""
    rest = np.abs(counts)
    found = np.zeros((counts.size, 1 + _DIGITS), np.uint8)
    for place in range(_DIGITS, 0, -1):
        shown = (rest > 0) | (place == _DIGITS)
        found[:, place] = np.where(shown, rest % 10 + ord("0"), 0)
        rest //= 10
    found[:, 0] = np.where(counts < 0, ord("-"), 0)
    found[missing] = 0
    return found


def _hexadecimal(ids: NDArray[np.int64]) -> Bytes:
    """uint8[n, 8]."""
    shifts = np.arange(28, -1, -4)
    found: Bytes = _HEX[ids[:, None] >> shifts & 15]
    found[ids == 0] = 0
    return found
