"""Edges of int8 layers: rows too long for 32 bits, large and small floats, dtypes, kinds of layers."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch

from ckptflip.errors import DetectedError, UsageError
from ckptflip.protect.gemm.conversion import protect, unprotect
from ckptflip.protect.gemm.floats import row_checksum, rows_hold
from ckptflip.protect.gemm.linear import ProtectedLinear, ProtectedQuantized, QuantisedLinear
from ckptflip.protect.gemm.packing import largest_scale, pack
from ckptflip.protect.gemm.processor import saturates
from ckptflip.protect.gemm.quantised import Quantised, codes_of, quantise
from ckptflip.protect.gemm.reading import NotTakenError

# The most inputs with weights of 127 whose sums stay within 32 bits, whatever the codes.
MOST = (2**31 - 1) // (255 * 127)
FULL = 64 if saturates() else 127


def row(k, value=127):
    return torch.full((1, k), value, dtype=torch.int8)


@pytest.mark.skipif(saturates(), reason="weights of 127 are refused here")
@pytest.mark.parametrize("zero", [0, 255])
@pytest.mark.parametrize("code", [0, 255])
def test_the_longest_rows_come_out_exactly(zero, code):
    layer = QuantisedLinear(Quantised(row(MOST), torch.ones(1), x_scale=1.0, x_zero=zero))
    found = layer(torch.full((1, MOST), code, dtype=torch.uint8))
    assert float(found) == float(torch.tensor((code - zero) * 127 * MOST, dtype=torch.float32))


@pytest.mark.parametrize("kind", [QuantisedLinear, ProtectedLinear])
@pytest.mark.parametrize("value", [127, -127, 64])
def test_rows_whose_sums_leave_32_bits_are_refused(kind, value):
    k = 2**31 // (255 * abs(value)) + 1
    said = rf"leave 32 bits: 255·Σ\|w\| of an output is {255 * abs(value) * k:,}"
    with pytest.raises(UsageError, match=said):
        kind(Quantised(row(k, value), torch.ones(1), x_scale=1.0))


def test_columns_of_a_checksum_must_fit_32_bits_as_well():
    """The weights would; a column of their sums' digits would not."""
    layer = Quantised(row(2, 1).repeat(64, 40_000), torch.ones(1), x_scale=1.0)
    assert pack(layer).widest < 2**31
    layer = Quantised(row(70_000, 1).repeat(127, 1), torch.ones(1), x_scale=1.0)
    if not saturates():
        with pytest.raises(NotTakenError, match="placement='beside'"):
            pack(layer, placement="columns")
    assert pack(layer).widest == 255 * 70_000


