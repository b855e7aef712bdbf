"""One look-up: what is asked of a table, the kernel that answers and checks, and the plain way without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.rows import Row
from ckptflip.protect.embeddings.tables import differing
from ckptflip.protect.native import kernels, why_not

# The bits of a verdict.
SUM, TAG, ARITHMETIC = 1, 2, 4
_INTEGERS = {torch.int32: 4, torch.int64: 8}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("sum", "twin", "value", "scale", "bias", "mean", "plain", "weighted")


@dataclass(frozen=True, slots=True)
class ArithmeticFault:
    """One bit that goes wrong in a register of the kernel, to see what the checks say of it.

    Attributes:
        bag: the bag that is being added up.
        step: the look-up of the bag, from 0; of no account for ``mean``.
        part: ``sum`` or ``twin``: what is returned and what it is compared with, once that look-up was added;
            ``value``: a code or a float of the row, unpacked; ``scale`` or ``bias``: what it is multiplied by
            and what is added to it, times the weight of the look-up; ``mean``: the factor of a mean;
            ``plain`` or ``weighted``: the sums that are compared with digits and tags.
        place: of ``sum``, ``twin`` and ``value``, the column (of 4-bit codes with AVX-512, places 0, 1, 2, 3
            have columns 0, 8, 1, 9 and so on); of the others a lane, of 16 with AVX-512, else 0. Lane 16 of
            ``plain`` and ``weighted`` has the sum of the digits and that of the tags.
        bit: of a word of 32, the lowest is 0.

    Raises:
        UsageError: a part that is none, or a bit beyond 31.

    Example:
        >>> ArithmeticFault(bag=0, step=3, part="sum", place=5, bit=30).packed().hex()[:4]
        '0000'
    """

    bag: int
    step: int
    part: str
    place: int = 0
    bit: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS or not 0 <= self.bit < 32:
            raise UsageError(f"no bit {self.bit} of {self.part!r}: bits 0 to 31 of {', '.join(PARTS)}")

    def packed(self) -> bytes:
        """As the kernel takes it: see `Fault` in embedding_bag.h."""
        words = [self.bag, self.step, PARTS.index(self.part), self.place, self.bit]
        return np.array(words, np.int64).tobytes()


@dataclass(slots=True)
class Bags:
    """The ids of a call, and which of them make up a bag.

    Attributes:
        ids: int32 or int64[n], contiguous.
        offsets: where bags begin, int32 or int64; None: every bag has `length` ids.
        count: bags.
        length: of each bag, without offsets.
        weights: float32[n], or None.
    """

    ids: torch.Tensor
    offsets: torch.Tensor | None
    count: int
    length: int
    weights: torch.Tensor | None

    def bounds(self) -> torch.Tensor:
        """Where bags begin, and where the last one ends: int64[count + 1]."""
        if self.offsets is None:
            return torch.arange(self.count + 1) * self.length
        end = torch.tensor([self.ids.numel()])
        return torch.cat([self.offsets.long(), end])[: self.count + 1]


@dataclass(slots=True)
class Found:
    """What a look-up gives.

    Attributes:
        values: float32[bags, D].
        verdicts: those of `verdict`, one byte each: a tensor takes longer to make, and few callers look.
        unsound: how many verdicts are not 0.
    """

    values: torch.Tensor
    verdicts: bytearray
    unsound: int

    @property
    def verdict(self) -> torch.Tensor:
        """Of each bag, uint8[bags].

        0, or the sum of 1 (a row's values do not fit their sum), 2 (a row's tag does not fit its values,
        scale, bias and number) and 4 (added up twice, a bag was not the same).
        """
        return verdict_of(self.verdicts)


def verdict_of(verdicts: bytearray) -> torch.Tensor:
    """A byte for each bag as a tensor, uint8[bags], of the same memory."""
    return torch.from_numpy(np.frombuffer(verdicts, np.uint8))


def bags_of(
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    include_last: bool,
    name: str,
) -> Bags:
    """Arguments of an embedding bag, looked over; what is in them is checked as it is read.

    Args:
        ids: int32 or int64; [n] with offsets, [bags, length] without.
        offsets: int32 or int64[bags], or [bags + 1] with `include_last`.
        weights: float, of the shape of `ids`.
        include_last: whether the last offset is where the last bag ends.
        name: of the table, for messages.

    Raises:
        UsageError: shapes or dtypes that make no sense.
    """
    if getattr(ids, "dtype", None) not in _INTEGERS:
        raise UsageError(f"table {name}: ids are a tensor of int32 or int64, not {_kind(ids)}")
    if weights is not None:
        if not isinstance(weights, torch.Tensor) or weights.is_complex():
            raise UsageError(f"table {name}: per_sample_weights are numbers, not {_kind(weights)}")
        if weights.shape != ids.shape:
            raise UsageError(
                f"table {name}: {tuple(weights.shape)} weights for {tuple(ids.shape)} ids: give one for each"
            )
        weights = weights.detach().to(torch.float32).resolve_neg().reshape(-1).contiguous()
    if ids.dim() == 2:
        if offsets is not None:
            raise UsageError(f"table {name}: ids of two axes are bags already, and take no offsets")
        return Bags(ids.reshape(-1).contiguous(), None, ids.shape[0], ids.shape[1], weights)
    listed = isinstance(offsets, torch.Tensor) and offsets.dim() == 1 and offsets.dtype in _INTEGERS
    if ids.dim() != 1 or offsets is None or not listed:
        raise UsageError(
            f"table {name}: ids have two axes, [bags, length], or one and offsets, a tensor of "
            "int32 or int64 of one axis"
        )
    count = offsets.numel() - include_last
    if count < 0:
        raise UsageError(f"table {name}: with include_last_offset there is at least one offset")
    return Bags(ids.contiguous(), offsets.contiguous(), count, 0, weights)


def _kind(given: Any) -> object:
    return given.dtype if isinstance(given, torch.Tensor) else type(given).__name__


def look_up(
    table: torch.Tensor,
    row: Row,
    plan: bytes,
    bags: Bags,
    *,
    mean: bool = False,
    padding: int = -1,
    threads: int = 1,
    name: str = "without a name",
    fault: ArithmeticFault | None = None,
) -> Found:
    """Look up bags, add them and check every row and every addition.

    Args:
        table: as `ckptflip.protect.embeddings.protect_table` gave it, contiguous, on the CPU.
        row: its layout.
        plan: `Row.plan` of it.
        bags: what to look up.
        mean: whether sums are divided by the number of rows.
        padding: an id that is skipped; -1: none.
        threads: how many share the bags.
        name: of the table, for messages.
        fault: in the kernel's arithmetic, for tests and studies.

    Raises:
        UsageError: ids beyond the table, offsets that go back or beyond the ids; nothing outside was read. A
            fault, and no kernel to have it.
    """
    native = kernels()
    if native is None:
        if fault is not None:
            raise UsageError(f"table {name}: a fault in the kernel's arithmetic: {why_not()}")
        return plain(table, row, bags, mean=mean, padding=padding, name=name)
    values = torch.empty(bags.count, row.dim)
    verdicts = bytearray(bags.count)
    ids, offsets, weights = bags.ids, bags.offsets, bags.weights
    unsound = native.embedding_bag(
        _ISA,
        plan,
        table.data_ptr(),
        ids.data_ptr(),
        _INTEGERS[ids.dtype],
        ids.numel(),
        0 if offsets is None else offsets.data_ptr(),
        8 if offsets is None else _INTEGERS[offsets.dtype],
        0 if offsets is None else offsets.numel(),
        bags.length,
        bags.count,
        0 if weights is None else weights.data_ptr(),
        mean,
        padding,
        values.data_ptr(),
        verdicts,
        threads,
        None if fault is None else fault.packed(),
    )
    if unsound < 0:
        _check(bags, table.shape[0], name)
        raise UsageError(
            f"table {name}: bag {-1 - unsound} has ids beyond the table, or offsets beyond the ids"
        )
    return Found(values, verdicts, unsound)


# The instructions that are used at most: 2 for all there are. Tests go through them.
_ISA = 2


def plain(
    table: torch.Tensor,
    row: Row,
    bags: Bags,
    *,
    mean: bool = False,
    padding: int = -1,
    name: str = "without a name",
) -> Found:
    """`look_up` without the compiled kernel: ATen's operator, and the rows once more for their checks.

    The same verdicts, but for additions, which are not checked: bit 4 is never set. It takes several times
    as long as the operator alone.
    """
    _check(bags, table.shape[0], name)
    bags = _listed(bags)
    kept = bags.ids != padding
    verdict = _row_verdicts(table, row, bags, kept)
    values = _stock(table, row, _without_padding(bags, kept) if padding >= 0 else bags)
    if mean:
        counts = torch.zeros(bags.count).index_add_(0, _bag_numbers(bags)[kept], torch.ones(int(kept.sum())))
        # As the kernel does it: times the reciprocal.
        values = values * (1 / counts.clamp(min=1)).unsqueeze(1)
    return Found(values, bytearray(verdict.numpy()), int((verdict != 0).sum()))


def _listed(bags: Bags) -> Bags:
    """The same bags without ids behind the last one."""
    end = int(bags.bounds()[-1]) if bags.count else 0
    if end == bags.ids.numel():
        return bags
    weights = None if bags.weights is None else bags.weights[:end]
    return Bags(bags.ids[:end], bags.offsets, bags.count, bags.length, weights)


def _row_verdicts(table: torch.Tensor, row: Row, bags: Bags, kept: torch.Tensor) -> torch.Tensor:
    different, which = torch.unique(bags.ids[kept].long(), return_inverse=True)
    data = table.index_select(0, different).view(torch.uint8).numpy()
    found = torch.from_numpy(differing(data, row, different.numpy()).astype(np.uint8))[which]
    verdict = torch.zeros(bags.count, dtype=torch.uint8)
    numbers = _bag_numbers(bags)[kept]
    for bit in (SUM, TAG):
        verdict[numbers[(found & bit) != 0]] |= bit
    return verdict


def _bag_numbers(bags: Bags) -> torch.Tensor:
    """The bag that each id belongs to, int64[n]."""
    return torch.repeat_interleave(torch.arange(bags.count), bags.bounds().diff())


def _without_padding(bags: Bags, kept: torch.Tensor) -> Bags:
    before = torch.cat([torch.zeros(1, dtype=torch.int64), kept.long().cumsum(0)])
    weights = None if bags.weights is None else bags.weights[kept]
    return Bags(bags.ids[kept], before[bags.bounds()][:-1], bags.count, 0, weights)


def _stock(table: torch.Tensor, row: Row, bags: Bags) -> torch.Tensor:
    """ATen's own sums of a protected table, its check columns left out."""
    offsets = bags.bounds()[:-1]
    if row.coded:
        values = aten_bags(row.layout)(table, bags.ids.long(), offsets, False, 0, False, bags.weights)
    else:
        weight = table if row.layout == "fp32" else table.float()
        values = torch.nn.functional.embedding_bag(
            bags.ids.long(), weight, offsets, mode="sum", per_sample_weights=bags.weights
        )
    return values[:, : row.dim].contiguous()


