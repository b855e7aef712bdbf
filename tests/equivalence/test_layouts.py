"""Index maps: one to one, there and back, and the same as numpy's transpositions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.bits import lookup
from ckptflip.equivalence import layouts
from ckptflip.equivalence.fields import field_masks
from ckptflip.equivalence.layouts import MisfitError

side = st.integers(1, 5)


def numbered(shape):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


@st.composite
def kernels(draw):
    """A kernel with its outputs first, its counterpart's shape, how to lay it, and numpy's own way."""
    kind = draw(st.sampled_from(["dense", "flat", "conv", "depthwise", "gru", "lstm"]))
    if kind == "conv":
        outputs, inputs, *spatial = draw(st.lists(side, min_size=3, max_size=5))
        axes = (*range(2, 2 + len(spatial)), 1, 0)
        return (outputs, inputs, *spatial), {}, lambda a: a.transpose(axes)
    if kind == "depthwise":
        channels, each, *spatial = draw(st.lists(side, min_size=3, max_size=5))
        axes = (*range(2, 2 + len(spatial)), 0, 1)
        return (
            (channels * each, 1, *spatial),
            {},
            lambda a: a.reshape(channels, each, *spatial).transpose(axes),
        )
    outputs, inputs = draw(side), draw(side)
    if kind == "flat":
        height, width = draw(side), draw(side)
        shape = (outputs, inputs * height * width)
        return (
            shape,
            {"channels": inputs},
            lambda a: a.reshape(outputs, inputs, height, width).transpose(2, 3, 1, 0).reshape(-1, outputs),
        )
    if kind == "gru":
        return (
            (3 * outputs, inputs),
            {"gates": 3},
            lambda a: np.concatenate([a[outputs : 2 * outputs], a[:outputs], a[2 * outputs :]]).T,
        )
    return (4 * outputs, inputs), {"gates": 4} if kind == "lstm" else {}, lambda a: a.T


@given(kernels())
def test_maps_are_those_of_numpy_and_lead_back(case):
    shape, options, expected = case
    array = numbered(shape)
    target = expected(array).shape
    layout = layouts.between(shape, target, **options)
    assert (layout.source, layout.target) == (shape, target)
    assert np.array_equal(layout.moved(array), expected(array))
    there = layout.forward(array.reshape(-1))
    assert sorted(there.tolist()) == list(range(array.size))
    back = layout.inverse()
    assert np.array_equal(back.forward(there), array.reshape(-1))
    assert np.array_equal(back.moved(layout.moved(array)), array)
    assert back.inverse() == layout


@given(st.permutations("ABCD"), st.lists(side, min_size=4, max_size=4))
def test_any_order_of_axes_can_be_named(order, shape):
    layout = layouts.permuted(f"ABCD->{''.join(order)}", tuple(shape))
    array = numbered(tuple(shape))
    assert np.array_equal(layout.moved(array), array.transpose(["ABCD".index(letter) for letter in order]))


@pytest.mark.parametrize(("name", "shape"), [
    ("OIHW", (1, 1, 1, 1)), ("OI->IOO", (2, 2)), ("OO->OO", (2, 2)), ("OI->IH", (2, 2)),
    ("OI->IO", (2, 2, 2)), ("->", ()), ("1 2->2 1", (2, 2, 2)),
])  # fmt: skip
def test_layouts_that_are_none_are_refused(name, shape):
    with pytest.raises(MisfitError):
        layouts.permuted(name, shape)


@pytest.mark.parametrize(("source", "target", "options"), [
    ((4, 6), (6, 5), {}), ((4, 6), (6, 4), {"channels": 4}), ((4, 6), (6, 4), {"gates": 3}),
    ((4, 3, 5, 5), (5, 5, 3, 3), {}), ((4, 1, 5, 5), (5, 5, 2, 4), {}), ((4, 6), (6, 4, 1), {}),
    ((4,), (4,), {}),
])  # fmt: skip
def test_kernels_that_do_not_go_together_are_refused(source, target, options):
    with pytest.raises(MisfitError):
        layouts.between(source, target, **options)


FLOATS = ("float64", "float32", "float16", "bfloat16")


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 63))
def test_bits_keep_their_field_and_their_distance_from_its_top(one, other, bit):
    here, there = lookup(one), lookup(other)
    bit %= here.part_width
    mask = np.array([1 << bit], np.uint64)
    fields = ("sign", "critical", "exponent", "mantissa")
    field = next(f for f in fields if here.field(f) >> bit & 1)
    top = here.field(field).bit_length() - 1 - bit
    if top >= there.field(field).bit_count() and field != "exponent":
        with pytest.raises(MisfitError, match=field):
            field_masks(mask, here, there)
        return
    if field == "exponent" and top >= there.exponent:
        with pytest.raises(MisfitError, match="exponent"):
            field_masks(mask, here, there)
        return
    moved = int(field_masks(mask, here, there)[0])
    assert moved.bit_count() == 1
    assert moved & there.field(field)
    assert there.field(field).bit_length() - moved.bit_length() == top
    assert field_masks(np.array([moved], np.uint64), there, here)[0] == mask[0]


def test_bits_of_integers_have_no_field():
    with pytest.raises(MisfitError, match="int32"):
        field_masks(np.array([1], np.uint64), lookup("int32"), lookup("float32"))
