"""Rates in running models are exact: the binomial law, and the law of asking every bit by itself."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from blocks import Gives, bits
from scipy import stats

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.live import Armed
from ckptflip.live.torch_tensors import TorchTarget

# A true law is rejected about once in a hundred thousand seeds; these are fixed.
LEAST_P = 1e-5


def holding(**tensors):
    made = torch.nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


def binomial_p(counts, n, p):
    """The chi-square p-value of counts against the binomial law, in about eight classes."""
    law = stats.binom(n, p)
    edges = np.unique(law.ppf(np.linspace(0, 1, 9)[1:-1]))
    found = np.bincount(np.searchsorted(edges, counts), minlength=edges.size + 1)
    return stats.chisquare(found, np.diff([0, *law.cdf(edges), 1]) * len(counts)).pvalue


@pytest.mark.parametrize(("ber", "bits_of"), [(1e-3, "all"), (0.02, "exponent"), (0.4, "sign")])
def test_flips_in_weights_are_binomial(ber, bits_of):
    target = TorchTarget(torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 5)))
    words = sum(t.words for t in target.tensors)
    armed = Armed(target, Policy(ber=ber, bits=bits_of))
    counts = [armed.draw(seed).bits_hit for seed in range(3000)]
    assert binomial_p(counts, words * {"all": 32, "exponent": 8, "sign": 1}[bits_of], ber) > LEAST_P


def test_every_bit_of_every_tensor_has_the_same_chance():
    target = TorchTarget(
        holding(a=torch.zeros(5), b=torch.zeros(2, 3, dtype=torch.bfloat16), c=torch.zeros(()))
    )
    armed = Armed(target, Policy(ber=0.05))
    found = {t.name: np.zeros((t.words, 8 * t.number.word_size)) for t in target.tensors}
    for seed in range(4000):
        plan = armed.draw(seed)
        for tensor, rows in plan.by_tensor():
            counted = found[target.tensors[tensor].name]
            lanes = np.arange(counted.shape[1], dtype=np.uint64)
            np.add.at(counted, plan.word[rows], plan.hit[rows, None] >> lanes & np.uint64(1))
    counts = np.concatenate([counted.ravel() for counted in found.values()])
    assert counts.size == 5 * 32 + 6 * 16 + 32
    # Of each bit apart the count is binomial: the variance is that of n p (1 - p), not of the mean alone.
    chi_square = ((counts - 200) ** 2 / (4000 * 0.05 * 0.95)).sum()
    assert LEAST_P < stats.chi2(counts.size).sf(chi_square) < 1 - LEAST_P


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7])
def test_the_same_law_as_asking_every_bit(p):
    """Two words of eight bits: which patterns come out, against a generator that is asked bit by bit."""
    trials = 6_000
    target = TorchTarget(holding(x=torch.zeros(2, dtype=torch.uint8)))
    armed = Armed(target, Policy(ber=p))
    ours = np.zeros(trials, np.int64)
    for seed in range(trials):
        plan = armed.draw(seed)
        ours[seed] = (plan.hit.astype(np.int64) << 8 * plan.word).sum()
    asked = np.random.default_rng(5).random((trials, 16)) < p
    naive = (asked << np.arange(16)).sum(axis=1)
    # Patterns are too many to count each: those of the low byte, of the high byte, and of every other bit.
    for part in (lambda x: x & 255, lambda x: x >> 8, lambda x: [int(f"{v:016b}"[::2], 2) for v in x]):
        table = np.array([np.bincount(part(v), minlength=256) for v in (ours, naive)])
        rare = table.sum(axis=0) < 20
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
        table = table[:, table.sum(axis=0) > 0]
        assert stats.chi2_contingency(table).pvalue > LEAST_P
    chances = np.array([p ** v.bit_count() * (1 - p) ** (8 - v.bit_count()) for v in range(256)])
    found = np.bincount(ours & 255, minlength=256)
    likely = chances * trials >= 5
    found, expected = (np.append(x[likely], x[~likely].sum()) for x in (found, chances * trials))
    assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > LEAST_P


def test_flips_in_activations_are_binomial_in_each_call_and_independent():
    """What is hit in one place says nothing of another place, nor of the next call."""
    model = torch.nn.Sequential(Gives(lambda x: x.clone()), Gives(lambda x: x.clone()))
    seen = []
    for module in model:
        module.register_forward_pre_hook(lambda m, a: seen.append(bits(a[0])))
    x = torch.zeros(25)
    calls, n, p = 1500, 25 * 32, 0.005
    with live.faults(model, Policy(ber=p), seed=3, activations=True) as block:
        ends = [bits(model(x)) for _ in range(calls)]
    first = [int(np.bitwise_count(middle).sum()) for middle in seen[1::2]]
    second = [int(np.bitwise_count(a ^ b).sum()) for a, b in zip(ends, seen[1::2], strict=True)]
    assert binomial_p(first, n, p) > LEAST_P and binomial_p(second, n, p) > LEAST_P
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(calls)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 4.5 / np.sqrt(calls)
    assert [c.effective for c in block.counts()] == [sum(first), sum(second)]


def test_one_fault_falls_on_every_bit_of_an_output_alike():
    model = torch.nn.Sequential(Gives(lambda x: (x.clone(), x[:1].double())))
    hits = np.zeros(2 * 32 + 64)
    with live.faults(model, Policy(), seed=3, activations=True):
        for _ in range(6400):
            single, double = (bits(part) for part in model(torch.zeros(2)))
            words = [int(single[0]), int(single[1]) << 32, int(double[0]) << 64]
            hits[sum(words).bit_length() - 1] += 1
    assert hits.sum() == 6400 and stats.chisquare(hits).pvalue > LEAST_P
