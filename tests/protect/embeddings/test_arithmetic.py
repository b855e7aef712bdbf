"""One bit that goes wrong in a register of the kernel: the bags whose sums it alters are called."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from ckptflip.errors import UsageError
from ckptflip.protect.embeddings import LAYOUTS, look_up, protect_table
from ckptflip.protect.embeddings.look_up import ARITHMETIC, SUM, TAG, ArithmeticFault, bags_of
from ckptflip.protect.native import kernels
from ckptflip.recsys.tables import quantise

WAYS = (0, 1, 2)
BITS = range(32)
STEPS = (0, 3, 6)


class Kernel:
    """Two bags of 7 look-ups of a sound table, in one way, and what comes out without a fault."""

    def __init__(self, layout, dim, way, monkeypatch, weighted=False, mean=False):
        if kernels() is None:
            pytest.skip("the extension was not built")
        monkeypatch.setattr(look_up, "_ISA", way)
        random = np.random.default_rng(dim)
        values = random.standard_normal((20, dim)).astype(np.float32)
        floats = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(layout)
        stored = torch.from_numpy(quantise(values, layout) if floats is None else values)
        stored = stored if floats is None else stored.to(floats)
        self.row, self.mean = look_up.Row(layout, dim), mean
        self.table = protect_table(stored, layout if floats is not None else f"{layout}:{dim}")
        weights = torch.from_numpy(random.random((2, 7)).astype(np.float32)) if weighted else None
        self.bags = bags_of(torch.from_numpy(random.integers(0, 20, (2, 7))), None, weights, False, "t")
        self.clean = self.call(None).values
        # In AVX-512 both additions take a value from the same register.
        self.shared = way == 2 and kernels().isa() == "avx512"

    def call(self, fault):
        plan = self.row.plan(self.table.shape[0])
        return look_up.look_up(self.table, self.row, plan, self.bags, mean=self.mean, fault=fault)

    def effective(self, fault):
        """Whether the sums of bag 1 come out otherwise, and the verdict; bag 0 is as ever."""
        found = self.call(fault)
        assert found.verdict[0] == 0 and torch.equal(found.values[0], self.clean[0])
        assert found.unsound == (found.verdict[1] != 0)
        same = np.array_equal(found.values[1].numpy(), self.clean[1].numpy(), equal_nan=True)
        return not same, int(found.verdict[1])


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_flip_that_alters_a_sum_is_called_and_no_other(way, layout, weighted, monkeypatch):
    kernel = Kernel(layout, 81, way, monkeypatch, weighted)
    parts = ["sum", "scale", *(["bias"] if layout.startswith("int") else [])]
    for part, steps_places in (
        (part, list(product(STEPS, (0, 17, 63, 64, 80) if part == "sum" else (0,)))) for part in parts
    ):
        called = 0
        for (step, place), bit in product(steps_places, BITS):
            effective, verdict = kernel.effective(ArithmeticFault(1, step, part, place, bit))
            assert verdict == (ARITHMETIC if effective else 0), (part, step, place, bit)
            called += effective
        assert called > len(steps_places) * len(BITS) // 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_flip_in_what_sums_are_compared_with_alters_none_and_is_called(way, layout, monkeypatch):
    kernel = Kernel(layout, 81, way, monkeypatch)
    verdicts = [
        kernel.effective(ArithmeticFault(1, step, "twin", place, bit))
        for step, place, bit in product(STEPS, (0, 64), BITS)
    ]
    assert {effective for effective, _ in verdicts} == {False}
    assert {verdict for _, verdict in verdicts} <= {0, ARITHMETIC}
    # After the last look-up nothing rounds a flip away.
    assert {verdict for _, verdict in verdicts[-2 * len(BITS) :]} == {ARITHMETIC}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_flip_in_the_factor_of_a_mean_is_called(way, layout, monkeypatch):
    kernel = Kernel(layout, 33, way, monkeypatch, mean=True)
    for bit in BITS:
        assert kernel.effective(ArithmeticFault(1, 0, "mean", 0, bit)) == (True, ARITHMETIC)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_flip_in_an_unpacked_value_is_called_where_values_are_unpacked_twice(way, layout, monkeypatch):
    kernel = Kernel(layout, 33, way, monkeypatch)
    effects = 0
    for step, place, bit in product(STEPS, (0, 31, 32), BITS):
        effective, verdict = kernel.effective(ArithmeticFault(1, step, "value", place, bit))
        assert verdict == (ARITHMETIC if effective and not kernel.shared else 0)
        effects += effective
    assert effects > 100


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_flip_in_the_checks_own_sums_is_called_though_it_alters_no_output(way, layout, monkeypatch):
    kernel = Kernel(layout, 81, way, monkeypatch)
    coded = layout.startswith("int")
    lanes = (0, 5, 15, 16) if coded and kernel.shared else (0,)
    for step, lane, bit in product(STEPS, lanes, BITS):
        assert kernel.effective(ArithmeticFault(1, step, "plain", lane, bit)) == (False, SUM)
        tag = TAG if coded and bit < 16 else 0  # a tag has 16 bits
        assert kernel.effective(ArithmeticFault(1, step, "weighted", lane, bit)) == (False, tag)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_loops_that_can_have_a_fault_give_the_same_without_one(way, layout, monkeypatch):
    kernel = Kernel(layout, 128, way, monkeypatch, weighted=True)
    found = kernel.call(ArithmeticFault(bag=2, step=0, part="sum"))
    assert found.unsound == 0 and torch.equal(found.values, kernel.clean)


def test_other_faults_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="bits 0 to 31"):
        ArithmeticFault(0, 0, "sum", 0, 32)
    with pytest.raises(UsageError, match="no bit 0 of 'total'"):
        ArithmeticFault(0, 0, "total")
    kernel = Kernel("int8", 8, 0, monkeypatch)
    monkeypatch.setattr(look_up, "kernels", lambda: None)
    with pytest.raises(UsageError, match="fault in the kernel's arithmetic"):
        kernel.call(ArithmeticFault(0, 0, "sum"))
