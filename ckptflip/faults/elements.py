"""Which elements of a tensor may be hit: rows, or a slice along every axis."""

from __future__ import annotations

from math import prod

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.errors import UsageError

Axis = range | NDArray[np.int64]


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


def choose(shape: tuple[int, ...], rows: str | None, slices: str | None) -> Elements:
    """The elements that `rows` or `slices` leave eligible in a tensor of this shape; possibly none.

    Args:
        shape: the tensor's shape.
        rows: positions along the first axis: ``5``, ``10-20`` (both ends), ``0:100:2`` (as in Python), joined
            by commas. Positions beyond the tensor are not there to be hit.
        slices: one Python slice or position per axis, such as ``0:16,:,3``; axes left out are whole.

    Raises:
        UsageError: a specification that cannot be read.

    Example:
        >>> choose((8, 2), "0,6-9", None).size
        6
    """
    if rows is not None:
        if not shape:
            return Elements(shape, (range(0),))
        return Elements(shape, (_rows(rows, shape[0]), *(range(n) for n in shape[1:])))
    if slices is not None:
        return _sliced(slices, shape)
    return Elements(shape)


def check(rows: str | None, slices: str | None) -> None:
    """Raise UsageError unless both specifications can be read (whatever the tensor)."""
    if rows is not None and slices is not None:
        raise UsageError("rows and slice were both given; a slice names rows too, so give one of them")
    if rows is not None:
        _rows(rows, 1)
    if slices is not None:
        _sliced(slices, (1,) * 64)


def _rows(spec: str, length: int) -> Axis:
    parts: list[range] = []
    for term in spec.split(","):
        parts.append(_positions(term.strip(), length, f"rows {spec!r}"))
    if len(parts) == 1:
        return parts[0]
    return np.unique(np.concatenate([np.arange(p.start, p.stop, p.step, dtype=np.int64) for p in parts]))


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
        ) from None
    if last < first:
        raise UsageError(f"{where}: the range {term} runs backwards")
    if first < 0:
        first = last = first + length
        return range(first, last + 1) if first >= 0 else range(0)
    return range(min(first, length), min(last + 1, length))
