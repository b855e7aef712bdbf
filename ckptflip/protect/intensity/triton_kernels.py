"""Linear layers on NVIDIA GPUs whose product checks itself: Triton kernels, one verdict word for each tile.

`tiled`: each program computes a tile of x Wᵀ + b and, from the fragments of x and W that it has loaded for
that, what the rows of its tile must sum to: W's fragment is summed over the tile's outputs and multiplied
by x's, the one-sided check of Kosaian and Rashmi (SC '21). `totalled`: the same product with the sum of the
results of each tile, taken in the epilogue. Both run on the CPU with ``TRITON_INTERPRET=1``, for tests.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # this module is then of no use, but can be read
    triton = tl = None

jit = triton.jit if triton else lambda function: function


@jit
def _tile(
    x, w, bias, out, verdicts, sums_out, rows, outputs, inputs, scale, floor,
    fault_row, fault_column, fault,
    HAS_BIAS: tl.constexpr, CHECK: tl.constexpr, FAULT: tl.constexpr,  # noqa: N803
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    wanted = tl.zeros((M,), tl.float32)
    size = tl.zeros((M,), tl.float32)
    for first in range(0, inputs, K):
        at = first + tl.arange(0, K)
        a = tl.load(
            x + row[:, None].to(tl.int64) * inputs + at[None, :],
            mask=(row[:, None] < rows) & (at[None, :] < inputs), other=0.0,
        )  # fmt: skip
        b = tl.load(
            w + column[None, :].to(tl.int64) * inputs + at[:, None],
            mask=(column[None, :] < outputs) & (at[:, None] < inputs), other=0.0,
        )  # fmt: skip
        acc += tl.dot(a, b, input_precision="ieee")
        if CHECK:
            wide, weights = a.to(tl.float32), b.to(tl.float32)
            wanted += tl.sum(wide * tl.sum(weights, 1)[None, :], 1)
            size += tl.sum(tl.abs(wide) * tl.sum(tl.abs(weights), 1)[None, :], 1)
    if FAULT:
        hit = (row[:, None] == fault_row) & (column[None, :] == fault_column)
        acc += tl.where(hit, fault, 0.0)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
        acc += shift[None, :]
        if CHECK:
            wanted += tl.sum(shift, 0)
            size += tl.sum(tl.abs(shift), 0)
    inside = (row[:, None] < rows) & (column[None, :] < outputs)
    summed = tl.sum(tl.where(inside, acc, 0.0), 1)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if CHECK:
        holds = tl.abs(summed - wanted) <= scale * size + floor
        suspects = tl.sum(tl.where((row < rows) & (holds == 0), 1, 0), 0)
        tl.store(verdicts + tile, suspects)
    else:
        tl.store(sums_out + tile, tl.sum(tl.where(row < rows, summed, 0.0), 0))
    target = out + row[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def _launch(x, weight, bias, check, scale, floor, blocks, fault=None):
    (rows, inputs), outputs = x.shape, weight.shape[0]
    m, n, k = blocks
    grid = (triton.cdiv(rows, m), triton.cdiv(outputs, n))
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    verdicts = torch.zeros(grid[0] * grid[1], dtype=torch.int32, device=x.device)
    sums = torch.zeros(grid[0] * grid[1], dtype=torch.float32, device=x.device)
    if rows and outputs:
        _tile[grid](
            x, weight, weight if bias is None else bias, out, verdicts, sums,
            rows, outputs, inputs, scale, floor, *(fault or (-1, -1, 0.0)),
            HAS_BIAS=bias is not None, CHECK=check, FAULT=fault is not None, M=m, N=n, K=k,
        )  # fmt: skip
    return out, verdicts if check else sums


def tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    floor: float,
    blocks: tuple[int, int, int] = (32, 64, 32),
    fault: tuple[int, int, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x Wᵀ + b`` and, for each tile, how many of its rows are suspect, int32 on the device.

    Args:
        x: (m, k), contiguous.
        weight: (n, k), contiguous.
        bias: (n,) or None.
        scale, floor: a row is suspect unless |Σ y - wanted| ≤ scale · magnitude + floor.
        blocks: rows, outputs and inputs of a tile; powers of two from 16 on.
        fault: row, column and amount by which the product is to be wrong, for tests; None for no fault.
    """
    return _launch(x, weight, bias, True, scale, floor, blocks, fault)


def totalled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: tuple[int, int, int] = (32, 64, 32),
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x Wᵀ + b`` and the sum of the results of each tile, float32, taken in the epilogue.

    Args:
        x: (m, k), contiguous.
        weight: (n, k), contiguous.
        bias: (n,) or None.
        blocks: rows, outputs and inputs of a tile; powers of two from 16 on.
    """
    return _launch(x, weight, bias, False, 0.0, 0.0, blocks)
