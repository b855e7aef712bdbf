"""Ranks: the parts of a tensor that some ranks of a distributed run wrote."""

from __future__ import annotations

import numpy as np
import pytest

from ckptflip.bits import lookup
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.faults.catalogue import Shard, Tensor
from ckptflip.faults.plan import draw

NUMBER = lookup("float32")
# Columns 0-2 by rank 0, 3-4 by rank 1, 5-7 by rank 4; and a tensor that rank 0 wrote alone.
TENSORS = [
    Tensor(
        "w",
        (6, 8),
        NUMBER,
        shards=(Shard(0, (0, 0), (6, 3)), Shard(1, (0, 3), (6, 2)), Shard(4, (0, 5), (6, 3))),
    ),
    Tensor("b", (5,), NUMBER, shards=(Shard(0, (0,), (5,)),)),
]


def words(policy: Policy, seed: int = 1) -> list[set[int]]:
    plan = draw(policy, TENSORS, lambda t, w: np.zeros(w.size, np.uint32), seed)
    assert (np.diff(plan.tensor) >= 0).all()
    found = [set(plan.word[plan.tensor == t].tolist()) for t in range(len(TENSORS))]
    for tensor in range(len(TENSORS)):
        assert (np.diff(plan.word[plan.tensor == tensor]) > 0).all()
    return found


def columns(*wanted: int) -> set[int]:
    return {row * 8 + column for row in range(6) for column in wanted}


def test_only_the_parts_of_these_ranks_are_hit():
    assert words(Policy(ranks="1", fraction=1.0)) == [columns(3, 4), set()]
    assert words(Policy(ranks="0-1", fraction=1.0)) == [columns(0, 1, 2, 3, 4), set(range(5))]
    assert words(Policy(ranks="0, 4", fraction=1.0)) == [columns(0, 1, 2, 5, 6, 7), set(range(5))]


def test_together_with_rows_and_slices():
    assert words(Policy(ranks="4", rows="0,5", fraction=1.0)) == [{5, 6, 7, 45, 46, 47}, set()]
    assert words(Policy(ranks="0-1", slice="2,::2", fraction=1.0)) == [{16, 18, 20}, set()]


def test_some_of_all_are_drawn_by_the_seed():
    seen = {
        frozenset(
            r for r, c in ((0, 0), (1, 3), (4, 5)) if c in words(Policy(ranks="2 of 3", fraction=1.0), s)[0]
        )
        for s in range(30)
    }
    assert seen == {frozenset(p) for p in ((0, 1), (0, 4), (1, 4))}
    assert words(Policy(ranks="2 of 3", count=9), 5) == words(Policy(ranks="2 of 3", count=9), 5)


def test_every_bit_of_the_chosen_parts_has_the_same_chance():
    hits = np.zeros(48)
    for seed in range(600):
        for word in words(Policy(ranks="1,4", count=3), seed)[0]:
            hits[word] += 1
    chosen = sorted(columns(3, 4, 5, 6, 7))
    expected = hits.sum() / len(chosen)
    assert hits[chosen].sum() == hits.sum()
    assert ((hits[chosen] - expected) ** 2 / expected).sum() < 59.7  # chi-square, 30 cells, p = 0.001


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("two", UsageError),
        ("3-1", UsageError),
        ("-1", UsageError),
        ("", UsageError),
        ("2", SelectionError),
        ("2 of 4", SelectionError),
        ("0 of 3", SelectionError),
        ("4 of 3", SelectionError),
    ],
)
def test_ranks_that_cannot_be(spec, error):
    with pytest.raises(error, match="rank"):
        words(Policy(ranks=spec))


def test_a_target_without_ranks():
    with pytest.raises(SelectionError, match="does not tell"):
        draw(Policy(ranks="0"), [Tensor("w", (3,), NUMBER)], lambda t, w: np.zeros(w.size, np.uint32), 1)


def test_ranks_that_wrote_nothing_of_what_is_selected():
    with pytest.raises(SelectionError, match="wrote nothing of the selected tensors"):
        words(Policy(ranks="1", tensors=("b",)))