def test_a_model_keeps_a_layer_that_is_too_long():
    model = torch.nn.Sequential(torch.nn.Linear(2**31 // (255 * FULL) + 1, 1), torch.nn.Linear(1, 1))
    torch.nn.init.constant_(model[0].weight, 1.0)
    converted = protect(model)
    assert [layer.name for layer in converted.taken] == ["1"]
    assert [(layer.name, "leave 32 bits" in layer.reason) for layer in converted.left] == [("0", True)]
    with pytest.raises(UsageError, match=r"no layer .* leave 32 bits"):
        protect(model[0])


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    "x", [torch.tensor([[1e300, 1.0]], dtype=torch.float64), torch.tensor([[3e38, 1.0]])], ids=["f64", "f32"]
)
def test_finite_inputs_give_finite_results_or_an_error(x, calibrated):
    torch.manual_seed(0)
    plain = torch.nn.Linear(2, 3)
    layer = protect(plain, calibration=[torch.tensor([[-1.0, 2.0]])] if calibrated else None).model
    if calibrated:
        # Beyond the range, the largest code.
        wanted = layer(torch.tensor([[2.0, 1.0]])).to(x.dtype)
        assert torch.equal(layer(x), wanted) and bool(wanted.isfinite().all())
    else:
        with pytest.raises(UsageError, match=r"linear: codes of the input .* may leave float32"):
            layer(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_results_are_finite_up_to_the_largest_scale(bias, size):
    random = torch.Generator().manual_seed(3)
    plain = torch.nn.Linear(9, 5, bias=bias)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * size)
    layer = ProtectedLinear(quantise(plain))
    most = largest_scale(layer.checked.packed) * 255
    for sign in (plain.weight[0].sign(), -plain.weight[0].sign()):
        x = (sign[None] * (most * 0.49)).detach()
        assert bool(layer(x).isfinite().all())
        wanted = plain(x).detach()
        torch.testing.assert_close(layer(x), wanted, rtol=0.05, atol=float(wanted.abs().max()) / 50)
        with pytest.raises(UsageError, match="may leave float32"):
            layer(x * 2.1)


def test_scales_that_leave_float32_are_refused_when_a_layer_is_made():
    weight = torch.ones(2, 3, dtype=torch.int8)
    for tiny in (1e-40, 0.0, -1.0, float("inf")):
        with pytest.raises(UsageError, match=r"x_scale .* finite and at least 1.2e-38"):
            Quantised(weight, torch.ones(1), x_scale=tiny)
    for scale in (1e36, 1e300):
        with pytest.raises(UsageError, match="may leave float32"):
            QuantisedLinear(Quantised(weight, torch.full((1,), 1e-3), x_scale=scale))


def test_codes_of_quantised_tensors_have_the_same_limit():
    numbers = Quantised(torch.ones(1, 2, dtype=torch.int8), torch.full((1,), 1e-3), out_scale=1e33)
    layer = ProtectedQuantized(numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch._make_per_tensor_quantized_tensor(torch.full((1, 2), 9, dtype=torch.uint8), 1e37, 0)
        with pytest.raises(UsageError, match="may leave float32"):
            layer(x)


def test_a_negated_view_is_read_as_the_numbers_that_it_shows():
    complex_numbers = torch.tensor([[1 + 2j, 3 - 4j], [5 + 6j, -7j]])
    x = complex_numbers.conj().imag
    assert x.is_neg()
    meant = x.resolve_neg().contiguous()
    assert torch.equal(codes_of(x, 0.1, 128), codes_of(meant, 0.1, 128))
    layer = ProtectedLinear(quantise(torch.nn.Linear(2, 3)))
    assert torch.equal(layer(x), layer(meant))
    weight = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.5, 0.25]])
    checksum = row_checksum(weight)
    assert rows_hold(meant @ weight.T, torch._neg_view(-meant), checksum)
    assert rows_hold(torch._neg_view(-meant @ weight.T), meant, checksum)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_unprotected_layers_have_the_models_dtype(dtype, when):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).eval()
    if when == "before":
        model.to(dtype)
    converted = protect(model).model
    if when == "after":
        converted.to(dtype)
    again = unprotect(copy.deepcopy(converted))
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    x = torch.ones(2, 4, dtype=dtype)
    assert again(x).dtype is dtype is converted(x).dtype


def test_a_fused_relu_is_given_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU

        fused = LinearReLU(4, 6)
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(4))
        fused.set_weight_bias(torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8), torch.zeros(6))
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(5))
        wanted = fused(x)
    converted = protect(torch.nn.Sequential(fused))
    again = unprotect(converted.model)
    for model in (converted.model, again):
        assert float(model(x).detach().min()) == 0 and float(wanted.min()) == 0
        assert float((model(x) - wanted).detach().abs().max()) < 0.3
    assert [type(module).__name__ for module in again[0]] == ["Linear", "ReLU"]


def test_numbers_of_another_kind_of_layer_are_not_loaded():
    numbers = quantise(torch.nn.Linear(4, 3))
    make = {
        "dynamic": lambda: ProtectedLinear(numbers),
        "codes": lambda: QuantisedLinear(replace(numbers, x_scale=0.5)),
        "narrow": lambda: QuantisedLinear(replace(numbers, x_scale=0.5, out_scale=3.0)),
        "quantised": lambda: ProtectedQuantized(replace(numbers, out_scale=3.0)),
    }
    fits = {name: {name} for name in make} | {"dynamic": {"dynamic", "codes"}, "codes": {"codes", "narrow"}}
    fits["narrow"] = fits["codes"]
    for into, makes in make.items():
        for given in make:
            layer, state = makes(), make[given]().state_dict()
            if given in fits[into]:
                layer.load_state_dict(state)
                continue
            with pytest.raises(RuntimeError, match="settings are of another kind of layer"):
                layer.load_state_dict(state)
            layer.verify()
            assert layer.state_dict()["crc32"] == makes().state_dict()["crc32"]


def test_damaged_numbers_in_memory_are_told_as_such():
    """Also where such numbers would make no layer."""
    layer = ProtectedLinear(replace(quantise(torch.nn.Linear(4, 3)), x_scale=1e30))
    layer.verify()
    layer.checked.packed.layer.weight_scale.mul_(1e30)
    with pytest.raises(DetectedError, match="in memory changed"):
        layer.verify()
