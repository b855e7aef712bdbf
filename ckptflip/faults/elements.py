"""Which elements of a tensor may be hit: rows, or a slice along every axis."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.errors import SelectionError, UsageError

Axis = range | NDArray[np.int64]
# The rows read most or least: ("hot" or "cold", how many) → their numbers, ascending.
Extreme = Callable[[str, int], NDArray[np.int64]]

_BY_ACCESS = re.compile(r"(hot|cold):(\d{1,18}(?:\.\d{1,18})?|\.\d{1,18})(%?)")


class Elements(Struct, frozen=True, eq=False):
    """A product of positions along each axis of a tensor, numbered 0 … size-1 in C order.

    Attributes:
        shape: the tensor's shape.
        axes: the eligible positions along each axis, ascending; None when all elements are eligible.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...] | None = None

    @property
    def size(self) -> int:
        """Eligible elements."""
        return prod(self.shape) if self.axes is None else prod(len(a) for a in self.axes)

    def flat(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Flat C-order indices of eligible elements; ascending for ascending ranks.

        Example:
            >>> Elements((4, 3), (range(1, 4, 2), range(0, 3, 2))).flat(np.arange(4))
            array([ 3,  5,  9, 11])
        """
        if self.axes is None:
            return ranks
        flat = np.zeros_like(ranks)
        stride = 1
        rest = ranks
        for axis, length in zip(reversed(self.axes), reversed(self.shape), strict=True):
            rest, at = np.divmod(rest, len(axis))
            along = axis.start + at * axis.step if isinstance(axis, range) else axis[at]
            flat += along * stride
            stride *= length
        return flat


def choose(
    shape: tuple[int, ...], rows: str | None, slices: str | None, extreme: Extreme | None = None
) -> Elements:
    """The elements that `rows` or `slices` leave eligible in a tensor of this shape; possibly none.

    Args:
        shape: the tensor's shape.
        rows: positions along the first axis: ``5``, ``10-20`` (both ends), ``0:100:2`` (as in Python),
            ``hot:1%`` or ``cold:1000`` (those read most or least), joined by commas. Positions beyond the
            tensor are not there to be hit.
        slices: one Python slice or position per axis, such as ``0:16,:,3``; axes left out are whole.
        extreme: finds the rows read most or least; needed for ``hot`` and ``cold`` alone.

    Raises:
        UsageError: a specification that cannot be read.
        SelectionError: more rows by access than the tensor has.

    Example:
        >>> choose((8, 2), "0,6-9", None).size
        6
    """
    if rows is not None:
        if not shape:
            return Elements(shape, (range(0),))
        return Elements(shape, (_rows(rows, shape[0], extreme), *(range(n) for n in shape[1:])))
    if slices is not None:
        return _sliced(slices, shape)
    return Elements(shape)


def check(rows: str | None, slices: str | None) -> None:
    """Raise UsageError unless both specifications can be read (whatever the tensor)."""
    if rows is not None and slices is not None:
        raise UsageError("rows and slice were both given; a slice names rows too, so give one of them")
    if rows is not None:
        _rows(rows, 0)
    if slices is not None:
        _sliced(slices, (1,) * 64)


def by_access(rows: str | None) -> bool:
    """Whether a specification of rows asks for those read most or least.

    Example:
        >>> by_access("0-9,hot:1%"), by_access("0-9")
        (True, False)
    """
    return rows is not None and any(t.strip().startswith(("hot", "cold")) for t in rows.split(","))


def _rows(spec: str, length: int, extreme: Extreme | None = None) -> Axis:
    parts: list[Axis] = []
    for term in (t.strip() for t in spec.split(",")):
        if by_access(term):
            parts.append(_accessed(term, length, extreme))
        else:
            parts.append(_positions(term, length, f"rows {spec!r}"))
    if len(parts) == 1:
        return parts[0]
    return np.unique(
        np.concatenate(
            [np.arange(p.start, p.stop, p.step, dtype=np.int64) if isinstance(p, range) else p for p in parts]
        )
    )


def _accessed(term: str, length: int, extreme: Extreme | None) -> NDArray[np.int64]:
    """The rows of a term such as ``hot:1%``; none of a tensor without rows."""
    match = _BY_ACCESS.fullmatch(term)
    if match is None or (not match[3] and "." in match[2]):
        raise UsageError(f"rows {term!r}: the rows read most or least are hot:1%, cold:50% or hot:1000")
    kind, amount, share = match[1], float(match[2]), bool(match[3])
    if not amount > 0 or (share and amount > 100):
        most = " and at most 100 %" if share else ""
        raise UsageError(f"rows {term!r}: how many must be above 0{most}")
    if not length:
        return np.empty(0, np.int64)
    count = max(1, round(length * amount / 100)) if share else int(match[2])
    if count > length:
        raise SelectionError(f"rows {term!r}: there are only {length} rows")
    if extreme is None:
        raise UsageError(f"rows {term!r} needs access counts: name their file with rows_weight")
    return extreme(kind, count)


def _sliced(spec: str, shape: tuple[int, ...]) -> Elements:
    terms = [t.strip() for t in spec.split(",")]
    if len(terms) > len(shape):
        _ = [_positions(t, 1, f"slice {spec!r}") for t in terms]
        return Elements((1,), (range(0),))
    axes = [_positions(t, n, f"slice {spec!r}") for t, n in zip(terms, shape, strict=False)]
    return Elements(shape, (*axes, *(range(n) for n in shape[len(terms) :])))


def _positions(term: str, length: int, where: str) -> range:
    """One term as ascending positions within 0 … length-1."""
    try:
        if ":" in term:
            ends = [int(t) if t.strip() else None for t in term.split(":")]
            if len(ends) > 3 or (len(ends) == 3 and ends[2] is not None and ends[2] < 1):
                raise ValueError
            return range(length)[slice(*ends)]
        low, dash, high = term.partition("-") if not term.startswith("-") else (term, "", "")
        first = int(low)
        last = int(high) if dash else first
    except ValueError:
        raise UsageError(
            f"{where}: {term!r} is not a position (5), a range (10-20) or a slice of positive step (0:100:2)"
            + (", nor hot:1% or cold:1%" if where.startswith("rows") else "")
        ) from None
    if last < first:
        raise UsageError(f"{where}: the range {term} runs backwards")
    if first < 0:
        first = last = first + length
        return range(first, last + 1) if first >= 0 else range(0)
    return range(min(first, length), min(last + 1, length))
