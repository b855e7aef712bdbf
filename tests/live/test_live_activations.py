"""Faults in what modules give: exact, keyed on (seed, call, place), in place where nobody is hurt."""

import copy
import dataclasses
import threading
from collections import namedtuple

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from blocks import Gives, bits, hooks_of, same, state_of

from ckptflip import live
from ckptflip.errors import LiveError, SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.live.torch_modules import choose

nn = torch.nn
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Held:
    hidden: torch.Tensor
    note: str = "kept"


class Net(nn.Module):
    """Convolutions, a normalisation, a tied layer called twice, a skip connection, an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.conv2
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * 36, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = x + self.conv2(x) + self.again(x)
        return self.fc(self.flatten(x))


def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)


def heard(model, module, *inputs):
    """What a module gives in one call of the model, to whatever comes after it, and after all faults."""
    got = []

    def listen(*_):
        # Hooks run in the order in which they were put on, and those of a block are put on in each call.
        handles.append(module.register_forward_hook(lambda m, a, out: got.append(out.clone())))

    handles = [model.register_forward_pre_hook(listen)]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return got


@pytest.mark.parametrize("name", ["conv1", "bn1", "fc"])
def test_an_output_changes_as_the_record_says_and_nothing_else(name):
    model = net()
    module = model.get_submodule(name)
    before = [t.clone() for t in state_of(model)]
    clean = heard(model, module, X)
    with live.faults(model, Policy(count=5), seed=7, activations=name) as block:
        got = heard(model, module, X)
    (record,) = block.records
    (entry,) = record.header.tensors
    assert entry.name == f"activations/{name}" and entry.shape == tuple(got[0].shape)
    found = bits(clean[0]) ^ bits(got[0])
    assert np.bitwise_count(found).sum() == record.bits_effective == 5
    assert (np.flatnonzero(found) == record.plan.word).all()
    assert (bits(got[0])[record.plan.word] == record.plan.after).all()
    assert same(before, state_of(model)) and not hooks_of(model)
    assert [(c.name, c.called, c.fired, c.hit, c.effective) for c in block.counts()] == [
        (f"activations/{name}", 1, 1, 5, 5)
    ]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
        *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "scalar", "expanded"])
def test_outputs_of_every_kind(dtype, layout):
    raw = (
        torch.arange(1, 193, dtype=torch.uint8).view(dtype)
        if dtype != torch.bool
        else torch.arange(24) % 3 == 0
    )
    value = {
        "contiguous": lambda: raw.clone(),
        "transposed": lambda: raw.clone()[:12].view(3, 4).T,
        "scalar": lambda: raw.clone()[5],
        "expanded": lambda: raw.clone()[:3, None].expand(3, 4),
    }[layout]
    model = nn.Sequential(Gives(lambda _: value()))
    with live.faults(model, Policy(count=3 if layout != "scalar" else 1), seed=3, activations="0") as block:
        got = model(None)
    (record,) = block.records
    found = bits(value()) ^ bits(got)
    assert (np.flatnonzero(found) == record.plan.word).all() and np.bitwise_count(
        found
    ).sum() == record.bits_hit
    assert got.shape == value().shape and got.dtype == dtype


def test_draws_depend_on_seed_call_and_place_alone():
    model = net()

    def plans(**options):
        with torch.no_grad(), live.faults(model, Policy(count=2), **options) as block:
            for _ in range(3):
                model(X)
        return {
            (record.header.output, record.header.tensors[tensor].name): record.plan.word[rows].tolist()
            for record in block.records
            for tensor, rows in record.plan.by_tensor()
        }

    every = plans(seed=1, activations=["conv*", "fc"])
    assert len(every) == 3 * 4 and len({str(words) for words in every.values()}) == 12
    assert plans(seed=1, activations=["conv*", "fc"]) == every
    assert plans(seed=2, activations=["conv*", "fc"]) != every
    alone = plans(seed=1, activations="fc")
    assert alone == {key: words for key, words in every.items() if key[1] == "activations/fc"}
    third = plans(seed=1, activations=["conv*", "fc"], calls=2)
    assert third == {key: words for key, words in every.items() if key[0] == "call 000002"}


def test_every_passing_of_a_shared_module_is_hit_by_itself():
    model = net()
    with torch.no_grad(), live.faults(model, Policy(), seed=1, activations="again") as block:
        model(X)
    assert [t.name for t in block.records[0].header.tensors] == ["activations/conv2", "activations/conv2@2"]
    assert block.counts()[0].fired == 2


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x: (x, [x * 2, None]), ["0", "1/0"]),
        (lambda x: {"a": x, "b": {"c": x * 2}, "n": 3}, ["a", "b/c"]),
        (lambda x: Pair(x, x * 2), ["0", "1"]),
        (lambda x: Held(x), ["hidden"]),
        (lambda x: torch.max(x, 0), ["0", "1"]),
        (lambda x: nn.utils.rnn.pack_sequence([x[:3], x[:2]]), ["data"]),
    ],
)
def test_nested_outputs(make, names):
    def value():
        return make(torch.arange(24.0).reshape(6, 4))

    model = nn.Sequential(Gives(lambda _: value()))
    with live.faults(model, Policy(ber=0.3), seed=1, activations="0") as block:
        got = model(None)
    (record,) = block.records
    assert [t.name for t in record.header.tensors] == [f"activations/0/{name}" for name in names]
    assert type(got) is type(value())
    from ckptflip.live.torch_values import leaves

    for (path, now), (_, before) in zip(leaves(got), leaves(value()), strict=True):
        entry = names.index(path)
        rows = record.plan.tensor == entry
        assert (np.flatnonzero(bits(now) ^ bits(before)) == record.plan.word[rows]).all()


def test_the_parts_of_a_recurrent_layer():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    x = torch.rand(5, 2, 3)
    with torch.no_grad(), live.faults(model, Policy(ber=0.1), seed=1, activations="") as block:
        model(x)
    assert [t.name for t in block.records[0].header.tensors] == [
        "activations/0",
        "activations/1/0",
        "activations/1/1",
    ]


@pytest.mark.parametrize("same_object", [True, False])
def test_one_tensor_at_two_places_is_one(same_object):
    def value():
        x = torch.zeros(8)
        return (x, x if same_object else x.clone())

    model = nn.Sequential(Gives(lambda _: value()))
    with live.faults(model, Policy(fraction=1), seed=1, activations="0") as block:
        first, second = model(None)
    assert (first is second) == same_object and block.effective == (256 if same_object else 512)


def test_layers_are_hit_where_they_are_and_others_in_a_copy():
    keep = torch.zeros(3)
    model = nn.Sequential(
        nn.Linear(3, 3), nn.Identity(), nn.Flatten(), nn.ReLU(inplace=True), Gives(lambda x: keep)
    )
    seen = []
    for module in model:
        module.register_forward_hook(lambda m, a, out: seen.append(out))
    x = torch.ones(2, 3)
    with torch.no_grad(), live.faults(model, Policy(bits="sign"), seed=1, activations=True) as block:
        result = model(x)
    assert block.effective == 5
    # The first listener had the linear layer's own result, which was then altered where it is.
    assert block.records[0].plan.before[0] != bits(seen[0])[block.records[0].plan.word[0]]
    assert (bits(keep) == 0).all() and np.bitwise_count(bits(result)).sum() == 1
    assert (x == 1).all()


def test_an_identity_hurts_neither_the_input_nor_the_skip_connection():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.identity = nn.Identity()

        def forward(self, x):
            return x, self.identity(x)

    x = torch.ones(4)
    model = Skip()
    with live.faults(model, Policy(bits="sign"), seed=1, activations="identity"):
        straight, through = model(x)
    assert (straight == 1).all() and (through == -1).sum() == 1 and (x == 1).all()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear3d": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "bare linear": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 2, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 2, 4, 4)),
    "batchnorm": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(2), (3, 2, 4, 4)),
    "layernorm": (lambda: nn.LayerNorm(6), (4, 6)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "relu": (lambda: nn.ReLU(), (4, 6)),
    "relu in place": (lambda: nn.ReLU(inplace=True), (4, 6)),
    "sigmoid": (lambda: nn.Sigmoid(), (4, 6)),
    "tanh": (lambda: nn.Tanh(), (4, 6)),
    "gelu": (lambda: nn.GELU(), (4, 6)),
    "softmax": (lambda: nn.Softmax(-1), (4, 6)),
    "logsoftmax": (lambda: nn.LogSoftmax(-1), (4, 6)),
    "softplus": (lambda: nn.Softplus(), (4, 6)),
    "elu": (lambda: nn.ELU(), (4, 6)),
    "maxpool": (lambda: nn.MaxPool2d(2), (2, 2, 6, 6)),
    "avgpool": (lambda: nn.AvgPool2d(2), (2, 2, 6, 6)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(1), (2, 2, 6, 6)),
    "flatten": (lambda: nn.Flatten(), (2, 2, 3)),
    "identity": (lambda: nn.Identity(), (4, 6)),
    "bilinear": (lambda: nn.Bilinear(6, 6, 3), (4, 6)),
    "normalised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), (4, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_the_faulty_value(kind):
    """A fault is a constant that is added to what the layer gives, whether that was hit or a copy."""
    make, shape = LAYERS[kind]

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first = nn.Linear(shape[-1], shape[-1])
            self.layer = make()
            self.shift = None

        def forward(self, x):
            x = self.first(x)
            y = self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x)
            if self.shift is not None:
                y = y + self.shift
            self.got = y
            return (y * y.detach().cos() + y.tanh()).sum()

    def gradients(model, x):
        x = x.clone().requires_grad_()
        model(x).backward()
        return model.got.detach().clone(), [x.grad, *(p.grad for p in model.parameters())]

    torch.manual_seed(2)
    x = torch.randn(shape)
    reference, hit = Around(), Around()
    clean, _ = gradients(copy.deepcopy(reference), x)
    policy = Policy(bits="20-24,sign", count=4)
    with live.faults(hit, policy, seed=5, activations="layer") as block:
        faulty, found = gradients(hit, x)
    assert block.effective == 4 and (faulty != clean).sum() > 1
    reference.shift = faulty - clean
    _, expected = gradients(reference, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_in_place_layer_after_the_one_that_is_hit():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 2))
    x = torch.rand(1, 1, 6, 6)
    with live.faults(model, Policy(count=3), seed=1, activations=["0", "1"]) as block:
        model(x).sum().backward()
    assert block.effective == 6 and model[0].weight.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode):
    model = net()
    results = []
    for _ in range(2):
        with mode(), live.faults(model, Policy(count=3), seed=1, activations=["conv*", "relu", "flatten"]):
            results.append(model(X).detach().clone())
    assert same(*[[r] for r in results])


def test_mixed_precision():
    model = net()
    with (
        torch.autocast("cpu", torch.bfloat16),
        live.faults(model, Policy(), seed=1, activations="conv*") as block,
    ):
        model(X)
    assert {t.dtype for t in block.records[0].header.tensors} == {"bfloat16"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_cannot_be_hit_is_said_by_name():
    quantised = Gives(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8))
    sparse = Gives(lambda x: x.to_sparse())
    for inner, why in ((quantised, "a quantised tensor, which"), (sparse, "sparse or nested")):
        model = nn.Sequential(inner)
        with (
            pytest.raises(LiveError, match=f"activations/0 cannot be hit: it is {why}.*'!0' too"),
            live.faults(model, Policy(), seed=1, activations="0"),
        ):
            model(torch.ones(2, 2))
        assert not hooks_of(model)


def test_more_faults_than_bits_and_bits_that_are_not_there():
    model = nn.Sequential(nn.Linear(2, 1))
    for policy, said in (
        (Policy(count=65), "activations/0: count 65 is larger"),
        (Policy(bits="40"), "has bits"),
    ):
        with (
            pytest.raises(SelectionError, match=said),
            live.faults(model, policy, seed=1, activations="0"),
            torch.no_grad(),
        ):
            model(torch.ones(2, 2))
        assert not hooks_of(model)


def test_guards_hold_for_activations():
    model = nn.Sequential(nn.Linear(4, 64))
    policy = Policy(bits="exponent", count=60, forbid=("nan", "inf", "extreme:100"))
    with torch.no_grad(), live.faults(model, policy, seed=1, activations="0") as block:
        assert model(torch.ones(1, 4)).abs().max() <= 100
    assert block.effective == 60


def test_shapes_may_change_from_call_to_call():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad(), live.faults(model, Policy(), seed=1, activations="0") as block:
        for n in (1, 5, 1, 0, 2, *range(40)):
            model(torch.ones(n, 4))
    shapes = [record.header.tensors[0].shape[0] for record in block.records]
    assert shapes == [1, 5, 1, 2, *range(1, 40)]
    assert block.counts()[0].called == 45 and block.counts()[0].fired == 43


class TestChoosing:
    def names(self, model, wanted):
        return [chosen.name for chosen in choose(model, wanted, "activations")]

    def test_names_globs_and_classes(self):
        model = nn.Sequential(net(), nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()))
        assert self.names(model, "1") == ["1"]
        assert self.names(model, "conv*") == ["0.conv1", "0.conv2"]
        assert self.names(model, "1.*") == ["1.0", "1.1"]
        assert self.names(model, [nn.Conv2d, "!*.conv2"]) == ["0.conv1", "1.0"]
        assert self.names(model, nn.Conv2d) == ["0.conv1", "0.conv2", "1.0"]
        assert "1" not in self.names(model, True) and len(self.names(model, True)) == 9
        assert self.names(model, ["!0.*"]) == ["1.0", "1.1"]

    def test_layers_that_do_their_parts_work_themselves(self):
        attention = nn.MultiheadAttention(4, 2)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        assert self.names(nn.Sequential(attention, normed), True) == ["0", "1"]

    @pytest.mark.parametrize(
        ("wanted", "error", "said"),
        [
            ("conv3", SelectionError, "did you mean 'conv"),
            ("0.cnv1", SelectionError, "did you mean '"),
            (nn.LSTM, SelectionError, "has no LSTM; its layers are BatchNorm2d, Conv2d"),
            (["conv*", "!conv*"], SelectionError, "takes away again"),
            (7, UsageError, "names modules"),
            ([], UsageError, "names modules"),
        ],
    )
    def test_what_matches_nothing(self, wanted, error, said):
        with pytest.raises(error, match=said):
            choose(net(), wanted, "activations")


def test_a_model_in_two_threads_at_once_is_refused():
    model = nn.Sequential(Gives(lambda x: x), nn.Linear(2, 2))
    errors = []

    def call_again():
        try:
            model(torch.ones(1, 2))
        except LiveError as error:
            errors.append(str(error))

    def inside(x):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=call_again)
            thread.start()
            thread.join()
        return x

    model[0].function = inside
    with live.faults(model, Policy(), seed=1, activations="1"):
        model(torch.ones(1, 2))
    assert len(errors) == 1 and "two threads" in errors[0]


def test_a_model_that_calls_itself_is_one_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x, deep=True):
            return self(self.fc(x), False) if deep else self.fc(x)

    model = Twice()
    with live.faults(model, Policy(), seed=1, activations="fc") as block:
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    assert block.calls == 2 and [len(r.header.tensors) for r in block.records] == [2, 2]


def test_blocks_inside_each_other():
    model = net()
    with torch.no_grad(), live.faults(model, Policy(count=2), seed=1, activations="fc") as one:
        model(X)
        with live.faults(model, Policy(count=3), seed=2, activations=["fc", "conv1"]) as other:
            model(X)
        model(X)
    assert (one.calls, one.effective, other.calls, other.effective) == (3, 6, 1, 6)
    assert not hooks_of(model)


def test_a_copy_of_the_model_takes_no_live_hooks_along():
    model = net()
    with torch.no_grad():
        clean = model(X)
        with live.faults(model, Policy(), seed=1, activations="fc") as block:
            model(X)
            twin = copy.deepcopy(model)
        calls = len(block.records)
        assert same([twin(X)], [clean]) and len(block.records) == calls
