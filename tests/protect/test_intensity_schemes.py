"""Checks of linear layers: no false alarm for any data, every fault beyond the stated threshold found."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from intensity_cases import (
    CHECKING,
    COMPILED,
    KINDS,
    fits,
    flipped,
    kinds,
    layer,
    run,
    seeds,
    shapes,
    values,
)
from torch.nn.functional import linear

from ckptflip.errors import UsageError
from ckptflip.protect.intensity import schemes
from ckptflip.protect.intensity.roofline import Shape
from ckptflip.protect.intensity.schemes import SCHEMES, chosen, same_bits
from ckptflip.protect.intensity.weights import prepared
from ckptflip.protect.native import SWITCH, kernels

# The tile scheme is compiled or not at all.
ALL = [(n, c) for n in (*CHECKING, "replication") for c in COMPILED if fits(n, c)]
SUMS = [(n, c) for n, c in ALL if n != "replication"]
compiled_only = pytest.mark.skipif(kernels() is None, reason="the compiled kernels were not built")


@pytest.mark.parametrize("compiled", COMPILED)
@given(shape=shapes, of_weights=kinds, of_x=kinds, seed=seeds, bias=st.booleans())
def test_no_false_alarm(compiled, shape, of_weights, of_x, seed, bias):
    m, n, k = shape
    weights, x = layer(of_weights, n, k, seed, compiled, bias), values(of_x, (m, k), seed + 2)
    for name in (*CHECKING, "replication"):
        if fits(name, compiled):
            _, _, faulty = run(name, weights, x)
            assert not faulty, name


@pytest.mark.parametrize(("name", "compiled"), ALL)
def test_clean_layers_pass_the_quick_check(name, compiled):
    """What goes to the slow judgement costs time: usual data never does."""
    for n, k, m in [(512, 13, 64), (256, 512, 200), (1, 256, 33), (64, 256, 7)]:
        for kind in ("normal", "positive", "far from zero", "zeros"):
            out, holds, _ = run(name, layer(kind, n, k, 1, compiled), values(kind, (m, k), 2))
            assert holds and out.shape == (m, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "compiled"), SUMS)
def test_what_cannot_be_judged_is_no_fault(name, compiled, bad):
    weights, x = layer("normal", 20, 30, 3, compiled), values("normal", (9, 30), 4)
    x[5, 7] = bad
    out, holds = SCHEMES[name].prepare(weights)(x)
    judged = SCHEMES[name].judge(weights, x, out)
    assert (holds, judged.faulty, judged.unchecked) == (False, False, True)


def test_results_that_may_overflow_are_no_fault():
    weights, x = prepared(torch.full((4, 8), 1e30), None), torch.full((3, 8), 1e30)
    for name in CHECKING[: 3 if kernels() else 2]:
        out, holds = SCHEMES[name].prepare(weights)(x)
        judged = SCHEMES[name].judge(weights, x, out)
        assert bool(out.isinf().all()) and (holds, judged.faulty, judged.unchecked) == (False, False, True)


@compiled_only
@given(shape=shapes, kind=kinds, seed=seeds, bias=st.booleans())
def test_the_compiled_product_is_the_layer(shape, kind, seed, bias):
    m, n, k = shape
    weights, x = layer(kind, n, k, seed, bias=bias), values(kind, (m, k), seed + 2)
    out, _ = SCHEMES["tile"].prepare(weights)(x)
    wide = linear(
        x.double(), weights.weight.double(), None if weights.bias is None else weights.bias.double()
    )
    size = x.double().abs() @ weights.weight.double().abs().T
    size += 0 if weights.bias is None else weights.bias.double().abs()
    bound = (k + 1) * 2.0**-24 / (1 - (k + 1) * 2.0**-24) * size + (2 * k + 2) * 2.0**-126
    sure = size < 1e38
    assert bool(((out.double() - wide).abs() <= bound)[sure].all())


@compiled_only
def test_rows_may_be_any_number_of_floats_apart():
    """The tail of a row is read beyond it where there is memory, and only there."""
    whole = values("normal", (40, 31), 5)
    weights = layer("normal", 37, 13, 6)
    for x in (whole[:, :13], whole[:, 18:], whole[::2, 18:], whole[-1:, 18:]):
        for name in CHECKING:
            out, holds, faulty = run(name, weights, x)
            assert holds and not faulty
            assert torch.allclose(out, linear(x, weights.weight, weights.bias), atol=1e-4)


def faulty_linear(row: int, column: int, mask: int, first: int = 1):
    """A product in which a result has other bits, in the first so many calls."""
    calls = []

    def faulty(x, weight, bias):
        out = linear(x, weight, bias)
        calls.append(1)
        if len(calls) <= first:
            out.numpy().view(np.uint32)[row, column] ^= np.uint32(mask)
        return out

    return faulty


def check_fault(monkeypatch, name, weights, x, row, column, mask):
    """Put a fault in the product; a fault beyond the threshold is found, one that changes no value is not."""
    clean = SCHEMES[name].prepare(weights)(x)[0]
    if name == "tile":
        weights.fast.suffer(row, column, mask)
    else:
        monkeypatch.setattr(schemes, "linear", faulty_linear(row, column, mask))
    out, holds = SCHEMES[name].prepare(weights)(x)
    monkeypatch.setattr(schemes, "linear", linear)
    found = not holds and SCHEMES[name].judge(weights, x, out).faulty
    if name == "tile":
        weights.fast.suffer(-1, 0, 0)
    value = float(clean[row, column])
    hit = flipped(value, mask)
    words = out.numpy().view(np.uint32), clean.numpy().view(np.uint32)
    assert words[0][row, column] == words[1][row, column] ^ np.uint32(mask)
    assert int((out != clean).sum()) <= 1 or not np.isfinite(hit)
    change, least = abs(hit - value), float(SCHEMES[name].least(weights, x)[row])
    if not np.isfinite(hit) or change > least:
        assert found, (change, least)
    return found


@pytest.mark.parametrize(("name", "compiled"), ALL)
@settings(max_examples=60)
@given(
    shape=shapes, kind=st.sampled_from(KINDS[:3]), seed=seeds, bits=st.sets(st.integers(0, 31), min_size=1)
)
def test_faults_beyond_the_threshold_are_found(name, compiled, shape, kind, seed, bits):
    m, n, k = shape
    weights, x = layer(kind, n, k, seed, compiled), values(kind, (m, k), seed + 2)
    mask = sum(1 << bit for bit in bits)
    with pytest.MonkeyPatch.context() as patch:
        check_fault(patch, name, weights, x, seed % m, seed % n, mask)


@pytest.mark.parametrize(("name", "compiled"), ALL)
def test_the_critical_bit_is_found_in_every_place(name, compiled, monkeypatch):
    for n, k in [(131, 20), (3, 20), (16, 33)]:
        weights, x = layer("normal", n, k, 8, compiled), values("normal", (67, k), 9)
        for row in (0, 7, 8, 63, 64, 66):
            for column in {0, n // 2, n - 1}:
                value = float(SCHEMES[name].prepare(weights)(x)[0][row, column])
                # Of numbers from 2 on, the critical bit makes nothing of it: below what a sum can tell.
                if abs(value) < 1:
                    assert check_fault(monkeypatch, name, weights, x, row, column, 1 << 30)
                check_fault(monkeypatch, name, weights, x, row, column, 0x7F800000)


def test_replication_finds_every_bit(monkeypatch):
    weights, x = layer("normal", 5, 6, 1), values("normal", (3, 6), 2)
    for bit in range(32):
        assert check_fault(monkeypatch, "replication", weights, x, 1, 2, 1 << bit)


@pytest.mark.parametrize(("name", "compiled"), ALL)
def test_a_damaged_weight_is_found_by_sums_and_not_by_running_twice(name, compiled):
    weights, x = layer("positive", 40, 50, 1, compiled), values("positive", (6, 50), 2)
    memory = weights.fast.packed if name == "tile" else weights.weight
    place = int((memory.reshape(-1) != 0).nonzero()[37])
    memory.reshape(-1)[place] += 3.0
    assert run(name, weights, x)[2] is (name != "replication")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["global", "row", "replication"])
def test_other_dtypes(name, dtype):
    weight = values("normal", (33, 100), 1).to(dtype)
    weights, x = prepared(weight, weight[:, 0]), values("normal", (20, 100), 2).to(dtype)
    out, holds, _ = run(name, weights, x)
    assert holds and out.dtype is dtype
    with pytest.MonkeyPatch.context() as patch:

        def faulty(*arguments, calls=[]):  # noqa: B006
            out = linear(*arguments)
            out[4, 5] += 1000 * (not calls)
            calls.append(1)
            return out

        patch.setattr(schemes, "linear", faulty)
        out, holds = SCHEMES[name].prepare(weights)(x)
    assert not holds and SCHEMES[name].judge(weights, x, out).faulty


def test_other_dtypes_have_no_tiles():
    weights = prepared(torch.ones(2, 2, dtype=torch.float64), None)
    assert "float32 on the CPU" in SCHEMES["tile"].unfit(weights) or kernels() is None
    with pytest.raises(UsageError, match="the tile scheme cannot check this layer"):
        SCHEMES["tile"].prepare(weights)


@compiled_only
def test_autocast_is_checked_in_the_dtype_it_gives():
    weights, x = layer("normal", 30, 40, 1), values("normal", (8, 40), 2)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("global", "row"):
            out, _, _ = run(name, weights, x)
            assert out.dtype is torch.bfloat16


@compiled_only
def test_gradients_flow_through_every_scheme():
    weights = layer("normal", 30, 40, 1)
    for name in (*CHECKING, "replication"):
        x = values("normal", (8, 40), 2).requires_grad_()
        SCHEMES[name].prepare(weights)(x)[0].sum().backward()
        assert torch.allclose(x.grad, weights.weight.sum(0).expand(8, 40), atol=1e-4)


def test_without_the_extension_there_are_no_tiles(monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    code = (
        "import torch; from ckptflip.protect.intensity.schemes import SCHEMES as S;"
        "from ckptflip.protect.intensity.weights import prepared as p; w = p(torch.ones(3, 4), None);"
        "print(S['tile'].unfit(w)); names = ('global', 'row', 'replication');"
        "print([S[name].prepare(w)(torch.ones(2, 4))[1] for name in names])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert SWITCH in said[0] and said[1] == "[True, True, True]"


def test_costs_and_memory():
    shape, weights = Shape(8, 64, 32), layer("normal", 64, 32, 1)
    assert SCHEMES["none"].cost(shape) == (0, 0) and SCHEMES["none"].memory(weights) == 0
    assert SCHEMES["replication"].cost(shape)[0] == shape.flops
    assert SCHEMES["tile"].cost(shape)[1] == 0 < SCHEMES["row"].cost(shape)[1]
    if weights.fast:
        assert SCHEMES["tile"].memory(weights) >= weights.weight.nbytes


def test_names_of_schemes():
    assert [scheme.name for scheme in chosen(("row",))] == ["row"]
    with pytest.raises(UsageError, match="'rows' is no scheme; there are: global, row, tile, replication"):
        chosen(("rows",))
    with pytest.raises(UsageError, match="no scheme is left"):
        chosen(())


def test_weights_that_cannot_be_checked():
    with pytest.raises(UsageError, match="finite"):
        prepared(torch.tensor([[float("nan")]]), None)


def test_bits_are_compared_not_values():
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone()) and not same_bits(torch.zeros(1), -torch.zeros(1))
