"""Quantised products: the stock operator's bits, no false alarm, and every effective fault found."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ckptflip.errors import DetectedError, UsageError
from ckptflip.faults import Policy
from ckptflip.protect.gemm import packing, passes, quantised
from ckptflip.protect.gemm.checked import Checked
from ckptflip.protect.gemm.faulting import accumulator_faults, damaged, flipped, weight_faults
from ckptflip.protect.gemm.packing import pack, product
from ckptflip.protect.gemm.passes import FAULTY, HOLDS
from ckptflip.protect.gemm.quantised import Quantised
from ckptflip.protect.gemm.recovery import exact_rows
from ckptflip.protect.gemm.sums import CHUNK, EXACT
from ckptflip.protect.native import kernels

IN_COLUMNS = [("exact", "columns"), ("mod127", "columns")]
EXACT_CHECKS = [("exact", "beside"), ("exact", "columns")]
CHECKS = [("exact", "beside"), ("mod127", "beside"), *IN_COLUMNS]
EXTREMES = {"random": None, "zero": 0, "lowest": -128, "highest": 127}
CODES = {"random": None, "zero": 0, "highest": 255}


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def way(request, monkeypatch):
    if request.param == "plain":
        for module in (packing, quantised):
            monkeypatch.setattr(module, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("the compiled kernels were not built")


def codes(shape, seed, value=None, low=-128, dtype=torch.int8):
    if value is not None:
        return torch.full(shape, value, dtype=dtype)
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(low, low + 256, shape).astype(dtype_of(dtype)))


def dtype_of(dtype):
    return {torch.int8: np.int8, torch.uint8: np.uint8}[dtype]


def inputs(m, k, seed, value=None):
    return codes((m, k), seed + 1, value, 0, torch.uint8)


def struck(packed, bits):
    """A layer with one flip in its weight, not in what fills it up."""
    found = (damaged(packed, Policy(bits=bits), seed=seed) for seed in range(100))
    return next(bad for bad, made in found if made.plan.word[0] < packed.layer.weight.numel())


def stock(layer, x):
    """What oneDNN's own operator makes of a layer."""
    prepacked = torch.ops.onednn.qlinear_prepack(layer.weight, [len(x), layer.inputs])
    narrow = layer.out_scale is not None
    n = len(layer.weight_scale)
    return torch.ops.onednn.qlinear_pointwise.default(
        x, layer.x_scale, layer.x_zero, prepacked, layer.weight_scale, torch.zeros(n, dtype=torch.int64),
        layer.bias, layer.out_scale or 1.0, layer.out_zero, torch.uint8 if narrow else torch.float32,
        "relu" if layer.relu else "none", [], "",
    )  # fmt: skip


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 70), st.integers(1, 90))


@settings(max_examples=150)
@given(
    SHAPES,
    st.sampled_from(CHECKS),
    st.sampled_from(sorted(EXTREMES)),
    st.sampled_from(sorted(CODES)),
    st.integers(0, 255),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.5, 3.0]),
    st.integers(0, 10**6),
)
@example((1, 1, 1), ("exact", "beside"), "zero", "highest", 0, False, True, None, 4)
def test_sound_products_hold_and_have_the_stock_operators_bits(
    shape, check, weights, given_codes, zero, bias, relu, out_scale, seed
):
    m, n, k = shape
    random = torch.Generator().manual_seed(seed)
    layer = Quantised(
        codes((n, k), seed, EXTREMES[weights]),
        torch.randn(n if seed % 2 else 1, generator=random),
        torch.randn(n, generator=random) if bias else None,
        0.05,
        zero,
        out_scale,
        zero if out_scale else 0,
        relu,
    )
    x = inputs(m, k, seed, CODES[given_codes])
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]))
    assert torch.equal(bits(checked.run(x)), bits(stock(layer, x)))
    assert checked.verdict is None and checked.seen.faulty == 0


def bits(results):
    return results.view(torch.int32) if results.is_floating_point() else results


@pytest.mark.parametrize("scheme", ["exact", "mod127"])
def test_sums_of_a_row_may_leave_32_bits(scheme):
    """No accumulator is wide here, and what residues foresee of this row is below -2^31."""
    row, column = np.arange(256)[:, None], np.arange(140_000)
    layer = Quantised(torch.from_numpy(((row + column) % 4 == 0).astype(np.int8)), torch.ones(1), None, 1.0)
    x = inputs(1, 140_000, 1, 255)
    checked = Checked(pack(layer, scheme=scheme))
    assert float(product(checked.packed, x).max()) < EXACT
    assert int((x.long() * -63).sum()) < -(2**31)
    checked.run(x)
    assert checked.verdict is None
    checked.between = lambda rows: rows[0, 5].add_(1)
    with pytest.raises(DetectedError, match="row 0 of the product does not match its checksum"):
        checked.run(x)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("signs", ["alike", "balanced"])
