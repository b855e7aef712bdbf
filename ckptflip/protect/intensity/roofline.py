"""Arithmetic intensity of a layer against the balance of a device: does it wait for memory or for arithmetic?

Source: S. Williams, A. Waterman, D. Patterson, Roofline, CACM 52 (2009), as used by Kosaian, Rashmi (2021).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_SIDE = 1024  # of the square product that measures arithmetic
_BYTES = 64 << 20  # of the copy that measures memory: beyond most caches
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """The matrix product of a linear layer: (rows × inputs) by (inputs × outputs).

    Attributes:
        rows: m.
        outputs: n.
        inputs: k.
        itemsize: bytes of an element.
    """

    rows: int
    outputs: int
    inputs: int
    itemsize: int = 4

    @property
    def flops(self) -> int:
        """Multiplications and additions, 2mnk."""
        return 2 * self.rows * self.outputs * self.inputs

    @property
    def bytes(self) -> int:
        """What is read and written once: mn + mk + kn elements."""
        m, n, k = self.rows, self.outputs, self.inputs
        return self.itemsize * (m * n + m * k + k * n)

    @property
    def intensity(self) -> float:
        """FLOP per byte.

        Example:
            >>> round(Shape(1, 512, 512).intensity, 2)
            0.5
        """
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Balance:
    """What a device can do at best, as measured.

    Attributes:
        flops: floating point operations per second, in a large product.
        bandwidth: bytes read and written per second, in a large copy.
    """

    flops: float
    bandwidth: float

    @property
    def intensity(self) -> float:
        """FLOP per byte at which arithmetic and memory take the same time.

        Example:
            >>> Balance(1e11, 1e10).intensity
            10.0
        """
        return self.flops / self.bandwidth


def measured_balance(device: torch.device, dtype: torch.dtype) -> Balance:
    """Measure a device with the threads PyTorch has now; takes a quarter of a second on one core.

    Args:
        device: where.
        dtype: of the product; the copy is of bytes.
    """
    square = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    into = torch.empty_like(square)
    source = torch.ones(_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        product = _seconds(lambda: torch.mm(square, square, out=into), device)
        copy = _seconds(lambda: target.copy_(source), device)
    return Balance(2 * _SIDE**3 / product, 2 * _BYTES / copy)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    taken = []
    for _ in range(_ROUNDS):
        settled(device)
        began = time.perf_counter()
        call()
        settled(device)
        taken.append(time.perf_counter() - began)
    return median(taken)


def settled(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
