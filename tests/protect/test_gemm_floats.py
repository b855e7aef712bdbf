"""Float products: rounding is never taken for a fault, and every change beyond twice the bound is found."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.errors import UsageError
from ckptflip.live.torch_words import number_of, xor
from ckptflip.protect.gemm import floats
from ckptflip.protect.gemm.arithmetic import arithmetic_of, gamma, likely_gamma
from ckptflip.protect.gemm.floats import check_rows, detectable, row_checksum, rows_hold
from ckptflip.protect.native import kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = st.integers(1, 70)


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(floats, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip("the compiled kernels were not built")


def product(m, n, k, dtype, size, seed, bias=True):
    random = torch.Generator().manual_seed(seed)
    weight = (torch.randn(n, k, generator=random) * size).to(dtype)
    x = torch.randn(m, k, generator=random).to(dtype)
    added = torch.randn(n, generator=random).to(dtype) if bias else None
    return x, weight, added, torch.nn.functional.linear(x, weight, added)


@pytest.mark.usefixtures("way")
@given(SIZES, SIZES, SIZES, st.sampled_from(DTYPES), st.integers(-9, 4), st.integers(0, 99), st.booleans())
def test_rounding_is_no_fault(m, n, k, dtype, power, seed, bias):
    x, weight, added, out = product(m, n, k, dtype, 10.0**power, seed, bias)
    checksum = row_checksum(weight, added)
    verdict = check_rows(out, x, checksum)
    assert not verdict.faulty.any()
    # float16 overflows soon, by itself.
    assert verdict.ok == rows_hold(out, x, checksum) == bool(torch.isfinite(out).all())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 1e30])
def test_denormal_and_huge_numbers_are_no_faults(size):
    x, weight, added, out = product(7, 33, 65, torch.float32, size, 1)
    assert rows_hold(out, x, row_checksum(weight, added))
    small = x * 1e-30
    assert rows_hold(small @ weight.T, small, row_checksum(weight))


@pytest.mark.usefixtures("way")
def test_errors_that_all_point_one_way_stay_within_the_bound():
    """Each addition loses nearly half a unit in the last place: the worst that rounding does."""
    k = 4096
    weight = torch.full((1, k), 2.0**-24 * 0.999)
    weight[0, 0] = 1.0
    x, total = torch.ones(1, k), torch.ones(())
    for term in weight[0, 1:]:
        total = total + term
    out = total.reshape(1, 1)
    verdict = check_rows(out, x, row_checksum(weight))
    assert verdict.ok and rows_hold(out, x, row_checksum(weight))
    assert float(verdict.residual.abs() / verdict.bound) > 0.3


@pytest.mark.usefixtures("way")
@given(SIZES, SIZES, SIZES, st.sampled_from(DTYPES), st.data())
def test_a_flip_beyond_the_threshold_is_found_and_its_row_named(m, n, k, dtype, data):
    x, weight, added, out = product(m, n, k, dtype, 1.0, 3)
    checksum, number, clean = row_checksum(weight, added), number_of(out), out.clone()
    limits = detectable(x, checksum, out)
    row, column = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, n - 1))
    bit = data.draw(st.integers(0, number.part_width - 1))
    xor(out, number, np.array([row * n + column]), np.array([1 << bit], np.uint64))
    change = (out.double() - clean.double())[row, column].abs()
    verdict = check_rows(out, x, checksum)
    assert not bool(verdict.unchecked.any())
    assert set(verdict.faulty.nonzero().flatten().tolist()) <= {row}
    # A result that grew takes part in the bound by its own rounding.
    if not change <= 1.1 * limits[row]:
        assert verdict.faulty[row] and not rows_hold(out, x, checksum)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_number_in_a_result_is_a_fault_and_in_an_input_cannot_be_judged(bad):
    x, weight, added, out = product(3, 20, 20, torch.float32, 1.0, 4)
    checksum = row_checksum(weight, added)
    out[1, 2] = bad
    assert check_rows(out, x, checksum).faulty.tolist() == [False, True, False]
    assert not rows_hold(out, x, checksum)
    x[2, 0] = bad
    verdict = check_rows(torch.nn.functional.linear(x, weight, added), x, checksum)
    assert (verdict.faulty.tolist(), verdict.unchecked.tolist()) == ([False] * 3, [False, False, True])


def test_results_that_overflow_by_themselves_are_not_called_faults():
    weight = torch.full((2, 4), 1e38)
    x = torch.full((1, 4), 10.0)
    verdict = check_rows(x @ weight.T, x, row_checksum(weight))
    assert verdict.unchecked.tolist() == [True] and not verdict.faulty.any()


def test_narrower_inputs_widen_the_bound(monkeypatch):
    before = arithmetic_of(torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert before.inputs == 0 and arithmetic_of(torch.float32).inputs == 2.0**-8
    x, weight, _, _ = product(4, 8, 512, torch.float32, 1.0, 5)
    narrow = (x.bfloat16().float() @ weight.bfloat16().float().T, x, row_checksum(weight))
    assert check_rows(*narrow).ok


def test_the_likely_bound_is_tighter_and_named():
    assert likely_gamma(1024, 2.0**-24, 5) < gamma(1024, 2.0**-24) / 5
    x, weight, added, out = product(16, 64, 1024, torch.float32, 1.0, 6)
    certain, likely = row_checksum(weight, added), row_checksum(weight, added, likely=6)
    assert check_rows(out, x, likely).ok
    assert bool((detectable(x, likely) < detectable(x, certain) / 4).all())


def test_what_has_no_bound_is_refused():
    with pytest.raises(UsageError, match="no bound is known"):
        row_checksum(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(UsageError, match="finite"):
        row_checksum(torch.tensor([[float("nan")]]))
    with pytest.raises(UsageError, match="does not belong"):
        rows_hold(torch.ones(2, 3), torch.ones(2, 4), row_checksum(torch.ones(3, 5)))
    with pytest.raises(UsageError, match="no bound holds"):
        gamma(2**24, 2.0**-24)
