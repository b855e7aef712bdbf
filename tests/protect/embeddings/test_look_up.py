"""Look-ups in protected tables: what stock operators give, no false alarm, and every altered row found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.errors import UsageError
from ckptflip.protect.embeddings import LAYOUTS, bad_rows, look_up, protect_table, unprotect_table
from ckptflip.protect.embeddings.look_up import ARITHMETIC, SUM, TAG, bags_of
from ckptflip.protect.native import kernels
from ckptflip.recsys.tables import quantise

# 0 to 2: the kernel's instructions, generic to the widest; -1: without the kernel.
WAYS = (-1, 0, 1, 2)
ROWS = 23


def table_of(layout: str, dim: int, kind: str, random: np.random.Generator) -> torch.Tensor:
    values = random.standard_normal((ROWS, dim)).astype(np.float32)
    scaled = {
        "normal": values,
        "one-signed": np.abs(values),
        "large mean": values + 1000,
        "constant": np.full_like(values, 0.1),
        "huge": values * np.float32(1e37),
        "tiny": values * np.float32(1e-39),
        "not finite": np.where(random.random(values.shape) < 0.05, np.inf, values).astype(np.float32),
    }[kind]
    if layout == "fp32":
        return torch.from_numpy(scaled)
    if layout == "bf16":
        return torch.from_numpy(scaled).to(torch.bfloat16)
    return torch.from_numpy(quantise(scaled, layout))


def named(layout: str, dim: int) -> str:
    """The layout with its dimension, which an odd number of small codes leaves open."""
    return f"{layout}:{dim}" if layout.startswith("int") else layout


def looked_up(table, layout, dim, bags, monkeypatch, way, **options):
    row = look_up.Row(layout, dim)
    if way < 0:
        return look_up.plain(table, row, bags, **options)
    if kernels() is None:
        pytest.skip("the extension was not built")
    monkeypatch.setattr(look_up, "_ISA", way)
    return look_up.look_up(table, row, row.plan(table.shape[0]), bags, **options)


def stock(stored, layout, bags):
    """The stock operator on the unprotected table; the same in float64 where it has none."""
    ids, offsets = bags.ids.long(), bags.bounds()[:-1]
    if layout.startswith("int"):
        return look_up.aten_bags(layout)(stored, ids, offsets, False, 0, False, bags.weights)
    return torch.nn.functional.embedding_bag(
        ids, stored.float(), offsets, mode="sum", per_sample_weights=bags.weights
    )


def some_bags(random, weighted, size=torch.int64):
    lengths = random.integers(0, 7, int(random.integers(1, 6)))
    ids = torch.from_numpy(random.integers(0, ROWS, lengths.sum())).to(size)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)[:-1]])).to(size)
    weights = torch.from_numpy(random.standard_normal(ids.numel()).astype(np.float32)) if weighted else None
    return bags_of(ids, offsets, weights, False, "t")


@pytest.fixture
def patched():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


CASES = st.tuples(
    st.sampled_from(LAYOUTS),
    st.sampled_from((1, 2, 5, 16, 17, 32, 33, 64, 100, 128, 131, 256, 257, 258, 300)),
    st.sampled_from(("normal", "one-signed", "large mean", "constant", "huge", "tiny", "not finite")),
    st.booleans(),
    st.sampled_from((torch.int32, torch.int64)),
    st.integers(0, 2**32),
)


@pytest.mark.parametrize("way", WAYS)
@given(case=CASES)
@settings(max_examples=60)
def test_sums_are_those_of_the_stock_operator_and_no_alarm_is_false(way, case):
    layout, dim, kind, weighted, size, seed = case
    random = np.random.default_rng(seed)
    stored = table_of(layout, dim, kind, random)
    bags = some_bags(random, weighted, size)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = looked_up(protect_table(stored, named(layout, dim)), layout, dim, bags, monkeypatch, way)
    assert found.unsound == 0 and not found.verdict.any()
    expected = stock(stored, layout, bags)[:, :dim]
    if way != 0:
        assert np.array_equal(found.values.numpy(), expected.numpy(), equal_nan=True)
    else:
        # Without FMA each look-up rounds once more: at most 3 roundings for a row.
        finite = torch.isfinite(expected) & torch.isfinite(found.values)
        magnitude = stock_of_magnitudes(stored, layout, bags)
        slack = 3 * 2.0**-24 * (bags.ids.numel() + 1) * 2 * magnitude + 1e-44 * bags.ids.numel()
        assert ((found.values - expected).abs() <= slack)[finite & torch.isfinite(magnitude)].all()


def stock_of_magnitudes(stored, layout, bags):
    """A bound of the sum of what is added, column by column: |weight| · (|scale| · largest code + |bias|)."""
    if layout.startswith("int"):
        data = stored.numpy()
        numbers = (
            data[:, -8:].copy().view("<f4")
            if layout == "int8"
            else data[:, -4:].copy().view("<f2").astype("f4")
        )
        most = {"int8": 255, "int4": 15, "int2": 3}[layout]
        each = torch.from_numpy(np.abs(numbers[:, :1]) * most + np.abs(numbers[:, 1:])).double()
    else:
        each = stored.double().abs()
    weights = None if bags.weights is None else bags.weights.double().abs()
    return torch.nn.functional.embedding_bag(
        bags.ids.long(), each, bags.bounds()[:-1], mode="sum", per_sample_weights=weights
    )


@pytest.mark.parametrize("way", WAYS)
@given(case=CASES, flips=st.sampled_from((1, 1, 2, 3)))
@settings(max_examples=60)
def test_every_bag_with_an_altered_row_is_found_and_no_other(way, case, flips):
    layout, dim, kind, weighted, size, seed = case
    random = np.random.default_rng(seed)
    stored = table_of(layout, dim, kind, random)
    protected = protect_table(stored, named(layout, dim))
    altered = protected.clone()
    row = int(random.integers(ROWS))
    data = altered.view(torch.uint8)
    layout_of = look_up.Row(layout, dim)
    bits = np.arange(8 * (data.shape[1] if flips == 1 else layout_of.check))
    # Between the digits and the tag there may be bits that mean nothing.
    digits = 8 * layout_of.check + layout_of.bits * len(layout_of.weights)
    bits = bits[(bits < digits) | (bits >= 8 * layout_of.tag)]
    for bit in random.choice(bits, min(flips, bits.size), replace=False):
        data[row, int(bit) // 8] ^= 1 << (int(bit) % 8)
    wrong = torch.from_numpy(bad_rows(altered, named(layout, dim)))
    # Of one flip all are found; two flips in the values of a row cancel in the sum of floats alone.
    if flips == 1 or (flips == 2 and layout.startswith("int") and dim <= 256):
        assert wrong.tolist() == [row]
    bags = some_bags(random, weighted, size)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = looked_up(altered, layout, dim, bags, monkeypatch, way)
    bounds = bags.bounds().tolist()
    for b in range(bags.count):
        there = row in bags.ids[bounds[b] : bounds[b + 1]].tolist() and wrong.numel() > 0
        assert bool(found.verdict[b]) == there
        assert not found.verdict[b] & ARITHMETIC or not np.isfinite(found.values[b].numpy()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_row_of_another_address_is_found(layout, way, patched):
    random = np.random.default_rng(3)
    table = protect_table(table_of(layout, 32, "normal", random), layout)
    table[5] = table[9].clone()  # what reading row 9 for row 5 would give
    bags = bags_of(torch.tensor([[1, 5], [9, 2]]), None, None, False, "t")
    found = looked_up(table, layout, 32, bags, patched, way)
    assert found.verdict.tolist() == [SUM if layout in ("fp32", "bf16") else TAG, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_and_padding(way, layout, patched):
    random = np.random.default_rng(4)
    stored = table_of(layout, 24, "normal", random)
    bags = bags_of(torch.tensor([[1, 5, 7], [5, 5, 5], [9, 2, 5]]), None, None, False, "t")
    found = looked_up(protect_table(stored, layout), layout, 24, bags, patched, way, mean=True, padding=5)
    kept = [[1, 7], [], [9, 2]]
    for b, ids in enumerate(kept):
        one = bags_of(torch.tensor([ids], dtype=torch.int64), None, None, False, "t")
        expected = stock(stored, layout, one)[0] * (torch.ones(()) / max(len(ids), 1))
        torch.testing.assert_close(found.values[b], expected, rtol=1e-6, atol=1e-6)
    assert found.unsound == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "ids, offsets, said",
    [
        ([0, 23], [0, 1], "bag 1 asks for row 23, and the table has 23 rows"),
        ([-1, 2], [0, 1], "bag 0 asks for row -1"),
        ([1, 2, 2**40], [0, 1], "bag 1 asks for row 1099511627776"),
        ([1, 2], [1, 0], "bag 0 begins at id 1 and ends at 0 of 2"),
        ([1, 2], [0, 3], "bag 0 begins at id 0 and ends at 3 of 2"),
        ([1, 2], [-1, 1], "bag 0 begins at id -1"),
        ([1, 2], [1, 2], "the first bag begins at id 1: the first offset is 0"),
    ],
)
def test_ids_and_offsets_beyond_are_refused_before_anything_is_read(way, ids, offsets, said, patched):
    table = protect_table(table_of("int8", 16, "normal", np.random.default_rng(0)), "int8")
    bags = bags_of(torch.tensor(ids), torch.tensor(offsets), None, False, "emb_l.3")
    with pytest.raises(UsageError, match=f"table emb_l.3: {said}"):
        looked_up(table, "int8", 16, bags, patched, way, name="emb_l.3")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dim", [1, 3, 64])
def test_not_a_number_is_no_fault(way, layout, dim, patched):
    """Of two NaN that meet in an addition, compilers may keep either."""
    random = np.random.default_rng(dim)
    words = random.integers(0, 1 << 32, (ROWS, dim), dtype=np.uint32)
    words |= np.where(random.random(words.shape) < 0.5, np.uint32(0x7FC00000), np.uint32(0))
    if layout == "int8":
        stored = torch.from_numpy(quantise(random.standard_normal((ROWS, dim)), "int8"))
        stored.view(torch.uint8)[:, dim:] = (
            torch.from_numpy(words[:, :1].copy()).view(torch.uint8).repeat(1, 2)
        )
    else:
        stored = torch.from_numpy(words.view(np.float32)).to(
            torch.float32 if layout == "fp32" else torch.bfloat16
        )
    table = protect_table(stored, layout)
    bags = bags_of(torch.from_numpy(random.integers(0, ROWS, (40, 9))), None, None, False, "t")
    assert looked_up(table, layout, dim, bags, patched, way).unsound == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("layout", "width"), [("int8", 16 + 8), ("int4", 8 + 4), ("int2", 4 + 4)])
def test_scales_and_biases_of_any_bits_are_no_fault(way, layout, width, patched):
    for seed in range(20):
        random = np.random.default_rng(seed)
        table = protect_table(torch.from_numpy(random.integers(0, 256, (50, width)).astype(np.uint8)), layout)
        bags = bags_of(torch.from_numpy(random.integers(0, 50, (30, 7))), None, None, False, "t")
        assert looked_up(table, layout, 16, bags, patched, way).unsound == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("offsets", "last"), [([0, 2, 4], True), ([0], True), ([], False)])
def test_ids_behind_the_last_bag_are_left_out(way, offsets, last, patched):
    stored = table_of("int8", 16, "normal", np.random.default_rng(0))
    table = protect_table(stored, "int8")
    bags = bags_of(
        torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor(offsets, dtype=torch.int64), torch.ones(6), last, "t"
    )
    found = looked_up(table, "int8", 16, bags, patched, way)
    pairs = bags_of(torch.tensor([[3, 4], [5, 6]])[: bags.count], None, None, False, "t")
    assert torch.allclose(found.values, looked_up(table, "int8", 16, pairs, patched, way).values)
    assert found.unsound == 0 and len(found.values) == max(len(offsets) - 1, 0)


@pytest.mark.parametrize("threads", (2, 5, 100))
def test_threads_change_nothing(threads, patched):
    random = np.random.default_rng(6)
    table = protect_table(table_of("int8", 48, "normal", random), "int8")
    table[7, 3] ^= 4
    bags = bags_of(torch.from_numpy(random.integers(0, ROWS, (40, 5))), None, None, False, "t")
    one = looked_up(table, "int8", 48, bags, patched, 2)
    several = looked_up(table, "int8", 48, bags, patched, 2, threads=threads)
    assert torch.equal(one.values, several.values)
    assert torch.equal(one.verdict, several.verdict)
    assert one.unsound == several.unsound > 0


def test_a_table_taken_out_of_its_protection_is_as_it_was():
    random = np.random.default_rng(7)
    for layout in LAYOUTS:
        stored = table_of(layout, 33, "normal", random)
        name = named(layout, 33)
        assert torch.equal(unprotect_table(protect_table(stored, name), name), stored)
