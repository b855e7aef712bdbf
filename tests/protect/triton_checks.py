"""Run by test_intensity_triton.py in a process of its own, with Triton's interpreter."""

from __future__ import annotations

import sys

import torch

from ckptflip.protect.intensity import judging
from ckptflip.protect.intensity import triton_schemes as ts
from ckptflip.protect.intensity.triton_kernels import tiled, totalled
from ckptflip.protect.intensity.weights import prepared

SHAPES = [(1, 1, 1), (5, 7, 9), (40, 70, 33), (64, 128, 64)]


def drawn(m, n, k, dtype=torch.float32):
    made = torch.Generator().manual_seed(m)
    x, w, b = (torch.randn(*size, generator=made).to(dtype) for size in ((m, k), (n, k), (n,)))
    return x, prepared(w, b)


def close(out, x, weights):
    expected = torch.nn.functional.linear(x.double(), weights.weight.double(), weights.bias.double())
    assert torch.allclose(
        out.double(), expected, atol=1e-3, rtol=1e-2 if out.dtype is not torch.float32 else 1e-4
    )


def tile():
    """Clean products hold, whatever the shape; the product is the layer's."""
    for shape in SHAPES:
        x, weights = drawn(*shape)
        for scaled in (x, x * 1e15, x * 0, x.abs() + 1000):
            _, holds = ts.tile(weights)(scaled)
            assert holds, shape
        close(ts.tile(weights)(x)[0], x, weights)


def total():
    """The same with sums in the epilogue."""
    for shape in SHAPES:
        x, weights = drawn(*shape)
        out, holds = ts.total(weights)(x)
        assert holds, shape
        close(out, x, weights)
        _, sums = totalled(x, weights.weight, weights.bias)
        assert abs(float(sums.sum()) - float(out.double().sum())) < 1e-2


def fault():
    """A wrong result is found in its tile, and in no other."""
    x, weights = drawn(40, 70, 33)
    scale, floor = ts.bound(weights)
    for row, column, tile in ((0, 0, 0), (31, 63, 0), (5, 64, 1), (39, 2, 2), (39, 69, 3)):
        for amount in (1.0, -1e6, float("inf")):
            wrong = (row, column, amount)
            out, suspects = tiled(x, weights.weight, weights.bias, scale, floor, fault=wrong)
            assert suspects.tolist() == [int(index == tile) for index in range(4)]
            assert judging.rows(weights, x, out).faulty


def weight():
    """Sums taken beforehand tell of damaged weights; those of the damaged fragments do not."""
    x, weights = drawn(40, 70, 33)
    weights.weight[3, 4] += 1000
    assert ts.tile(weights)(x)[1]
    out, holds = ts.total(weights)(x)
    assert not holds and judging.whole(weights, x, out).faulty


def narrow():
    """16-bit floats, summed in float32; NaN is suspect and then no fault."""
    x, weights = drawn(40, 70, 33, torch.float16)
    out, holds = ts.tile(weights)(x)
    assert holds and out.dtype is torch.float16
    close(out, x, weights)
    x[3, 3] = float("nan")
    out, holds = ts.tile(weights)(x)
    judged = judging.rows(weights, x, out)
    assert (holds, judged.faulty, judged.unchecked) == (False, False, True)


if __name__ == "__main__":
    {"tile": tile, "total": total, "fault": fault, "weight": weight, "narrow": narrow}[sys.argv[1]]()
    print("held")