def test_rows_that_float32_rounds_are_checked_in_parts(check, signs):
    """Accumulators beyond 2^24 are no false alarm, and their results are the stock operator's."""
    weight = torch.full((24, 1201), 127, dtype=torch.int8)
    if signs == "balanced":
        weight[::2] = -128
    layer = Quantised(weight, torch.rand(24) + 0.5, torch.randn(24), 0.1, 7)
    x = inputs(6, 1201, 1)
    x[:3] = 255
    x[4] = 0
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]))
    assert float(product(checked.packed, x).abs().max()) >= EXACT
    assert torch.equal(checked.run(x), stock(layer, x)) and checked.verdict is None
    exact, holds = exact_rows(checked.packed, x)
    assert bool(holds.all()) and torch.equal(exact[:, :24].long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("check", EXACT_CHECKS)
@given(data=st.data())
def test_faults_in_rows_that_float32_rounds_are_found(check, data):
    weight = torch.full((5, 1100), 127, dtype=torch.int8)
    layer = Quantised(weight, torch.ones(1), None, 1.0)
    x = torch.full((2, 1100), 255, dtype=torch.uint8)
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]), on_error="count")
    with weight_faults(checked, Policy(), seed=data.draw(st.integers(0, 10**6))) as record:
        assert float(product(checked.packed, x).abs().max()) >= EXACT
        checked.run(x)
    read = int(record.plan.word[0]) // 1100 < checked.packed.used
    assert checked.verdict == (bytes([FAULTY, FAULTY]) if read else None)


@pytest.mark.parametrize("check", IN_COLUMNS)
@pytest.mark.parametrize("bit", range(32))
def test_a_flip_of_a_checksum_that_is_wide_then_is_found(check, bit):
    """The results would be right; the row did not hold all the same."""
    checked = Checked(pack(Quantised(codes((8, 700), 1), torch.ones(1)), scheme=check[0], placement=check[1]))
    x = inputs(2, 700, 2)

    def flip(rows):
        word = rows[1:2, 8].to(torch.int32)
        word[0] ^= -(2**31) if bit == 31 else 1 << bit
        rows[1, 8] = word.float()[0]

    checked.between = flip
    assert float(product(checked.packed, x).abs().max()) < EXACT
    with pytest.raises(DetectedError, match="row 1"):
        checked.run(x)


@settings(max_examples=200)
@given(SHAPES, st.sampled_from(CHECKS), st.integers(0, 10**6), st.floats(0, 1))
def test_the_verdict_on_a_fault_in_the_weight_is_the_truth(shape, check, seed, zeros):
    """Exact: a row is faulty if and only if it changed; mod 127: unless its sum did by a multiple of 127."""
    m, n, k = shape
    layer = Quantised(codes((n, k), seed), torch.ones(1), None, 1.0)
    x = inputs(m, k, seed)
    x[torch.from_numpy(np.random.default_rng(seed).random((m, k)) < zeros)] = 0
    packed = pack(layer, scheme=check[0], placement=check[1])
    bad, record = damaged(packed, Policy(), seed=seed)
    assert record.bits_effective == 1
    change = product(bad, x).long() - product(packed, x).long()
    read = packed.used
    powers = torch.ones(read, dtype=torch.int64)
    powers[n:] = -(256 ** torch.arange(read - n))
    off = change[:, :read] @ powers
    assert bool(((off != 0) == (change[:, :read] != 0).any(1)).all())
    wanted = off % 127 != 0 if check[0] == "mod127" else off != 0
    out = torch.empty(m, n)
    found = passes.check_and_write(bad, product(bad, x), x, out) or bytes(m)
    assert [verdict == FAULTY for verdict in found] == wanted.tolist()


@settings(max_examples=200)
@given(SHAPES, st.sampled_from(CHECKS), st.integers(0, 10**6), st.integers(0, 31))
def test_every_flip_of_an_accumulator_is_found_in_its_row(shape, check, seed, bit):
    m, n, k = shape
    layer = Quantised(codes((n, k), seed), torch.ones(1), None, 1.0)
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]), on_error="count")
    with accumulator_faults(checked, Policy(bits=str(bit)), seed=seed) as records:
        checked.run(inputs(m, k, seed))
    row, column = divmod(int(records[0].plan.word[0]), checked.packed.width)
    hit = row if column < checked.packed.used else -1
    assert (checked.verdict or bytes(m)) == bytes(FAULTY if i == hit else HOLDS for i in range(m))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_no_integer_is_a_fault(check, bad):
    checked = Checked(pack(Quantised(codes((3, 9), 1), torch.ones(1)), scheme=check[0], placement=check[1]))
    checked.between = lambda rows: rows[1].fill_(bad)
    with pytest.raises(DetectedError, match="row 1 of the product does not match its checksum"):
        checked.run(inputs(3, 9, 2))
    checked.between = lambda rows: rows[1:].fill_(bad)
    with pytest.raises(DetectedError, match=r"2 rows \(1, 2\) of the product do not match their checksums"):
        checked.run(inputs(3, 9, 2))


