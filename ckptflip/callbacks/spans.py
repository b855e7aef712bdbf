"""Whole numbers as a user names them: ``3``, ``[3, 5]``, ``"3-5"``, ``"3,7-9"``, ``"10-"``."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from ckptflip.errors import UsageError

When = int | str | Sequence[int] | range
Spans = list[tuple[int, int]]
NEVER = 2**63


def spans(given: When, what: str) -> Spans:
    """Numbers as ascending, separate spans, both ends included; an open one ends at `NEVER`.

    Args:
        given: as the user wrote it.
        what: what is numbered, for messages.

    Raises:
        UsageError: none at all, negative ones, or a text that cannot be read.

    Example:
        >>> spans("7-9,3,4", "steps"), spans([5, 6], "steps")
        ([(3, 4), (7, 9)], [(5, 6)])
    """
    if isinstance(given, str):
        found = [_span(term.strip(), given, what) for term in given.split(",")]
    else:
        values = [given] if isinstance(given, int | np.integer) else list(given)
        found = []
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise UsageError(f"{what} are whole numbers from 0, not {value!r}")
            found.append((int(value), int(value)))
    if not found:
        raise UsageError(f"the schedule can never fire: {what} is empty")
    merged: Spans = []
    for low, high in sorted(found):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _span(term: str, text: str, what: str) -> tuple[int, int]:
    low, dash, high = term.partition("-")
    if not low.isdecimal() or (high and not high.isdecimal()):
        raise UsageError(f"{what} {text!r}: {term!r} is not a number (3), a range (3-5) or an open one (3-)")
    first = int(low)
    last = first if not dash else int(high) if high else NEVER
    if last < first:
        raise UsageError(f"{what} {text!r}: the range {term} runs backwards; write {last}-{first}")
    return first, last


def within(found: Spans, value: int) -> bool:
    """Whether a number lies in one of the spans."""
    at = bisect.bisect_right(found, (value, NEVER)) - 1
    return at >= 0 and value <= found[at][1]


def holds_multiple(span: tuple[int, int], every: int) -> bool:
    """Whether a span has a number, counted from 0, that is the last of `every`."""
    low, high = span
    return -(-(low + 1) // every) * every <= high + 1
