"""Crops and flips depend on (seed, epoch, index) alone and move pixels exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.errors import UsageError
from ckptflip.vision import augment
from ckptflip.vision.augment import Draws, apply, draw


def one_by_one(images, draws, padding):
    """The definition, with loops: [n, c, h, w]."""
    found = np.zeros_like(images)
    _, _, height, width = images.shape
    for n, image in enumerate(images):
        for y in range(height):
            for x in range(width):
                across = width - 1 - x if draws.mirrored[n] else x
                row, column = y + draws.rows[n] - padding, across + draws.columns[n] - padding
                if 0 <= row < height and 0 <= column < width:
                    found[n, :, y, x] = image[:, row, column]
    return found


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10_000),
    padding=st.integers(0, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
)
def test_it_is_the_definition_in_both_layouts(seed, epoch, padding, height, width):
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(0).normal(size=(6, 2, height, width)).astype(np.float32)
    draws = draw(seed, epoch, range(6), padding=padding)
    expected = one_by_one(images, draws, padding)
    assert np.array_equal(apply(images, draws, padding=padding), expected)
    last = apply(images.transpose(0, 2, 3, 1), draws, padding=padding, channels_last=True)
    assert np.array_equal(last.transpose(0, 3, 1, 2), expected)
    of_torch = augment.apply_torch(torch.from_numpy(images), draws, padding=padding)
    assert np.array_equal(of_torch.numpy(), expected)


@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10_000),
    indices=st.lists(st.integers(0, 2**40), max_size=20),
)
def test_draws_of_a_sample_know_no_others(seed, epoch, indices):
    together = draw(seed, epoch, indices)
    for place, index in enumerate(indices):
        alone = draw(seed, epoch, [index])
        for ours, theirs in zip((together.rows, together.columns, together.mirrored),
                                (alone.rows, alone.columns, alone.mirrored), strict=True):  # fmt: skip
            assert ours[place] == theirs[0]


def test_draws_are_uniform_and_differ_by_seed_and_epoch():
    draws = draw(3, 5, range(90_000))
    cells = np.bincount(draws.rows * 9 + draws.columns, minlength=81)
    # Chi-square with 80 degrees of freedom: beyond 140 once in 40,000 seeds.
    expected = 90_000 / 81
    assert ((cells - expected) ** 2 / expected).sum() < 140
    assert abs(draws.mirrored.mean() - 0.5) < 0.01
    for other in (draw(4, 5, range(90_000)), draw(3, 6, range(90_000))):
        assert abs((other.rows == draws.rows).mean() - 1 / 9) < 0.01
        assert abs((other.mirrored == draws.mirrored).mean() - 0.5) < 0.01


def test_known_draws_stay_the_same_for_ever():
    """A run of today resumes tomorrow with the same crops."""
    draws = draw(7, 2, range(5))
    assert draws.rows.tolist() == [7, 0, 8, 1, 8]
    assert draws.columns.tolist() == [3, 8, 5, 3, 5]
    assert draws.mirrored.tolist() == [False, True, True, True, False]


def test_flips_can_be_left_out_and_bits_survive():
    assert not draw(1, 1, range(100), flip=False).mirrored.any()
    words = np.full((1, 1, 2, 2), 0x7F800001, np.uint32)
    middle = Draws(np.array([1]), np.array([1]), np.array([True]))
    assert apply(words.view(np.float32), middle, padding=1).view(np.uint32).tolist() == words.tolist()


@pytest.mark.parametrize("bad", [(-1, 0, 4), (2**64, 0, 4), (0, -1, 4), (0, 0, -1)])
def test_what_makes_no_sense_is_refused(bad):
    seed, epoch, padding = bad
    with pytest.raises(UsageError):
        draw(seed, epoch, [0], padding=padding)
