"""Layers and whole models: taken with reasons, saved, loaded, copied, given back; input digests."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch

from ckptflip.errors import DetectedError, UsageError
from ckptflip.faults import Policy
from ckptflip.protect.gemm.conversion import protect, unprotect
from ckptflip.protect.gemm.faulting import flipped, weight_faults
from ckptflip.protect.gemm.linear import ProtectedLinear, QuantisedLinear
from ckptflip.protect.gemm.quantised import Quantised, codes_of, quantise
from ckptflip.protect.gemm.reading import NotTakenError, is_torchao, read_float


def perceptron():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.ReLU(), torch.nn.Linear(33, 5)).eval()


@pytest.fixture
def x():
    return torch.randn(40, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def quietly():
    """PyTorch warns that its own quantised tensors are deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("scheme", ["exact", "mod127"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_model_is_protected_and_given_back(x, scheme, calibrated):
    plain = perceptron()
    converted = protect(plain, scheme=scheme, calibration=[x] if calibrated else None)
    assert [(layer.name, layer.range) for layer in converted.taken] == [
        (name, "static" if calibrated else "dynamic") for name in ("0", "2")
    ]
    with torch.no_grad():
        wanted = plain(x)
        assert float((converted.model(x) - wanted).abs().max()) < 0.03
        assert float((unprotect(converted.model)(x) - wanted).abs().max()) < 0.03
    assert (converted.detections().calls, converted.detections().faulty) == (2, 0)
    assert type(plain[0]) is torch.nn.Linear


def test_faults_in_a_protected_model_are_told_by_its_layers_name(x):
    converted = protect(perceptron())
    layer = converted.model[2]
    with (
        weight_faults(layer.checked, Policy(bits="6"), seed=2),
        pytest.raises(DetectedError, match=r"^layer 2: .* (does|do) not match"),
    ):
        converted.model(x)
    assert converted.detections().faulty == 1 and 1 in layer.verdict
    converted.model(x)
    assert layer.verdict is None


def test_numbers_are_saved_with_checksums_and_verified_when_loaded(x):
    converted, other = protect(perceptron(), calibration=[x]), protect(perceptron(), calibration=[x * 2])
    stored = io.BytesIO()
    torch.save(converted.model.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored)
    other.model.load_state_dict(state)
    assert torch.equal(other.model(x), converted.model(x))
    for name, part in [
        ("0.weight", "row sums"),
        ("0.sums", "row sums"),
        ("0.bias", "CRC-32"),
        ("2.settings", "CRC-32"),
    ]:
        damaged = copy.deepcopy(state)
        flipped(damaged[name], "tensor", Policy(), seed=3)
        with pytest.raises(DetectedError, match=part):
            other.model.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match=r"0\.crc32"):
        other.model.load_state_dict({k: v for k, v in state.items() if k != "0.crc32"})
    assert torch.equal(other.model(x), converted.model(x))


def test_a_layer_is_copied_and_stays_where_it_is(x):
    layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)))
    again = copy.deepcopy(layer)
    assert again.checked.packed is not layer.checked.packed and torch.equal(again(x), layer(x))
    assert torch.equal(layer.half()(x), again(x)) and layer(x.half()).dtype is torch.float16
    with pytest.raises(UsageError, match="stays on the CPU"):
        layer.to("meta")


def test_any_number_of_leading_dimensions_and_none_of_rows(x):
    layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)))
    assert torch.equal(layer(x.reshape(2, 4, 5, 20)).reshape(40, 4), layer(x))
    assert layer(x[0]).shape == (4,) and layer(x[:0]).shape == (0, 4)


def test_what_is_not_taken_is_named_with_its_reason():
    model = torch.nn.Sequential(
        torch.nn.Embedding(3, 4),
        torch.nn.Linear(4, 4),
        torch.nn.TransformerEncoderLayer(4, 2, 8),
        torch.nn.Bilinear(1, 1, 1),
    )
    converted = protect(model)
    reasons = {layer.name: layer.reason for layer in converted.left}
    assert [layer.name for layer in converted.taken] == ["1"]
    assert reasons["0"] == "not a linear layer" == reasons["3"]
    assert (
        "reads its weight" in reasons["2.linear1"] and "reads its weight" in reasons["2.self_attn.out_proj"]
    )
    hooked = perceptron()
    hooked[0].register_forward_hook(lambda *_: None)
    assert [(layer.name, layer.reason) for layer in protect(hooked).left] == [
        ("0", "it has hooks, which would be lost")
    ]
    with pytest.raises(UsageError, match="has no linear layer"):
        protect(torch.nn.ReLU())
    with pytest.raises(UsageError, match="NaN"):
        bad = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(bad.weight, float("nan"))
        protect(bad)
    with pytest.raises(UsageError, match="no batch"):
        protect(perceptron(), calibration=[])
    with pytest.raises(UsageError, match="protected already"):
        protect(converted.model[1])
    with pytest.raises(UsageError, match="nothing"):
        unprotect(torch.nn.ReLU())