@pytest.mark.parametrize("check", CHECKS)
def test_fractions_do_not_reach_the_results(check):
    """A flip in the low mantissa bits of a stored accumulator is found, or cut off."""
    layer = Quantised(codes((3, 9), 1), torch.ones(1), None, 1.0)
    checked, x = (
        Checked(pack(layer, scheme=check[0], placement=check[1]), on_error="recompute"),
        inputs(4, 9, 2),
    )
    for bit in range(32):
        checked.between = lambda rows, bit=bit: flipped(rows, "rows", Policy(bits=str(bit)), seed=bit)
        assert torch.equal(checked.run(x), stock(layer, x))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("on_error", ["recompute", "correct"])
@pytest.mark.parametrize("out_scale", [None, 4.0])
def test_a_fault_that_passes_is_mended(check, on_error, out_scale):
    layer = Quantised(codes((20, 30), 1), torch.rand(20) + 0.1, torch.randn(20), 0.1, 3, out_scale)
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]), on_error=on_error)
    x = inputs(7, 30, 2)
    checked.between = lambda rows: rows[3, 4].add_(1 << 20)
    assert torch.equal(checked.run(x), stock(layer, x))
    assert (checked.seen.faulty, checked.seen.recomputed, checked.verdict[3]) == (1, 1, FAULTY)


@pytest.mark.parametrize("check", CHECKS)
def test_correction_computes_nothing_again(check, monkeypatch):
    """One number that is off is found by its row and its column, and set right."""
    from ckptflip.protect.gemm import recovery

    monkeypatch.setattr(recovery, "product", lambda *_: pytest.fail("computed again"))
    layer = Quantised(codes((20, 30), 1), torch.rand(20) + 0.1, None, 0.1, 3)
    checked = Checked(pack(layer, scheme=check[0], placement=check[1]), on_error="correct")
    x = inputs(7, 30, 2)
    for bit in range(32):
        checked.between = lambda rows, bit=bit: rows[2, 11].sub_((-1) ** bit * 2**bit)
        assert torch.equal(checked.run(x), stock(layer, x)) and checked.verdict[2] == FAULTY


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("on_error", ["recompute", "correct"])
def test_a_damaged_packed_weight_is_packed_anew(check, on_error):
    layer = Quantised(codes((20, 30), 1), torch.rand(20) + 0.1, None, 0.1, 3)
    checked, x = (
        Checked(pack(layer, scheme=check[0], placement=check[1]), on_error=on_error),
        inputs(7, 30, 2),
    )
    checked.packed = struck(checked.packed, "6")
    first = checked.run(x)
    assert torch.equal(first, stock(layer, x)) and checked.seen.recomputed == 1
    assert torch.equal(checked.run(x), first) and checked.seen.faulty == 1


def test_faults_of_an_outer_block_go_on_after_an_inner_one():
    checked = Checked(pack(Quantised(codes((6, 9), 1), torch.ones(1))), on_error="count")
    x, policy = inputs(4, 9, 2), Policy(bits="5")
    with accumulator_faults(checked, policy, seed=1) as outer:
        checked.run(x)
        with accumulator_faults(checked, policy, seed=2) as inner:
            checked.run(x)
        checked.run(x)
    checked.run(x)
    assert (len(outer), len(inner), checked.seen.faulty, checked.seen.calls) == (2, 1, 3, 4)


def test_damaged_codes_are_not_packed_again():
    layer = Quantised(codes((20, 30), 1), torch.rand(20) + 0.1, None, 0.1, 3)
    checked, x = Checked(pack(layer), on_error="recompute"), inputs(7, 30, 2)
    checked.packed = struck(checked.packed, "6")
    layer.weight[0, 0] ^= 4
    with pytest.raises(DetectedError, match="codes of the weight"):
        checked.run(x)


def test_a_policy_or_a_check_that_is_none_is_refused():
    layer = Quantised(codes((2, 3), 1), torch.ones(1))
    for wrong in ({"scheme": "mod128"}, {"placement": "rows"}):
        with pytest.raises(UsageError, match="exact and mod127, placements beside and columns"):
            pack(layer, **wrong)
    with pytest.raises(UsageError, match="no policy"):
        Checked(pack(layer), on_error="ignore")
    with pytest.raises(UsageError, match=r"shape \(m, 3\)"):
        Checked(pack(layer)).run(torch.zeros(1, 4, dtype=torch.uint8))
    with pytest.raises(UsageError, match="uint8"):
        Checked(pack(layer)).run(torch.zeros(1, 3, dtype=torch.int8))
    assert 255 * 128 * CHUNK < EXACT <= 255 * 128 * (CHUNK + 1)
