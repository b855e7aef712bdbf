"""The short ways to one fault give what the long ways give."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.faults.draw import Population
from ckptflip.faults.stream import Stream, philox, philox_one
from ckptflip.live import torch_words
from ckptflip.live.calls import Due, keys_of, seed_of, seeds_of
from ckptflip.live.torch_tensors import TorchTarget


@pytest.mark.parametrize("end", [1, 2, 3, 5, 1000, 2**20 + 1, 2**40, 2**62 + 1])
def test_one_number_is_the_first_of_many_and_the_stream_goes_on_alike(end):
    shift = np.uint64(64 - max((end - 1).bit_length(), 1))
    for seed in range(300):
        one, many = Stream(seed, 3), Stream(seed, 3)
        found = []
        while not found:
            drawn = many.raw(16) >> shift
            found = drawn[drawn < np.uint64(end)].tolist()
        assert one.below(end, 1).tolist() == found[:1]
        assert one.raw(4).tolist() == many.raw(4).tolist()


def test_philox_of_one_counter_and_of_many():
    draws = np.random.default_rng(1).integers(0, 2**32, (50, 6), dtype=np.uint64)
    for row in draws.tolist():
        many = philox(tuple(np.array([word], np.uint64) for word in row[:4]), tuple(row[4:]))
        assert philox_one(tuple(row[:4]), tuple(row[4:])) == tuple(int(word[0]) for word in many)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(count=1, bits="exponent,!critical"),
        Policy(rows="1,3-4"),
        Policy(slice="::2,1"),
        Policy(tensors=("z",)),
        Policy(design="tensor", tensors=("a",)),
    ],
    ids=str,
)
def test_one_flip_is_the_unit_that_the_stream_names(policy):
    model = torch.nn.Module()
    model.register_buffer("a", torch.rand(5, 4))
    model.register_buffer("e", torch.rand(0, 4))
    model.register_buffer("z", torch.rand(6, 2, dtype=torch.complex64))
    target = TorchTarget(model)
    population = Population(policy, target.tensors, target.read)
    assert population.lone
    for seed in range(200):
        unit = Stream(seed).below(population.units, 1)
        ((stratum, _, words, masks),) = population._located(unit)
        expected = (stratum.tensor, int(words[0]), int(masks[0]))
        plan = population.draw(seed)
        assert population.one(seed) == expected
        assert (int(plan.tensor[0]), int(plan.word[0]), int(plan.hit[0])) == expected
        assert (
            plan.before[0] == target.read(stratum.tensor, words)[0]
            and plan.after[0] == plan.before[0] ^ masks[0]
        )


@pytest.mark.parametrize(
    "policy",
    [
        Policy(count=2),
        Policy(ber=0.1),
        Policy(fraction=0.1),
        Policy(fault="set0"),
        Policy(fault="burst:1"),
        Policy(forbid=("nan",)),
        Policy(design="tensor"),
    ],
    ids=str,
)
def test_no_other_draw_is_taken_for_one_flip(policy):
    target = TorchTarget(torch.nn.Linear(2, 2))
    assert not Population(policy, target.tensors, target.read).lone


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_a_word_flipped_by_its_address_is_that_of_the_array(dtype):
    data = torch.arange(96, dtype=torch.uint8).view(dtype)
    number = torch_words.number_of(data)
    count = 96 // number.word_size
    for word in range(count):
        one, other = data.clone(), data.clone()
        mask = 1 << (word % (8 * number.word_size))
        before = torch_words.flip_one(one, number, word, mask)
        at, masks = np.array([word]), np.array([mask], np.uint64)
        assert before == torch_words.read(other, number, at)[0]
        torch_words.xor(other, number, at, masks)
        assert bytes(one.view(torch.uint8).numpy()) == bytes(other.view(torch.uint8).numpy())


def test_seeds_of_many_places_are_those_of_each():
    names = [f"activations/layer{i}" for i in range(40)]
    for seed, call in ((0, 0), (2**64 - 1, 7), (5, 2**33 + 1)):
        assert seeds_of(seed, call, keys_of(names)) == [seed_of(seed, call, name) for name in names]


@pytest.mark.parametrize("calls", [None, 5, [9, 2, 5], range(4, 30, 5), range(29, 3, -5), range(50)])
@pytest.mark.parametrize("every", [None, 1, 3])
def test_the_next_call_that_is_due_is_the_first_that_is(calls, every):
    due = Due(calls, every)
    for call in range(35):
        expected = next((n for n in range(call, 60) if due(n)), float("inf"))
        assert due.next(call) == expected


def test_few_and_many_places_draw_alike():
    """Seeds are worked out together where there are many places, and one by one where there are few."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(40)))

    def hit(names):
        with torch.no_grad(), live.faults(model, Policy(count=2), seed=1, activations=names) as block:
            model(torch.ones(1, 4))
        (record,) = block.records
        return {
            record.header.tensors[tensor].name: record.plan.word[rows].tolist()
            for tensor, rows in record.plan.by_tensor()
        }

    every, few = hit("*"), hit(["3", "33"])
    assert len(every) == 40 and few == {name: every[name] for name in few} and len(few) == 2


def test_a_range_may_be_as_long_as_any():
    assert Due(range(10**15), every=7).next(10**14) == next(
        n for n in range(10**14, 10**15) if (n + 1) % 7 == 0
    )
    assert Due(range(0, 10**15, 2)).next(10**14 + 1) == 10**14 + 2