@pytest.mark.usefixtures("quietly")
def test_pytorchs_quantised_layers_are_taken_with_their_results(x):
    plain = perceptron()
    dynamic = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear})
    converted = protect(dynamic)
    assert len(converted.taken) == 2
    assert float((converted.model(x) - dynamic(x)).abs().max()) < 0.02

    torch.backends.quantized.engine = "x86"
    stubs = torch.ao.quantization
    model = torch.nn.Sequential(stubs.QuantStub(), *perceptron(), stubs.DeQuantStub()).eval()
    model.qconfig = stubs.get_default_qconfig("x86")
    prepared = stubs.prepare(stubs.fuse_modules(model, [["1", "2"]]))
    prepared(x)
    static = stubs.convert(prepared)
    converted = protect(static)
    assert [(layer.was, layer.range) for layer in converted.taken] == [
        ("LinearReLU", "given"),
        ("Linear", "given"),
    ]
    step = float(static[3].scale)
    assert float((converted.model(x) - static(x)).abs().max()) <= step * 1.01
    assert float((unprotect(converted.model)(x) - static(x)).abs().max()) <= step * 1.01


def test_int8_weights_of_torchao_are_read_by_their_attributes(x):
    """torchao need not be there: its tensor is played by a class of the same module and attributes."""
    plain = torch.nn.Linear(20, 4)
    numbers = quantise(plain)

    class Int8Tensor(torch.Tensor):
        qdata, scale, zero_point = numbers.weight, numbers.weight_scale[:, None], torch.zeros(4, 1)

    Int8Tensor.__module__ = "torchao.quantization"
    layer = torch.nn.Linear(20, 4)
    layer.weight = torch.nn.Parameter(torch.empty(4, 20).as_subclass(Int8Tensor), requires_grad=False)
    assert is_torchao(layer.weight)
    assert torch.equal(read_float(layer).weight, numbers.weight)
    Int8Tensor.zero_point = torch.ones(4, 1)
    with pytest.raises(NotTakenError, match="zero points"):
        read_float(layer)


def test_digests_find_what_changed_between_two_layers():
    random = torch.Generator().manual_seed(5)
    first = Quantised(
        torch.randint(-128, 128, (12, 20), generator=random, dtype=torch.int8),
        torch.ones(1),
        None,
        0.1,
        3,
        90.0,
        128,
    )
    second = Quantised(
        torch.randint(-128, 128, (4, 12), generator=random, dtype=torch.int8), torch.ones(1), None, 0.1
    )
    one, two = QuantisedLinear(first, digests=True), QuantisedLinear(second, digests=True)
    x = torch.randint(0, 256, (6, 20), generator=random, dtype=torch.uint8)
    codes = one(x)
    sound = two(codes)
    flipped(codes, "codes", Policy(), seed=1)
    with pytest.raises(DetectedError, match="changed after it was made"):
        two(codes)
    assert torch.equal(two(one(x)), sound)
    with torch.inference_mode():
        assert torch.equal(two(one(x)), sound)
    meant = one(x)
    meant += 1
    assert two(meant).shape == sound.shape
    assert torch.equal(two(one(x.reshape(2, 3, 20))).reshape(6, 4), sound)


def test_codes_and_their_sums_are_the_same_with_and_without_the_extension(monkeypatch):
    from ckptflip.protect.gemm import quantised

    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)) * 3
    x[0, 0], x[1, 1], x[2, 2] = float("nan"), float("inf"), -float("inf")
    found = []
    for native in (quantised.kernels(), None):
        monkeypatch.setattr(quantised, "kernels", lambda native=native: native)
        sums = torch.empty(7, dtype=torch.int32)
        found.append((codes_of(x, 0.03, 100, sums), sums))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], found[0][0].sum(1, dtype=torch.int32))


def test_without_the_extension_a_model_is_protected_all_the_same(monkeypatch):
    asked = (
        "import torch; from ckptflip.protect.gemm.conversion import protect; torch.manual_seed(0); "
        "c = protect(torch.nn.Linear(9, 3), scheme='mod127'); c.model(torch.rand(4, 9)); "
        "print(c.detections(), c.model.checked.packed.plan)"
    )
    monkeypatch.setenv("CKPTFLIP_NATIVE", "0")
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said.startswith("Detections(calls=1, faulty=0") and said.endswith("None\n")


