"""The verbs that look: diff two checkpoints, scan one. Nothing is altered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat, classify, popcount, to_values
from ckptflip.bits.values import EXTREME, Classes
from ckptflip.checkpoints import Checkpoint, opened
from ckptflip.checkpoints.files import Progress
from ckptflip.checkpoints.target import position_of, positions_by_name
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor, listed, select

# A value counts as an outlier when it is this much larger than the tensor's median magnitude (powers of two).
OUTLIER_BINADES = 10


class TensorDiff(msgspec.Struct, frozen=True, kw_only=True):
    """How one tensor differs between two checkpoints A and B.

    Attributes:
        tensor: its name.
        status: ``same``, ``differs``, ``only in A``, ``only in B`` or ``shape or dtype differs``.
        words: words that differ.
        bits: bits that differ.
        max_abs: largest |B − A| over elements finite in both.
        relative_l2: ‖B − A‖₂ / ‖A‖₂ over elements finite in both; infinite when A is zero and B is not.
        max_ulp: largest distance in representable numbers (units in the last place), NaN left out.
        nev_a: NaN, infinite and extreme values in A.
        nev_b: the same in B.
        note: what else there is to say.
    """

    tensor: str
    status: str
    words: int = 0
    bits: int = 0
    max_abs: float = 0.0
    relative_l2: float = 0.0
    max_ulp: int = 0
    nev_a: int = 0
    nev_b: int = 0
    note: str = ""


class TensorScan(msgspec.Struct, frozen=True, kw_only=True):
    """What stands out in one tensor.

    Attributes:
        tensor: its name.
        elements: how many there are.
        nan: NaN among them.
        inf: infinities.
        extreme: finite values of a magnitude above the threshold.
        outliers: other values at least 2^10 times larger than the tensor's median magnitude: worth a look,
            not proof of anything (an optimizer's second moments have some).
        minimum: smallest finite value.
        maximum: largest finite value.
        first: flat index of the first NaN, infinite or extreme element; -1 when there is none.
    """

    tensor: str
    elements: int
    nan: int
    inf: int
    extreme: int
    outliers: int
    minimum: float
    maximum: float
    first: int

    @property
    def nev(self) -> int:
        """NaN, infinite and extreme values together."""
        return self.nan + self.inf + self.extreme


def diff(
    a: str | Path,
    b: str | Path,
    *,
    tensors: str | Iterable[str] = (),
    rowwise: str | None = None,
    threshold: float = EXTREME,
    progress: Progress | None = None,
) -> list[TensorDiff]:
    """Compare two checkpoints tensor by tensor, word by word.

    Args:
        a: one checkpoint.
        b: the other; tensors are matched by name, aliases included.
        tensors: globs that limit the comparison to some tensors of `a` and `b`.
        rowwise: these tensors are row-wise quantised tables in this layout, see `ckptflip.faults.Policy`:
            their codes, scales and biases are compared.
        threshold: what counts as an extreme value.
        progress: told the bytes of `a` compared, step by step.

    Returns:
        One row per tensor of either, in the order of `a`.

    Raises:
        CheckpointError: a file cannot be read.
        SelectionError: the globs match nothing in either.
        UsageError: a threshold that is not above 0.
    """
    _check_threshold(threshold)
    globs = listed(tensors)
    with ExitStack() as stack:
        first = stack.enter_context(opened(a))
        second = stack.enter_context(opened(b))
        if rowwise is not None:
            first, second = _as_tables(first, second, globs, rowwise)
        names = positions_by_name(second.tensors)
        wanted_a, wanted_b = _limited(first, globs, second), _limited(second, globs, first)
        rows: list[TensorDiff] = []
        seen: set[int] = set()
        for i, tensor in enumerate(first.tensors):
            at = position_of(tensor, names)
            if at is not None:
                seen.add(at)
            if i not in wanted_a:
                continue
            rows.append(
                TensorDiff(tensor=tensor.name, status="only in A")
                if at is None
                else _compare(first, i, second, at, threshold, progress)
            )
        rest = [t for i, t in enumerate(second.tensors) if i not in seen and i in wanted_b]
        return rows + [TensorDiff(tensor=t.name, status="only in B") for t in rest]


def scan(
    checkpoint: str | Path,
    *,
    tensors: str | Iterable[str] = (),
    threshold: float = EXTREME,
    progress: Progress | None = None,
) -> list[TensorScan]:
    """Look for NaN, infinite, extreme and outlying values in every floating-point tensor of a checkpoint.

    Args:
        checkpoint: the file.
        tensors: globs that limit the scan.
        threshold: what counts as an extreme value.
        progress: told the bytes looked at, step by step.

    Raises:
        CheckpointError: the file cannot be read.
        SelectionError: the globs match nothing.
        UsageError: a threshold that is not above 0.
    """
    _check_threshold(threshold)
    with opened(checkpoint) as target:
        globs = listed(tensors)
        wanted = select(target.tensors, names=globs) if globs else range(len(target.tensors))
        return [
            _scan_tensor(target, i, threshold, progress) for i in wanted if target.tensors[i].number.is_float
        ]


def _check_threshold(threshold: float) -> None:
    if not threshold > 0:
        raise UsageError(f"the threshold of extreme values must be above 0, not {threshold}")


def _as_tables(
    first: Checkpoint, second: Checkpoint, globs: tuple[str, ...], rowwise: str
) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints with the selected tables as their fields."""
    from ckptflip.faults.rowwise import parse
    from ckptflip.recsys.tables.views import TableCheckpoint

    layout = parse(rowwise)
    tables = [
        dict.fromkeys(_limited(one, globs, other), layout)
        for one, other in ((first, second), (second, first))
    ]
    return TableCheckpoint(first, tables[0]), TableCheckpoint(second, tables[1])


def _limited(target: Checkpoint, globs: tuple[str, ...], other: Checkpoint) -> set[int]:
    """The positions in one catalogue that the globs select; a glob may select in the other alone."""
    if not globs:
        return set(range(len(target.tensors)))
    select([*target.tensors, *other.tensors], names=globs)
    here = {t.name for t in target.tensors}
    both = [*target.tensors, *(t for t in other.tensors if t.name not in here)]
    return {i for i in select(both, names=globs) if i < len(target.tensors)}


def _compare(
    first: Checkpoint, i: int, second: Checkpoint, j: int, threshold: float, progress: Progress | None
) -> TensorDiff:
    one, other = first.tensors[i], second.tensors[j]
    if (one.shape, one.number) != (other.shape, other.number):
        note = f"{one.dtype} {one.shape} and {other.dtype} {other.shape}"
        return TensorDiff(tensor=one.name, status="shape or dtype differs", note=note)
    sums = _Sums(one.number, threshold)
    for a, b in aligned(first.blocks(i), second.blocks(j)):
        sums.add(a, b)
        if progress:
            progress(a.nbytes)
    return sums.row(one)


def aligned(
    a: Iterator[NDArray[Any]], b: Iterator[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Blocks of equal length from two streams that cut the same words differently."""
    left = right = np.empty(0, np.uint8)
    while True:
        if not left.size:
            left = next(a, left[:0])
        if not right.size:
            right = next(b, right[:0])
        size = min(left.size, right.size)
        if not size:
            return
        yield left[:size], right[:size]
        left, right = left[size:], right[size:]


class _Sums:
    """Running totals of one tensor's comparison."""

    def __init__(self, number: NumberFormat, threshold: float) -> None:
        self._number = number
        self._threshold = threshold
        self._words = self._bits = self._ulp = self._nev_a = self._nev_b = self._infinite = 0
        self._max = 0.0
        # Long doubles, because the squares of large float64 values are beyond float64.
        self._delta2 = self._norm2 = np.longdouble(0)

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Take in one block of each. Signalling NaN are no reason to warn: they are counted."""
        with np.errstate(all="ignore"):
            self._add(a, b)

    def _add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        number = self._number
        values, nev_a = self._values(a), classify(a, number, self._threshold)
        self._nev_a += _count(nev_a)
        finite = ~(nev_a.nan | nev_a.inf)
        if np.array_equal(a, b):
            self._nev_b += _count(nev_a)
            self._norm2 += np.square(values[finite]).sum()
            return
        nev_b = classify(b, number, self._threshold)
        self._nev_b += _count(nev_b)
        finite &= ~(nev_b.nan | nev_b.inf)
        self._norm2 += np.square(values[finite]).sum()
        at = np.flatnonzero(a != b)
        self._words += at.size
        self._bits += popcount(a[at] ^ b[at])
        usable = at[finite[at]]
        self._infinite += at.size - usable.size
        if usable.size:
            delta = self._values(b[usable]) - values[usable]
            self._max = max(self._max, float(np.abs(delta).max()))
            self._delta2 += np.square(delta).sum()
        numbers = at[~(nev_a.nan | nev_b.nan)[at]]
        if number.is_float and numbers.size:
            self._ulp = max(self._ulp, int(_ulps(a[numbers], b[numbers], number).max()))

    def _values(self, words: NDArray[Any]) -> NDArray[Any]:
        kind = np.longdouble if self._number.part_width > 32 else np.float64
        return to_values(words, self._number).astype(kind)

    def row(self, tensor: Tensor) -> TensorDiff:
        if self._norm2:
            relative = float(np.sqrt(self._delta2 / self._norm2))
        else:
            relative = float("inf") if self._delta2 else 0.0
        return TensorDiff(
            tensor=tensor.name,
            status="differs" if self._words else "same",
            words=self._words,
            bits=self._bits,
            max_abs=self._max,
            relative_l2=relative,
            max_ulp=self._ulp,
            nev_a=self._nev_a,
            nev_b=self._nev_b,
            note=f"{self._infinite} of them not finite, left out of the distances" if self._infinite else "",
        )


def _count(classes: Classes) -> int:
    return sum(int(np.count_nonzero(c)) for c in classes)


def _ulps(a: NDArray[Any], b: NDArray[Any], number: NumberFormat) -> NDArray[np.uint64]:
    """Distance of two words in representable numbers; +0 and −0 are the same number."""
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    if not number.signed:
        return np.maximum(x, y) - np.minimum(x, y)
    top = np.uint64(1 << (number.part_width - 1))
    low = top - np.uint64(1)
    mx, my = x & low, y & low
    same_sign = (x & top) == (y & top)
    return np.where(same_sign, np.maximum(mx, my) - np.minimum(mx, my), mx + my)


def _scan_tensor(
    target: Checkpoint, position: int, threshold: float, progress: Progress | None
) -> TensorScan:
    tensor = target.tensors[position]
    number = tensor.number
    counts = np.zeros(3, np.int64)
    # How many finite values there are of each binary exponent; index 0 holds the zeros.
    exponents = np.zeros(2400, np.int64)
    low, high, first, start = float("inf"), float("-inf"), -1, 0
    for words in target.blocks(position):
        if progress:
            progress(words.nbytes)
        classes = classify(words, number, threshold)
        counts += [np.count_nonzero(c) for c in classes]
        strange = classes.nan | classes.inf | classes.extreme
        if first < 0 and strange.any():
            first = (start + int(np.argmax(strange))) // number.parts
        start += words.size
        finite = to_values(words[~(classes.nan | classes.inf)], number)
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        usual = to_values(words[~strange], number)
        power = np.where(usual == 0, -1200, np.frexp(usual)[1])
        exponents += np.bincount(power + 1200, minlength=exponents.size)
    return TensorScan(
        tensor=tensor.name,
        elements=tensor.size,
        nan=int(counts[0]),
        inf=int(counts[1]),
        extreme=int(counts[2]),
        outliers=_outliers(exponents[1:]),
        minimum=low,
        maximum=high,
        first=first,
    )


def _outliers(exponents: NDArray[np.int64]) -> int:
    """Values whose exponent lies `OUTLIER_BINADES` or more above the median one (zeros left out)."""
    total = int(exponents.sum())
    if not total:
        return 0
    median = int(np.searchsorted(np.cumsum(exponents), (total + 1) // 2))
    return int(exponents[median + OUTLIER_BINADES :].sum())


def has_difference(rows: list[TensorDiff]) -> bool:
    """Whether any row says that the checkpoints differ."""
    return any(r.status != "same" for r in rows)


__all__ = ["TensorDiff", "TensorScan", "diff", "has_difference", "scan"]
