"""Schemes fused into the product on an NVIDIA GPU: checks in each tile, or sums of results in the epilogue.

What is suspect is judged as everywhere, in double precision. The tile's check is made of the weights as
they were loaded: it finds faults of the product, not of weights in memory. Tensor cores add 16-bit products
with truncation; four times the unit round-off of float32 is assumed of them. float32 is multiplied in full
precision ("ieee").
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from ckptflip.protect.gemm.arithmetic import UNIT, gamma
from ckptflip.protect.intensity.weights import Weights

Run = Callable[[torch.Tensor], tuple[torch.Tensor, bool]]
BLOCKS = (32, 64, 32)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unfit(weights: Weights) -> str:
    """Why the fused product cannot check this layer; empty if it can.

    Args:
        weights: prepared.
    """
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'ckptflip[triton]'"
    if weights.weight.dtype not in _DTYPES:
        return f"the fused product is for {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
    return ""


def bound(weights: Weights) -> tuple[float, float]:
    """Scale and floor of the bound: product, sums over a tile, the check's own sums, γ_{2k + 2N + M + 32}.

    Args:
        weights: prepared.
    """
    rows, outputs, _ = BLOCKS
    unit = UNIT[torch.float32] * (1 if weights.weight.dtype is torch.float32 else 4)
    relative = gamma(2 * weights.inputs + 2 * outputs + rows + 32, unit)
    tiny = 2.0**-126
    floor = 2 * weights.checksum.absolute + 4 * tiny * (weights.inputs + weights.outputs + 8)
    return relative * (1 + 2 * relative), floor


def tile(weights: Weights) -> Run:
    """The layer, each row of each tile checked in the kernel.

    Args:
        weights: prepared.
    """
    from ckptflip.protect.intensity.triton_kernels import tiled

    weight, bias, (scale, floor) = weights.weight.detach().contiguous(), weights.bias, bound(weights)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        out, suspects = tiled(x.contiguous(), weight, bias, scale, floor, BLOCKS)
        return out, not bool(suspects.any())

    return run


def total(weights: Weights) -> Run:
    """The layer, with the sum of its results taken in the epilogue and compared with that of its inputs.

    Args:
        weights: prepared.
    """
    from ckptflip.protect.intensity.triton_kernels import totalled

    weight, bias, (scale, floor) = weights.weight.detach().contiguous(), weights.bias, bound(weights)
    checksum = weights.checksum

    def run(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        out, sums = totalled(x.contiguous(), weight, bias, BLOCKS)
        rows = len(x)
        wanted = x.sum(0, dtype=torch.float64) @ checksum.sums + rows * checksum.bias_sum
        size = x.abs().sum(0, dtype=torch.float64) @ checksum.sizes + rows * checksum.bias_size
        residual = (sums.sum(dtype=torch.float64) - wanted).abs()
        return out, bool(residual <= scale * size + rows * floor)

    return run
