"""What the schemes keep of a linear layer: weights, checksums, and both as the compiled kernels want them.

The bound is that of `ckptflip.protect.gemm`. The kernels sum in single precision, in lanes; theirs is wider:
with dn and dk the additions that a value of y, and of x, passes through in a lane, the two sums err by γ_{dn}
and γ_{dk}, the steps beside by one each; and γ_a + γ_b ≤ γ_{a+b} (Higham 2002, lemma 3.3). So

    |Σ y - x · S - Σ b| ≤ γ_{k+1+dn+dk+STEPS} (|x| · A + Σ |b|) + floor.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from ckptflip.protect.gemm.arithmetic import UNIT, arithmetic_of, gamma, product_error
from ckptflip.protect.gemm.floats import RowChecksum, row_checksum
from ckptflip.protect.native import kernels

_PADDED = 16  # as in native/intensity.h
# S in single precision, the products with it, lanes added by halves (twice), rows by fours, the difference.
_STEPS = 32
# Sums of rows in double precision, and the bound's own evaluation.
_SLACK = 1 + 2.0**-20
_LAYOUT = struct.Struct("@qqPPddddPPqqq")
_FAULT_AT = _LAYOUT.size - 24
_NO_FAULT = (-1, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A linear layer, prepared.

    Attributes:
        weight: (n, k).
        bias: (n,) or None.
        checksum: sums over the outputs, and the bound.
        fast: the same for the compiled kernels; None where there are none, or not for float32 on the CPU.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    checksum: RowChecksum
    fast: Fast | None

    @property
    def outputs(self) -> int:
        """n."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """k."""
        return int(self.weight.shape[1])


class Fast:
    """A layer in the memory that the compiled kernels read: `struct Layer` of `native/intensity.h`.

    Attributes:
        address: of the structure.
        scale, floor: of the bound.
        packed: the weights in panels, for the product that checks itself.
        nbytes: what all this takes, `packed` apart.
    """

    __slots__ = ("_kept", "address", "floor", "nbytes", "packed", "scale")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, checksum: RowChecksum) -> None:
        # Kernels read memory, not what a view makes of it.
        weight, bias = weight.resolve_neg(), None if bias is None else bias.resolve_neg()
        n, k = weight.shape
        panel, narrow, lanes = kernels().linear_panel()  # type: ignore[union-attr]
        unit = UNIT[torch.float32]
        x_depth, y_depth = k // lanes, n // lanes
        relative = product_error(k + 1 + x_depth + y_depth + _STEPS, arithmetic_of(torch.float32))
        self.scale = relative * (1 + 2 * gamma(x_depth + _STEPS, unit)) * _SLACK
        tiny = torch.finfo(torch.float32).smallest_normal
        self.floor = 2 * checksum.absolute + 4 * tiny * (n + k + 8)
        self.packed = packed(weight, panel, narrow)
        sums, sizes = _padded(checksum.sums.float(), _PADDED), _padded(checksum.single_sizes, _PADDED)
        values = torch.zeros(n) if bias is None else bias.detach()
        shift = _padded(values, max(panel, _PADDED))
        layout = _LAYOUT.pack(
            *(k, n, sums.data_ptr(), sizes.data_ptr(), checksum.bias_sum, checksum.bias_size),
            *(self.scale, self.floor, self.packed.data_ptr(), shift.data_ptr(), *_NO_FAULT),
        )
        memory = torch.frombuffer(bytearray(layout), dtype=torch.uint8)
        self.address = memory.data_ptr()
        self.nbytes = memory.nbytes + sums.nbytes + sizes.nbytes + shift.nbytes
        self._kept = (memory, sums, sizes, shift)

    def suffer(self, row: int, column: int, mask: int) -> None:
        """Have the product that checks itself flip these bits of one of its results; row -1: no fault."""
        fault = torch.frombuffer(bytearray(struct.pack("@qqq", row, column, mask)), dtype=torch.uint8)
        self._kept[0][_FAULT_AT:].copy_(fault)


def prepared(weight: torch.Tensor, bias: torch.Tensor | None) -> Weights:
    """Compute what the schemes need, while the weights are known to be sound.

    Args:
        weight: (n, k) of `torch.nn.functional.linear`, floats.
        bias: (n,) or None.

    Raises:
        UsageError: weights that are not finite, of a dtype without a bound, or rows so long that none holds.

    Example:
        >>> prepared(torch.ones(3, 2), None).checksum.sums.tolist()
        [3.0, 3.0]
    """
    checksum = row_checksum(weight, bias)
    compiled = kernels() is not None and weight.device.type == "cpu" and weight.dtype is torch.float32
    return Weights(
        weight, bias, checksum, Fast(weight, bias, checksum) if compiled and weight.numel() else None
    )


def packed(weight: torch.Tensor, panel: int, narrow: int) -> torch.Tensor:
    """Weights (n, k) in panels of `panel` outputs, zeros beyond n; for few outputs, rows padded to lanes.

    Example:
        >>> packed(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 2, 0).tolist()
        [1.0, 3.0, 2.0, 4.0, 5.0, 0.0, 6.0, 0.0]
    """
    n, k = weight.shape
    if n <= narrow:
        return torch.nn.functional.pad(weight.detach(), (0, -k % _PADDED)).contiguous().reshape(-1)
    whole = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -n % panel))
    return whole.reshape(-1, panel, k).transpose(1, 2).contiguous().reshape(-1)


def _padded(values: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % multiple)).contiguous()
