"""A quantised layer as oneDNN wants it, with its checksum: beside the packed weight, or in columns of it.

**beside**: the row sums are kept as a vector of 16-bit digits, or of residues, and multiplied with each row
of the input by the pass that checks. The product is that of the stock operator. **columns**: their 8-bit
digits, or residues, are further columns of the packed weight, and the product computes them along; the width
is a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.processor import SAFE, saturates
from ckptflip.protect.gemm.quantised import Quantised
from ckptflip.protect.gemm.reading import NotTakenError
from ckptflip.protect.gemm.sums import EXACT, MODULUS, digits, halves, residues, row_sums, widest
from ckptflip.protect.native import kernels

SCHEMES = ("exact", "mod127")
PLACEMENTS = ("beside", "columns")
_MULTIPLE = 16
# Accumulators are of 32 bits, with a sign.
_TOO_WIDE = 1 << 31
# The operator itself: what stands around it only calls it, and takes longer than the check of small rows.
_OPERATOR, _FLOAT = torch.ops.onednn.qlinear_pointwise.default._op, torch.float32
_ONE, _NONE = torch.ones(1), torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """What one product and its check need; the plan holds addresses of the tensors here, which never change.

    Attributes:
        layer: the numbers it was made of.
        scheme, placement: how it is checked.
        weight: the packed weight, opaque.
        width: columns of the product: n, or n with those of the checksum, padded.
        sums: int64, (k,): the row sums.
        columns: int8, (d, k): the columns of the checksum, or None.
        widest: the largest accumulator that any input can make; below 2^24 all are exact in float32.
        zeros, scales, shifts: what turns accumulators into results: int32, float32, float32, of shape (n,).
        held: further tensors that the plan points to.
        plan, compiled: of the compiled pass, and the pass itself; None without the extension.
    """

    layer: Quantised
    scheme: str
    placement: str
    weight: torch.Tensor
    width: int
    sums: torch.Tensor
    columns: torch.Tensor | None
    widest: int
    zeros: torch.Tensor | None
    scales: torch.Tensor
    shifts: torch.Tensor
    held: tuple[torch.Tensor | None, ...]
    plan: Any
    compiled: Any

    @property
    def used(self) -> int:
        """Columns of the product that mean something: n, and those of the checksum; the rest fills it up."""
        return self.layer.outputs + (0 if self.columns is None else len(self.columns))

    @property
    def constants(self) -> tuple[torch.Tensor | None, ...]:
        """The numbers that the pass reads, apart from accumulators and codes."""
        return (self.zeros, self.scales, self.shifts, *self.held)

    @property
    def matrix(self) -> torch.Tensor:
        """What was packed, int8 of shape (width, k): the weight, and below it the columns of the checksum."""
        return _matrix(self.layer.weight, self.columns, self.width)


def pack(layer: Quantised, *, scheme: str = "exact", placement: str | None = None) -> Packed:
    """Pack a layer with its checksum, once, while its weight is known to be sound.

    Args:
        layer: its numbers.
        scheme: `exact`, or `mod127`, that of arXiv 2103.00130, which has its checksum in columns.
        placement: of the checksum, `beside` or `columns`; None: beside.

    Raises:
        UsageError: there is no such scheme or placement.
        NotTakenError: sums of 32 bits are too narrow for rows so long (255·Σ|w| of an output is 2^31 or
            more), or this processor would compute a wrong product of these weights (see `processor`).

    Example:
        >>> layer = Quantised(torch.ones(20, 8, dtype=torch.int8), torch.ones(1))
        >>> pack(layer, placement="columns").width, pack(layer).width
        (32, 20)
    """
    placement = placement or PLACEMENTS[0]
    if scheme not in SCHEMES or placement not in PLACEMENTS:
        raise UsageError(
            f"there is no check {scheme!r} with its checksum {placement!r}: schemes are "
            f"{' and '.join(SCHEMES)}, placements {' and '.join(PLACEMENTS)}"
        )
    sums = row_sums(layer.weight)
    columns, width = None, layer.outputs
    if placement == "columns":
        columns = residues(sums) if scheme == "mod127" else digits(sums)
        width = -(-(width + len(columns)) // _MULTIPLE) * _MULTIPLE
    matrix = _matrix(layer.weight, columns, width)
    _fitting(matrix, placement)
    weight = torch.ops.onednn.qlinear_prepack(matrix, [1, layer.inputs])
    return _planned(layer, scheme, placement, weight, width, sums, columns)


def _fitting(matrix: torch.Tensor, placement: str) -> None:
    """Raise NotTakenError where a product of these numbers would be wrong."""
    remedy = "placement='beside', or " if placement == "columns" else ""
    # Codes less their zero point are from -255 to 255 too.
    if 255 * 128 * matrix.shape[1] >= _TOO_WIDE <= widest(matrix):
        raise NotTakenError(
            f"its sums of products may leave 32 bits: 255·Σ|w| of an output is {widest(matrix):,}, and must "
            f"be below {_TOO_WIDE:,}: use {remedy}several layers of fewer inputs than {matrix.shape[1]:,}"
        )
    low, high = (int(bound) for bound in torch.aminmax(matrix))
    if saturates() and not -SAFE <= low <= high <= SAFE:
        raise NotTakenError(
            f"this processor adds products of 8 bits in 16, too narrow for weights from {low} to {high}: "
            f"use {remedy}weights from -{SAFE} to {SAFE} (quantise() makes such ones here)"
        )


def _matrix(weight: torch.Tensor, columns: torch.Tensor | None, width: int) -> torch.Tensor:
    if columns is None:
        return weight.contiguous()
    matrix = weight.new_zeros(width, weight.shape[1])
    matrix[: len(weight)] = weight
    matrix[len(weight) : len(weight) + len(columns)] = columns
    return matrix


def _planned(
    layer: Quantised,
    scheme: str,
    placement: str,
    weight: torch.Tensor,
    width: int,
    sums: torch.Tensor,
    columns: torch.Tensor | None,
) -> Packed:
    n = layer.outputs
    zeros = layer.weight.sum(1, dtype=torch.int32)
    if layer.x_scale is not None:
        zeros = zeros * layer.x_zero
    scales = layer.weight_scale.expand(n).contiguous()
    # Adding -0.0 changes no number, not even a zero's sign.
    shifts = torch.full((n,), -0.0) if layer.bias is None else layer.bias.clone()
    shifted = zeros if layer.x_scale is None or layer.x_zero else None
    low, high = halves(residues(sums)[0].long() if scheme == "mod127" else sums)
    each = len(layer.weight_scale) > 1 or layer.bias is not None or (layer.relu and layer.out_scale is None)
    native, plan = kernels(), None
    if native is not None:
        plan = native.gemm_plan(
            n,
            layer.inputs,
            MODULUS if scheme == "mod127" else 0,
            0 if columns is None else len(columns),
            low.data_ptr(),
            0 if high is None else high.data_ptr(),
            0 if shifted is None else shifted.data_ptr(),
            scales.data_ptr(),
            shifts.data_ptr(),
            int(each),
            int(layer.out_scale is not None),
            layer.x_scale or 1.0,
            0.0 if layer.relu and layer.out_scale is None else -float("inf"),
            1.0 if layer.out_scale is None else 1 / layer.out_scale,
            layer.out_zero,
            layer.out_zero if layer.relu else 0,
        )
    bound = widest(layer.weight if columns is None else torch.cat([layer.weight, columns]))
    held = (low, high)
    compiled = None if native is None else native.gemm_rows
    numbers = (shifted, scales, shifts)
    return Packed(
        layer, scheme, placement, weight, width, sums, columns, bound, *numbers, held, plan, compiled
    )


def product(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """The accumulators of a product, exact while below 2^24: float32 of shape (m, width).

    Args:
        packed: the layer.
        x: codes, uint8 of shape (m, k).

    Example:
        >>> layer = Quantised(torch.tensor([[1, 2]], dtype=torch.int8), torch.ones(1))
        >>> product(pack(layer), torch.tensor([[3, 4]], dtype=torch.uint8))
        tensor([[11.]])
    """
    return _OPERATOR(x, 1.0, 0, packed.weight, _ONE, _NONE, None, 1.0, 0, _FLOAT, "none", [], "")


def may_be_wide(packed: Packed) -> bool:
    """Whether a sound product may hold accumulators that float32 rounds."""
    return packed.widest >= EXACT


def largest_scale(packed: Packed) -> float:
    """The largest scale of the input's codes with which float32 holds results, and all on the way to them.

    A result is made as accumulator · scale of the codes · scale of the weight + bias, in this order.

    Example:
        >>> layer = Quantised(torch.ones(1, 4, dtype=torch.int8), torch.full((1,), 0.1))
        >>> f"{largest_scale(pack(layer)):.3g}"
        '3.34e+35'
    """
    layer = packed.layer
    biases = 0.0 if layer.bias is None else float(layer.bias.abs().max())
    room = (float(torch.finfo(torch.float32).max) - biases) * (1 - 2.0**-20)
    # At least 255, so that the input's own range fits too.
    return room / (max(packed.widest, 255) * max(1.0, float(layer.weight_scale.abs().max())))
