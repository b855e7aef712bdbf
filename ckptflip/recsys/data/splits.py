"""Training, validation and test rows that share nothing, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.faults.stream import Stream, check_seed

Integers = NDArray[np.int64]
Shares = tuple[float, float, float]

SHARES: Shares = (0.8, 0.1, 0.1)
# Keeps these numbers apart from other streams of the same seed.
_PLACE = 0x73706C74


@dataclass(frozen=True, slots=True)
class Split:
    """int64 row numbers, ascending, of each part."""

    train: Integers
    validation: Integers
    test: Integers


def by_row(rows: int, seed: int, shares: Shares = SHARES) -> Split:
    """Deal out rows at random.

    The parts' sizes are the shares of `rows` rounded down, what is left goes to training.

    Args:
        rows: how many there are.
        seed: 0 … 2^64-1.
        shares: of training, validation and test; they add up to 1.

    Raises:
        UsageError: options that make no sense, or a part without a row.

    Example:
        >>> split = by_row(20, 7)
        >>> len(split.train), len(split.validation), len(split.test)
        (16, 2, 2)
    """
    parts = _dealt(rows, seed, shares, "rows")
    return Split(*(np.flatnonzero(parts == part) for part in range(3)))


def by_group(groups: Any, seed: int, shares: Shares = SHARES) -> Split:
    """Deal out groups at random, so that all rows of one group, such as a user, lie in one part.

    The shares are those of the groups; of rows they hold about, for groups differ in size.

    Args:
        groups: int[n]: the group of each row, such as `log.ids[:, 0]`, the user of a MovieLens log.
        seed: 0 … 2^64-1.
        shares: of training, validation and test.

    Raises:
        UsageError: options that make no sense, or a part without a row.

    Example:
        >>> users = np.arange(40) % 10
        >>> split = by_group(users, 7)
        >>> sorted({*users[split.train]} & {*users[split.test]})
        []
    """
    array = np.asarray(groups)
    if array.ndim != 1:
        raise UsageError(f"groups are one number for each row, not an array of shape {array.shape}")
    known, place = np.unique(array, return_inverse=True)
    parts = _dealt(known.size, seed, shares, "groups")[place]
    return Split(*(np.flatnonzero(parts == part) for part in range(3)))


def by_day(days: Any, *, validation: int = 1, test: int = 1) -> Split:
    """The last days for the test, those before them for validation, the earlier ones for training.

    Args:
        days: int[n]: the day of each row, such as `log.days` of a Terabyte log.
        validation: how many days.
        test: likewise.

    Raises:
        UsageError: the log has no days, or too few to leave one for training.

    Example:
        >>> split = by_day([0, 0, 1, 2, 3])
        >>> split.train.tolist(), split.validation.tolist(), split.test.tolist()
        ([0, 1, 2], [3], [4])
    """
    if days is None:
        raise UsageError("this log does not say its days: split it by row, or read the files day_0, day_1, …")
    if validation < 1 or test < 1:
        raise UsageError(f"validation ({validation}) and test ({test}) have one day or more")
    array = np.asarray(days)
    known = np.unique(array)
    if known.size < validation + test + 1:
        told = ", ".join(str(day) for day in known.tolist()) or "none"
        raise UsageError(
            f"{validation} days for validation and {test} for the test leave none for training: the log "
            f"has {known.size} (day {told})"
        )
    first_test, first_validation = known[-test], known[-test - validation]
    return Split(
        np.flatnonzero(array < first_validation),
        np.flatnonzero((array >= first_validation) & (array < first_test)),
        np.flatnonzero(array >= first_test),
    )


def _dealt(count: int, seed: int, shares: Shares, what: str) -> NDArray[np.int8]:
    """int8[count]: the part, 0 to 2, of each of `count` things."""
    check_seed(seed)
    if len(shares) != 3 or not all(0 < share < 1 for share in shares) or abs(sum(shares) - 1) > 1e-9:
        raise UsageError(f"shares are three numbers above 0 that add up to 1, not {shares!r}")
    # A share such as 0.1 of 30 is a little below 3 in floating point.
    validation, test = (int(share * count + 1e-6) for share in shares[1:])
    sizes = {"training": count - validation - test, "validation": validation, "test": test}
    for part, size in sizes.items():
        if size < 1:
            raise UsageError(
                f"{count} {what} are too few for the shares {shares}: {part} would be empty. Give more "
                f"{what}, or other shares"
            )
    # Ties among 64-bit numbers are broken by the place, so the order is the same everywhere.
    order = np.argsort(Stream(seed, _PLACE).raw(count), kind="stable")
    parts = np.zeros(count, np.int8)
    parts[order[:test]] = 2
    parts[order[test : test + validation]] = 1
    return parts
