"""Ways to check a linear layer: one sum for the layer, one for each row, in the tile, running it twice.

All take x of shape (m, k) and give x Wᵀ + b of shape (m, n) and whether a quick check holds. What does not
hold is judged once more in double precision: a quick check that is too strict costs time, no false alarm.
Under autocast, results are those of PyTorch's product in autocast's dtype, and so is the bound.

| scheme | on a fault in | finds changes of one result beyond |
|---|---|---|
| global | results in memory, the product, weights | twice the bound of all rows together |
| row | results in memory, the product, weights | twice the bound of its row |
| tile | the product, weights; not results after they were stored | twice the bound of its row |
| replication | the product; weights that change between the two runs alone | nothing: any bit |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn.functional import linear

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.floats import detectable
from ckptflip.protect.intensity import judging, triton_schemes
from ckptflip.protect.intensity.judging import SOUND, Judgement
from ckptflip.protect.intensity.roofline import Shape
from ckptflip.protect.intensity.weights import Weights
from ckptflip.protect.native import kernels, why_not

Run = Callable[[torch.Tensor], tuple[torch.Tensor, bool]]


class Scheme(Protocol):
    """A way to check a linear layer."""

    name: str

    def unfit(self, weights: Weights) -> str:
        """Why it cannot check this layer; empty if it can."""

    def prepare(self, weights: Weights) -> Run:
        """A function from x (m, k) to the results and whether the quick check holds."""

    def judge(self, weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
        """What is wrong with results that the quick check suspects."""

    def least(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        """The smallest change of one result that is found for certain, (m,); not under autocast."""

    def cost(self, shape: Shape) -> tuple[int, int]:
        """FLOP, and bytes moved, beyond those of the product."""

    def memory(self, weights: Weights) -> int:
        """Bytes kept beyond the weights."""


class Unchecked:
    """Nothing is checked: what the others are compared with."""

    name = "none"

    def unfit(self, weights: Weights) -> str:
        return ""

    def prepare(self, weights: Weights) -> Run:
        weight, bias = weights.weight, weights.bias
        return lambda x: (linear(x, weight, bias), True)

    def judge(self, weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
        return SOUND

    def least(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), float("inf"), dtype=torch.float64)

    def cost(self, shape: Shape) -> tuple[int, int]:
        return 0, 0

    def memory(self, weights: Weights) -> int:
        return 0


class Summed:
    """The sums of PyTorch's own results against checksums: of each row, or of all rows at once.

    One compiled pass over x and the results; without it, or for 16-bit floats, in PyTorch's double precision.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._kernel = {"global": "linear_whole", "row": "linear_rows"}[name]
        self.judge = {"global": judging.whole, "row": judging.rows}[name]

    def unfit(self, weights: Weights) -> str:
        return ""

    def prepare(self, weights: Weights) -> Run:
        weight, bias, judge = weights.weight, weights.bias, self.judge

        def plain(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            out = linear(x, weight, bias)
            found = judge(weights, x, out)
            return out, not (found.faulty or found.unchecked)

        if weights.weight.is_cuda and self.name == "global" and not triton_schemes.unfit(weights):
            return _unless_autocast(triton_schemes.total(weights), plain)
        if weights.fast is None:
            return plain
        address, kernel = weights.fast.address, getattr(kernels(), self._kernel)
        single, inputs, outputs = torch.float32, weights.inputs, weights.outputs

        def fast(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            if not (x.is_contiguous() and x.dtype is single and x.is_cpu) or x.is_neg():
                return plain(x)
            out = linear(x, weight, bias)
            if out.dtype is not single or not out.is_contiguous():  # under autocast
                found = judge(weights, x, out)
                return out, not (found.faulty or found.unchecked)
            return out, not kernel(address, x.shape[0], x.data_ptr(), inputs, out.data_ptr(), outputs)

        return fast

    def least(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        rows = row_least(weights, x)
        return rows if self.name == "row" else rows.sum().expand(len(x))

    def cost(self, shape: Shape) -> tuple[int, int]:
        m, n, k = shape.rows, shape.outputs, shape.inputs
        return m * (4 * k + n), shape.itemsize * m * (k + n)

    def memory(self, weights: Weights) -> int:
        checksum = weights.checksum
        kept = checksum.sums.nbytes + checksum.sizes.nbytes + checksum.single_sizes.nbytes
        return int(kept) + (weights.fast.nbytes if weights.fast else 0)


class Replicated:
    """The layer twice, bit for bit; for operators that give the same bits for the same input."""

    name = "replication"

    def unfit(self, weights: Weights) -> str:
        return ""

    def prepare(self, weights: Weights) -> Run:
        weight, bias, compiled = weights.weight, weights.bias, kernels()

        def twice(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            out = linear(x, weight, bias)
            return out, same_bits(out, linear(x, weight, bias))

        if compiled is None or weight.device.type != "cpu":
            return twice
        same = compiled.linear_same

        def fast(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            out, other = linear(x, weight, bias), linear(x, weight, bias)
            if not (out.is_cpu and out.is_contiguous()):
                return out, same_bits(out, other)
            return out, same(out.data_ptr(), other.data_ptr(), out.nbytes)

        return fast

    def judge(self, weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
        other = linear(x, weights.weight, weights.bias)
        differ = (_words(out) != _words(other)).nonzero()
        if not len(differ):
            return Judgement(True, found="two runs differed, and a third agrees with the first")
        row, column = differ[0].tolist()
        return Judgement(
            True, found=f"two runs differ in {len(differ)} results, first in row {row}, output {column}"
        )

    def least(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), dtype=torch.float64)

    def cost(self, shape: Shape) -> tuple[int, int]:
        m, n = shape.rows, shape.outputs
        return shape.flops, shape.bytes + 2 * shape.itemsize * m * n

    def memory(self, weights: Weights) -> int:
        return 0


class Tiled:
    """A product of ours whose tiles are summed in registers: compiled for float32 on the CPU, Triton on GPUs.

    Its results differ from PyTorch's in their last bits: sums run in another order.
    """

    name = "tile"

    def unfit(self, weights: Weights) -> str:
        if weights.weight.is_cuda:
            return triton_schemes.unfit(weights)
        if weights.fast is not None:
            return ""
        return why_not() if kernels() is None else "the compiled product is for float32 on the CPU"

    def prepare(self, weights: Weights) -> Run:
        if weights.weight.is_cuda and not triton_schemes.unfit(weights):
            return _unless_autocast(triton_schemes.tile(weights), Summed("row").prepare(weights))
        if weights.fast is None:
            raise UsageError(f"the tile scheme cannot check this layer: {self.unfit(weights)}")
        address, kernel = weights.fast.address, kernels().linear_tiles  # type: ignore[union-attr]
        single, inputs, outputs = torch.float32, weights.inputs, weights.outputs
        other, autocast = Summed("row").prepare(weights), torch.is_autocast_enabled

        def fast(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            # A product of ours has no gradient, knows nothing of autocast, and reads memory as it is.
            if not (x.is_contiguous() and x.dtype is single and x.is_cpu) or x.requires_grad or x.is_neg():
                return other(x)
            if autocast("cpu"):
                return other(x)
            rows = x.shape[0]
            out = x.new_empty((rows, outputs))
            return out, not kernel(address, rows, x.data_ptr(), inputs, out.data_ptr(), outputs)

        return fast

    def judge(self, weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
        return judging.rows(weights, x, out)

    def least(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        return row_least(weights, x)

    def cost(self, shape: Shape) -> tuple[int, int]:
        return shape.rows * (4 * shape.inputs + shape.outputs), 0

    def memory(self, weights: Weights) -> int:
        fast = weights.fast
        return 0 if fast is None else fast.nbytes + fast.packed.nbytes


def _unless_autocast(fused: Run, other: Run) -> Run:
    """A product of ours knows nothing of autocast: PyTorch's is taken where that is on."""
    return lambda x: other(x) if torch.is_autocast_enabled("cuda") else fused(x)


def row_least(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Twice the bound of each row, the quick check's where it is compiled.

    Args:
        weights: prepared.
        x: (m, k).
    """
    least = detectable(x, weights.checksum)
    if weights.fast is None:
        return least
    size = x.detach().double().abs() @ weights.checksum.sizes + weights.checksum.bias_size
    return torch.maximum(least, 2 * (weights.fast.scale * size + weights.fast.floor))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN is like itself.

    Example:
        >>> nan = torch.tensor([float("nan")])
        >>> same_bits(nan, nan.clone()), same_bits(torch.zeros(1), -torch.zeros(1))
        (True, False)
    """
    return bool(torch.equal(_words(one), _words(other)))


def _words(values: torch.Tensor) -> torch.Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.detach().view(widths[values.element_size()])


_ALL: tuple[Scheme, ...] = (Unchecked(), Summed("global"), Summed("row"), Tiled(), Replicated())

# Every scheme by its name; `none` checks nothing.
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


def chosen(names: tuple[str, ...] | None) -> tuple[Scheme, ...]:
    """Schemes by name, `none` apart; None for all of them.

    Raises:
        UsageError: an unknown name, or none at all.

    Example:
        >>> [scheme.name for scheme in chosen(None)]
        ['global', 'row', 'tile', 'replication']
    """
    known = [name for name in SCHEMES if name != "none"]
    asked = tuple(known) if names is None else names
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        what = f"{unknown[0]!r} is no scheme" if unknown else "no scheme is left to choose from"
        raise UsageError(f"{what}; there are: {', '.join(known)}")
    return tuple(SCHEMES[name] for name in asked)