def aten_bags(layout: str) -> Any:
    """ATen's operator for row-wise codes of a layout.

    Raises:
        UsageError: this PyTorch has none.
    """
    name = {"int8": "byte", "int4": "4bit", "int2": "2bit"}[layout]
    operator = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets", None)
    if operator is None:
        raise UsageError(
            f"this PyTorch has no operator for {layout} tables, and compiled kernels are missing"
        )
    return operator


def _check(bags: Bags, rows: int, name: str) -> None:
    """Raise UsageError where ids are beyond the table, or offsets go back or beyond the ids."""
    bounds = bags.bounds()
    begins, ends = bounds[:-1], bounds[1:]
    bad = (begins < 0) | (begins > ends) | (ends > bags.ids.numel())
    if bool(bad.any()):
        b = int(bad.nonzero()[0])
        raise UsageError(
            f"table {name}: bag {b} begins at id {int(begins[b])} and ends at {int(ends[b])} of "
            f"{bags.ids.numel()}: offsets do not go back, nor beyond the ids"
        )
    if bags.count and int(bounds[0]) != 0:
        raise UsageError(f"table {name}: the first bag begins at id {int(bounds[0])}: the first offset is 0")
    beyond = (bags.ids < 0) | (bags.ids >= rows)
    first, last = (int(bounds[0]), int(bounds[-1])) if bags.count else (0, 0)
    places = beyond[first:last].nonzero()
    if places.numel():
        place = first + int(places[0])
        b = int(torch.searchsorted(bounds, place, right=True)) - 1
        raise UsageError(
            f"table {name}: bag {b} asks for row {int(bags.ids[place])}, and the table has {rows} rows, "
            "numbered from 0"
        )