@pytest.mark.parametrize(
    "given",
    [
        torch.rand(4, 15),
        torch.rand(40, 2),
        torch.rand(2, 2, 10),
        torch.tensor(1.0),
        torch.rand(0, 3),
        torch.ones(2, 20, dtype=torch.int64),
        torch.ones(2, 20, dtype=torch.complex64),
    ],
)
def test_other_inputs_are_refused_in_words(given):
    layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)), name="fc1")
    with pytest.raises(UsageError, match=r"^layer fc1 takes .* of shape \(…, 20\), not"):
        layer(given)


def test_codes_of_another_width_are_refused_in_words():
    layer = QuantisedLinear(Quantised(torch.ones(3, 4, dtype=torch.int8), torch.ones(1), x_scale=0.5))
    with pytest.raises(UsageError, match="of shape"):
        layer(torch.zeros(2, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_compiled_model_has_the_same_results_counts_and_errors(x, calibrated):
    """Layers are left out of the graph: silently, and with no compilation anew from call to call."""
    converted = protect(perceptron(), calibration=[x] if calibrated else None)
    wanted, layer = converted.model(x), converted.model[2]
    torch._dynamo.reset()
    compiled = torch.compile(converted.model, backend="eager")
    with torch.no_grad():
        compiled(x)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(compiled(x), wanted) and layer.verdict is None
        assert converted.detections().calls == 8
        with weight_faults(layer.checked, Policy(bits="6"), seed=2):
            with pytest.raises(DetectedError, match=r"^layer 2: .* (does|do) not match"):
                compiled(x)
            assert 1 in layer.verdict
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(converted.model, backend="eager", fullgraph=True)(x)


def test_codes_keep_their_digests_in_a_compiled_model():
    random = torch.Generator().manual_seed(5)
    weight = torch.randint(-128, 128, (12, 12), generator=random, dtype=torch.int8)
    narrow = Quantised(weight, torch.ones(1), None, 0.1, 3, 90.0, 128)
    layers = [QuantisedLinear(narrow, digests=True) for _ in range(2)]
    x = torch.randint(0, 256, (6, 12), generator=random, dtype=torch.uint8)

    def model(x):
        made = layers[0](x)
        flipped_outside(made)
        return layers[1](made)

    flipped_outside = torch.compiler.disable(lambda made: flipped(made, "codes", Policy(), seed=1))
    with pytest.raises(DetectedError, match="changed after it was made"):
        torch.compile(model, backend="eager")(x)


def test_an_input_that_wants_gradients_is_no_warning():
    layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)))
    assert not layer(torch.rand(2, 20, requires_grad=True)).requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_and_biases_are_finite(bad):
    weight, two = torch.ones(2, 3, dtype=torch.int8), torch.tensor([1.0, bad])
    with pytest.raises(UsageError, match=r"weight_scale .* finite"):
        Quantised(weight, two)
    with pytest.raises(UsageError, match=r"bias .* finite"):
        Quantised(weight, torch.ones(2), two)


def test_a_state_without_tensors_is_named():
    model = protect(torch.nn.Sequential(torch.nn.Linear(20, 4))).model
    for name in model.state_dict():
        with pytest.raises(RuntimeError, match=f"{name}: tensors are due"):
            model.load_state_dict(model.state_dict() | {name: None})


def test_what_is_no_model_is_refused():
    with pytest.raises(UsageError, match="not str"):
        protect("model")


def test_numbers_that_no_product_covers_are_verified_in_memory(x):
    for name in ("scales", "shifts"):
        layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)))
        layer.verify()
        flipped(getattr(layer.checked.packed, name), name, Policy(), seed=1)
        layer(x)
        with pytest.raises(DetectedError, match="in memory changed"):
            layer.verify()
    layer = ProtectedLinear(quantise(torch.nn.Linear(20, 4)))
    flipped(layer.checked.packed.layer.weight_scale, "scale", Policy(), seed=1)
    with pytest.raises(DetectedError, match="in memory changed"):
        layer.verify()


def test_a_processor_that_saturates_gets_weights_that_fit(monkeypatch):
    """oneDNN is told to use AVX2 alone, which adds products of 8 bits in 16."""
    asked = (
        "import torch; from ckptflip.protect.gemm.processor import saturates; "
        "from ckptflip.protect.gemm.conversion import protect; torch.manual_seed(0); "
        "from ckptflip.protect.gemm.packing import pack; "
        "from ckptflip.protect.gemm.quantised import Quantised; "
        "c = protect(torch.nn.Linear(300, 30)); c.model(torch.rand(50, 300)); "
        "print(saturates(), c.detections().faulty); "
        "pack(Quantised(torch.full((4, 4), 65, dtype=torch.int8), torch.ones(1)))"
    )
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    if not done.stdout.startswith("True"):
        pytest.skip("oneDNN multiplies exactly here whatever it is told")
    assert done.stdout == "True 0\n" and "from -64 to 64" in done.stderr
