"""The way back: the bit of a file that a word's bit is in leads to that word and bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.bits import lookup
from ckptflip.checkpoints import opened
from ckptflip.checkpoints.extents import Mapped, in_piece
from ckptflip.checkpoints.pieces import Layout, Piece, contiguous, located, strides_of
from ckptflip.loaders import PROBES, Probe

DTYPES = ("float32", ">float32", "float16", "complex64", ">uint8", "int4", "float6_e2m3fn")


def places(layout: Layout) -> list[tuple[Piece, int, int]]:
    """Piece, word and the word's first bit in the file, for all words."""
    words = np.arange(int(np.prod(layout.dims)), dtype=np.int64)
    found = []
    for piece, rows, bits in located(layout, words):
        found += [(piece, int(w), int(b)) for w, b in zip(words[rows], bits, strict=True)]
    return found


def address(layout: Layout, start: int, bit: int) -> int:
    """Where a bit of a word lies, by hand."""
    if layout.bits or layout.order == "<":
        return start + bit
    return start + 8 * (layout.number.word_size - 1 - bit // 8) + bit % 8


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.permutations(range(3)),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_of_boxes(shape: list[int], dtype: str, order: list[int], backwards: list[bool]) -> None:
    """Transposed and reversed views too, of whole and of packed words."""
    number = lookup(dtype.removeprefix(">"))
    packed = {"int4": 4, "float6_e2m3fn": 6}.get(dtype, 0)
    plain = contiguous(0, 40, number, tuple(shape), dtype[0] if dtype[0] == ">" else "<", packed)
    axes = [a for a in order if a < len(plain.dims)] + list(range(3, len(plain.dims)))
    strides = list(plain.pieces[0].strides)
    laid = [plain.dims[a] for a in axes]
    for a, stride in zip(axes, strides_of(tuple(laid), plain.width), strict=True):
        strides[a] = stride
    offset = 40
    for a in range(len(strides) if not packed else 0):
        if backwards[a % 3]:
            offset += (plain.dims[a] - 1) * strides[a] // 8
            strides[a] = -strides[a]
    piece = Piece(0, offset, plain.dims, tuple(strides))
    layout = Layout(plain.dims, (piece,), number, plain.order, plain.bits)
    find = in_piece(layout, piece)
    for _, word, start in places(layout):
        bits = np.arange(layout.width)
        at = np.array([address(layout, start, int(b)) for b in bits], np.int64)
        rows = np.argsort(at)
        held = find(at[rows])
        assert held.rows.tolist() == list(range(layout.width))
        assert set(held.words.tolist()) == {word}
        assert held.bits.tolist() == bits[rows].tolist()
    low, high = piece.span(layout.width)
    outside = np.array([low * 8 - 1, high * 8 + 64], np.int64)
    assert not find(outside).rows.size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_of_formats(probe: Probe, written: Callable[[Probe], Path]) -> None:
    """Every tensor of every format has its ranges, inside its files."""
    if probe.missing():
        pytest.skip(f"{probe.missing()} is not installed")
    with opened(written(probe)) as target:
        assert isinstance(target, Mapped)
        extents = list(target.extents())
        sizes = [f.stat().st_size for f in target.files]
        assert all(0 <= e.start < e.end <= sizes[e.file] for e in extents)
        assert all((e.locate is None) == bool(e.part) for e in extents)
        named = {e.tensor for e in extents}
        if probe.patched:
            assert named == {i for i, t in enumerate(target.tensors) if t.words}
