"""Catalogues and readers to draw faults from, with no file behind them."""

import numpy as np

from ckptflip.bits import lookup
from ckptflip.faults import Tensor
from ckptflip.faults.plan import draw


def tensor(name, shape, dtype="float32", **more):
    return Tensor(name=name, shape=shape, number=lookup(dtype), **more)


# A network in small, with every kind of number a checkpoint may hold.
ZOO = (
    tensor("conv1.weight", (4, 3, 2), layer="conv1", role="weight"),
    tensor("conv1.bias", (1,), layer="conv1", role="bias"),
    tensor("conv10.weight", (2, 5), "float64", layer="conv10", role="weight"),
    tensor("bn.scale", (3,), "float16", layer="bn", role="norm"),
    tensor("fft.kernel", (2, 3), "complex64", layer="fft", role="weight"),
    tensor("embed", (6, 2), "bfloat16", layer="embed", role="embedding", aliases=("head.weight",)),
    tensor("quantised", (5,), "int8", layer="q", role="weight"),
    tensor("packed", (9,), "float4_e2m1fn", layer="q", role="weight"),
    tensor("mask", (7,), "bool", layer="q", role="other"),
    tensor("adam/step", (), "int64", layer="adam", role="counter"),
    tensor("empty", (0, 4), layer="nothing", role="weight"),
)


def ones(tensors):
    """A reader of tensors that hold a word with every second bit set."""

    def read(position, words):
        number = tensors[position].number
        assert np.all(np.diff(words) > 0), "positions are promised ascending, each once"
        pattern = 0x5555_5555_5555_5555 & ((1 << number.part_width) - 1)
        return np.full(words.shape, pattern, number.word_dtype)

    return read


def holding(arrays):
    """A reader of arrays of words, one for each tensor."""
    return lambda position, words: arrays[position][words]


def drawn(policies, tensors=ZOO, seed=0, read=None):
    return draw(policies, tensors, read or ones(tensors), seed)


def bits_hit(plan):
    """Every hit of a plan as (tensor, word, bit)."""
    rows = zip(plan.tensor.tolist(), plan.word.tolist(), plan.hit.tolist(), strict=True)
    return [(t, w, b) for t, w, hit in rows for b in range(64) if hit >> b & 1]
