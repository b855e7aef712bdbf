"""Layers and batches that checks find hard, and faults in what computes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from ckptflip.protect.intensity import schemes
from ckptflip.protect.intensity.weights import Weights, prepared
from ckptflip.protect.native import kernels

KINDS = ("normal", "positive", "far from zero", "tiny", "huge", "all exponents", "zeros")
COMPILED = (True, False) if kernels() is not None else (False,)
CHECKING = ("global", "row", "tile")


def values(kind: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers of a kind, float32."""
    drawn = np.random.default_rng(seed)
    normal = drawn.standard_normal(shape)
    made = {
        "normal": lambda: normal,
        "positive": lambda: drawn.random(shape),
        "far from zero": lambda: normal + 1000,
        "tiny": lambda: normal * 1e-38,
        "huge": lambda: normal * 1e18,
        "all exponents": lambda: normal * 2.0 ** drawn.integers(-60, 60, shape),
        "zeros": lambda: normal * (drawn.random(shape) < 0.1),
    }[kind]()
    return torch.from_numpy(made.astype(np.float32))


shapes = st.tuples(st.integers(1, 70), st.integers(1, 130), st.integers(1, 130))
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)


def layer(kind: str, n: int, k: int, seed: int, compiled: bool = True, bias: bool = True) -> Weights:
    """A prepared layer, with the compiled kernels or without."""
    weights = prepared(values(kind, (n, k), seed), values(kind, (n,), seed + 1) if bias else None)
    return weights if compiled else replace(weights, fast=None)


def run(name: str, weights: Weights, x: torch.Tensor) -> tuple[torch.Tensor, bool, bool]:
    """What a scheme gives: results, whether the quick check holds, whether a fault was found in the end."""
    scheme = schemes.SCHEMES[name]
    out, holds = scheme.prepare(weights)(x)
    return out, holds, not holds and scheme.judge(weights, x, out).faulty


def fits(name: str, compiled: bool) -> bool:
    """The tile scheme is compiled or not at all."""
    return compiled or name != "tile"


def flipped(value: float, mask: int) -> float:
    """A float32 with some bits flipped."""
    return float((np.float32(value).view(np.uint32) ^ np.uint32(mask)).view(np.float32))
