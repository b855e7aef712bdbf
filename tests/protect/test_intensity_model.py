"""Whole models: the choice is the cheapest as measured, said and used; policies; what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.errors import DetectedError, UsageError
from ckptflip.protect.intensity import SCHEMES, CheckedLinear, confirming, protect, times
from ckptflip.protect.intensity import model as model_module
from ckptflip.protect.intensity.calibration import BUCKETS, bucket, timed
from ckptflip.protect.intensity.choice import TIE, Choice, cheapest
from ckptflip.protect.intensity.roofline import Balance, Shape, measured_balance
from ckptflip.protect.native import kernels

BALANCE = Balance(1e11, 1e10)


def mlp(*sizes):
    torch.manual_seed(0)
    parts = [part for k, n in pairwise(sizes) for part in (torch.nn.Linear(k, n), torch.nn.ReLU())]
    return torch.nn.Sequential(*parts).eval()


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Times that a test tells instead of measuring: seconds by scheme, or a function of the rows."""

    def tell(seconds):
        def measured(weight, bias, rows, schemes):
            return seconds(rows) if callable(seconds) else dict(seconds)

        monkeypatch.setattr(times, "measured", measured)
        monkeypatch.setattr(times, "measured_balance", lambda device, dtype: BALANCE)
        monkeypatch.setattr(model_module, "better", lambda *arguments: None)
        return tmp_path

    return tell


seconds = st.floats(1e-6, 1e-2)


@given(
    none=seconds,
    checked=st.dictionaries(st.sampled_from(["global", "row", "tile", "replication"]), seconds, min_size=1),
)
def test_the_choice_is_the_cheapest(none, checked):
    picked = cheapest({"none": none, **checked})
    assert checked[picked] <= min(checked.values()) + TIE * none
    if picked != min(checked, key=checked.__getitem__):
        # Only a finer scheme may cost that little more.
        order = ["tile", "row", "replication", "global"]
        assert order.index(picked) <= min(
            order.index(n) for n, t in checked.items() if t == min(checked.values())
        )


def test_a_model_is_protected_by_real_measurement(tmp_path):
    model, x = mlp(13, 32, 16, 1), torch.rand(4, 13)
    protected = protect(model, x, batches=(1, 4), cache_folder=tmp_path)
    assert [(c.layer, c.shape.rows) for c in protected.choices] == [
        (n, m) for n in ("0", "2", "4") for m in (1, 4)
    ]
    for choice in protected.choices:
        assert set(choice.seconds) == {"none", "global", "row", "replication"} | (
            {"tile"} if kernels() else set()
        )
        assert cheapest(choice.seconds) == (choice.alone or choice.scheme)
    with torch.no_grad():
        assert torch.allclose(protected.model(x), model(x), atol=1e-5)
    assert (protected.detections().calls, protected.detections().faulty) == (3, 0)
    again = protect(model, x, batches=(1, 4), cache_folder=tmp_path)
    assert [choice.seconds for choice in again.choices] == [choice.seconds for choice in protected.choices]


def test_each_number_of_rows_takes_the_choice_of_its_bucket(told):
    by_rows = {1: "replication", 64: "global", 4096: "row"}
    folder = told(
        lambda rows: {"none": 1.0, **{s: 2.0 - (by_rows[rows] == s) * 0.9 for s in by_rows.values()}}
    )
    protected = protect(mlp(4, 3), torch.rand(8, 4), batches=(1, 64, 4096), cache_folder=folder)
    layer = protected.model[0]
    assert [layer.scheme_for(rows) for rows in (1, 2, 33, 64, 65, 1000, 3000, 99999)] == [
        *("replication", "replication", "global", "global", "global", "row", "row", "row")
    ]
    assert layer(torch.rand(0, 4)).shape == (0, 3)
    assert layer(torch.rand(2, 5, 4)).shape == (2, 5, 3)
    assert layer(torch.rand(4)).shape == (3,)


def test_rows_of_a_layer_may_be_more_than_the_batch(told):
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).mean(1)

    folder = told({"none": 1.0, "row": 1.1})
    protected = protect(Tokens(), torch.rand(2, 16, 4), batches=(1, 2, 8), cache_folder=folder)
    assert [choice.shape.rows for choice in protected.choices] == [16, 32, 128]


def test_the_table_says_what_was_chosen_and_why(told):
    folder = told({"none": 1.0, "global": 1.10, "row": 1.25, "replication": 2.0})
    protected = protect(mlp(512, 256), torch.rand(64, 512), cache_folder=folder)
    head, line = protected.table().splitlines()
    assert " ".join(head.split()) == "layer m n k FLOP/B scheme global row replication reason"
    said, _, reason = " ".join(line.split()).partition("% 23.3 FLOP/B, ")
    assert said == "0 64 256 512 23.3 global +10.0% +25.0% +100.0"
    assert reason == (
        "device 10: bound by arithmetic; global: one sum for the layer, in one pass over inputs and results; "
        "next row, +15.0% of the layer"
    )


def test_memory_bound_layers_are_called_so():
    choice = Choice("fc", "fc", Shape(1, 512, 512), "row", {"none": 1.0, "row": 1.1}, BALANCE)
    assert choice.reason.startswith("0.498 FLOP/B, device 10: bound by memory; row: ")
    assert choice.overhead("row") == pytest.approx(0.1) and choice.overhead("tile") is None


def test_one_scheme_for_all_is_taken_where_the_whole_model_is_faster(told, monkeypatch):
    folder = told(lambda rows: {"none": 1.0, "global": 1.1, "row": 1.2, "replication": 2.0})
    monkeypatch.setattr(model_module, "better", confirming.better)
    for whole, expected in ({"": 1.0, "row": 0.96}, "row"), ({"": 1.0, "row": 0.98}, "global"):
        monkeypatch.setattr(
            confirming, "timed", lambda calls, device, whole=whole: {n: whole.get(n, 3.0) for n in calls}
        )
        protected = protect(mlp(4, 3, 2), torch.rand(8, 4), batches=(8, 16), cache_folder=folder)
        assert {choice.scheme for choice in protected.choices} == {expected}
        assert protected.model[0].scheme_for(8) == expected
    protected = protect(mlp(4, 3), torch.rand(8, 4), confirm=False, cache_folder=folder)
    assert protected.choices[0].scheme == "global"


def test_only_the_schemes_asked_for_are_chosen_from(told):
    folder = told({"none": 1.0, "global": 1.1, "row": 1.2, "replication": 2.0})
    protected = protect(mlp(4, 3), torch.rand(2, 4), schemes=["row", "replication"], cache_folder=folder)
    assert protected.choices[0].scheme == "row" and set(protected.choices[0].seconds) == {
        "none",
        "row",
        "replication",
    }


def test_the_given_model_stays_as_it_is(told):
    model = mlp(4, 3, 2).train()
    protect(model, torch.rand(2, 4), cache_folder=told({"none": 1.0, "row": 1.1}))
    assert type(model[0]) is torch.nn.Linear and model.training and model[0].training
    assert model[0].weight.requires_grad and not model[0]._forward_pre_hooks


def test_a_layer_used_twice_is_replaced_in_both_places(told):
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.ReLU(), shared)
    protected = protect(model, torch.rand(2, 4), cache_folder=told({"none": 1.0, "row": 1.1}))
    assert protected.model[0] is protected.model[2] and isinstance(protected.model[0], CheckedLinear)
    protected.model(torch.rand(2, 4))
    assert protected.detections().calls == 2


def test_a_layer_alone_is_a_model(told):
    protected = protect(torch.nn.Linear(4, 3), torch.rand(2, 4), cache_folder=told({"none": 1.0, "row": 1.1}))
    assert isinstance(protected.model, CheckedLinear) and protected.choices[0].layer == "linear"


def test_subclasses_and_layers_never_called_are_left_alone(told):
    class Odd(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Odd(4, 4))
    model.spare = torch.nn.Linear(2, 2)
    model.forward = lambda x: model[1](model[0](x))
    seen = protect(
        torch.nn.Sequential(*model[:2]), torch.rand(2, 4), cache_folder=told({"none": 1.0, "row": 1.1})
    )
    assert [type(module).__name__ for module in seen.model] == ["CheckedLinear", "Odd"]
    assert [(left.name, left.reason) for left in seen.left] == [("1", "a subclass of Linear may do more")]
    assert seen.table().endswith("not checked: 1 (Odd): a subclass of Linear may do more")


def test_layers_with_hooks_or_another_forward_are_left_and_named(told):
    model = mlp(4, 4, 4, 4)
    model[0].register_forward_hook(lambda module, inputs, out: 2 * out)
    model[2].forward = lambda x: x
    protected = protect(model, torch.rand(2, 4), cache_folder=told({"none": 1.0, "row": 1.1}))
    assert [(left.name, left.reason) for left in protected.left] == [
        ("0", "it has hooks, which would be lost"),
        ("2", "its forward was replaced"),
    ]
    x = torch.rand(5, 4)
    with torch.no_grad():
        assert torch.equal(protected.model(x), model(x))
    assert protected.detections().calls == 1


class Fast(torch.nn.TransformerEncoderLayer):
    """Reads its weights as PyTorch's does."""


class Reading(torch.nn.Module):
    """Reads the weight of a layer, unless that has hooks."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(16, 16)

    def forward(self, x):
        if self.fc._forward_pre_hooks:
            return self.fc(x)
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("kind", [torch.nn.TransformerEncoderLayer, Fast])
def test_layers_that_are_read_without_being_called_are_left_and_named(told, kind):
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoder(
        kind(16, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )
    model = torch.nn.Sequential(encoder, Reading(), torch.nn.Linear(16, 4)).eval()
    x = torch.rand(3, 5, 16)
    protected = protect(model, x, cache_folder=told({"none": 1.0, "row": 1.1}))
    assert [choice.layer for choice in protected.choices] == ["2"]
    reasons = {left.name: left.reason for left in protected.left}
    assert reasons.pop("1.fc") == "it was not called with the example"
    parts = ("self_attn.out_proj", "linear1", "linear2")
    assert reasons == {
        f"0.layers.{n}.{part}": "the module around it reads its weight without calling it"
        for n in (0, 1)
        for part in parts
    }
    with torch.no_grad():
        assert torch.equal(protected.model(x), model(x))
    assert protected.detections().calls == 1


def test_a_model_of_layers_that_cannot_be_checked_is_refused_with_reasons(tmp_path):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with pytest.raises(UsageError, match=r"linear1 \(Linear\): the module around it reads its weight"):
        protect(layer, torch.rand(3, 5, 16), cache_folder=tmp_path)
    assert not any("forward" in vars(module) for module in layer.modules())


def test_a_protected_model_is_not_protected_again(told):
    folder = told({"none": 1.0, "row": 1.1})
    protected = protect(mlp(4, 3), torch.rand(2, 4), cache_folder=folder)
    with pytest.raises(UsageError, match="it is protected already"):
        protect(protected.model, torch.rand(2, 4), cache_folder=folder)


AUTOCAST = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-40, 1e-9, 1e-5, 1.0, 100.0])
def test_autocast_raises_no_alarm_and_keeps_its_results(scheme, dtype, size):
    if scheme == "tile" and kernels() is None:
        pytest.skip("the extension was not built")
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).requires_grad_(False)
    for factor in (1e-6, 1.0, 100.0):
        layer.weight *= factor
        checked = CheckedLinear(layer, scheme, on_error="count")
        with torch.autocast("cpu", dtype):
            for _ in range(10):
                x = size * torch.randn(16, 64)
                out = checked(x)
                assert out.dtype is dtype and torch.equal(out, layer(x))
        seen = checked.detections
        assert (seen.calls, seen.faulty, seen.unchecked) == (10, 0, 0)


@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("scheme", ["global", "row", "tile"])
def test_autocast_finds_damage_of_the_weight(scheme, dtype):
    if scheme == "tile" and kernels() is None:
        pytest.skip("the extension was not built")
    torch.manual_seed(0)
    checked, x = CheckedLinear(torch.nn.Linear(64, 32), scheme, name="fc"), torch.randn(4, 64)
    checked.weight[3, 5] += 1000
    with torch.autocast("cpu", dtype), pytest.raises(DetectedError, match="layer fc: a fault was found"):
        checked(x)


def test_what_overflows_under_autocast_alone_is_counted_as_unchecked():
    x, large = torch.ones(2, 4), torch.nn.Linear(4, 3).requires_grad_(False)
    large.weight[1, 2] = 1e5
    for layer, rows in ((torch.nn.Linear(4, 3), 1e5 * x), (large, 0 * x), (large, x)):
        checked = CheckedLinear(layer, "row")
        checked(rows)
        with torch.autocast("cpu", torch.float16):
            checked(rows)
        assert (checked.detections.faulty, checked.detections.unchecked) == (0, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_views_with_a_sign_of_their_own_are_read_as_they_are_meant(scheme):
    if scheme == "tile" and kernels() is None:
        pytest.skip("the extension was not built")
    layer = torch.nn.Linear(8, 4).requires_grad_(False)
    x = torch.complex(torch.rand(2, 8), torch.rand(2, 8)).conj().imag
    checked = CheckedLinear(layer, scheme)
    assert x.is_neg() and torch.equal(checked(x), layer(x)) and torch.equal(checked(input=x), layer(x))
    layer.weight.data = torch._neg_view(layer.weight.data)
    assert torch.allclose(CheckedLinear(layer, scheme)(x.resolve_neg()), layer(x))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("none", "replication")])
@pytest.mark.parametrize("on_error", ["raise", "count", "recompute"])
def test_a_damaged_weight_meets_the_policy(scheme, on_error):
    if SCHEMES[scheme].unfit(CheckedLinear(torch.nn.Linear(4, 3), "row")._prepared):
        pytest.skip("the compiled kernels were not built")
    layer, x = torch.nn.Linear(4, 3), torch.ones(5, 4)
    checked = CheckedLinear(layer, scheme, on_error=on_error, name="fc")
    clean = checked(x)
    memory = checked._prepared.fast.packed if scheme == "tile" else checked.weight
    memory.data.reshape(-1)[0] += 1000
    if on_error == "count":
        assert not torch.equal(checked(x), clean) and checked.detections.faulty == 1
    else:
        with pytest.raises(DetectedError, match=r"^layer fc: a fault was found.*rounding explains"):
            checked(x)
    assert (checked.detections.calls, checked.detections.recomputed) == (2, 0)
    checked.refresh()
    checked(x)
    assert checked.detections.faulty == 1


def test_recompute_repairs_what_does_not_come_back(monkeypatch):
    from ckptflip.protect.intensity import schemes

    checked, x = CheckedLinear(torch.nn.Linear(4, 3), "row", on_error="recompute"), torch.ones(5, 4)
    clean, product, calls = checked(x), schemes.linear, []

    def once(*arguments):
        calls.append(1)
        return product(*arguments) + (1000.0 if len(calls) == 1 else 0.0)

    monkeypatch.setattr(schemes, "linear", once)
    assert torch.equal(checked(x), clean)
    seen = checked.detections
    assert (seen.calls, seen.faulty, seen.recomputed, seen.unchecked) == (2, 1, 1, 0)


def test_what_cannot_be_judged_is_counted():
    checked = CheckedLinear(torch.nn.Linear(4, 3), "row")
    checked(torch.full((2, 4), float("nan")))
    assert (checked.detections.unchecked, checked.detections.faulty) == (1, 0)


@pytest.mark.parametrize(
    "scheme", [s for s in ("global", "row", "tile", "replication") if s != "tile" or kernels()]
)
def test_copied_loaded_and_moved_layers_check_what_they_hold_now(scheme):
    checked, x = CheckedLinear(torch.nn.Linear(4, 3), scheme), torch.rand(5, 4)
    other = torch.nn.Linear(4, 3)
    copied = copy.deepcopy(checked)
    copied.load_state_dict(other.state_dict())
    assert torch.allclose(copied(x), other(x)) and not torch.allclose(checked(x), other(x))
    if scheme != "tile":
        wide = copy.deepcopy(copied).double()
        assert (
            torch.allclose(wide(x.double()), other.double()(x.double()))
            and wide(x.double()).dtype is torch.float64
        )


def test_state_is_that_of_the_layer():
    layer = torch.nn.Linear(4, 3)
    checked = CheckedLinear(layer, "row")
    assert checked.state_dict().keys() == layer.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in checked.parameters())
    assert "in_features=4, out_features=3, schemes=row" in repr(checked)
    assert CheckedLinear(torch.nn.Linear(4, 3, bias=False), "row").bias is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schemes": ["rows"]}, "'rows' is no scheme"),
        ({"on_error": "ignore"}, "'ignore' is no policy"),
        ({"batches": []}, "one at least"),
        ({"batches": 5}, "a list of whole numbers from 1 on, one at least, not 5"),
        ({"batches": [0]}, "whole numbers from 1 on"),
        ({"batches": [1.5]}, "whole numbers from 1 on"),
        ({"batches": ["4"]}, "whole numbers from 1 on"),
        ({"model": "text"}, "not str"),
        ({"example": "text"}, "holds no tensor"),
        ({"example": torch.rand(0, 4)}, "holds no tensor"),
        ({"model": torch.nn.ReLU()}, "nothing to protect: the model has no torch.nn.Linear"),
        (
            {"model": torch.nn.Linear(4, 3, dtype=torch.float64), "schemes": ["tile"]},
            "layer linear: none of the schemes",
        ),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    dtype = torch.float64 if "model" in arguments else torch.float32
    given = {
        "model": mlp(4, 3),
        "example": torch.rand(2, 4, dtype=dtype),
        "cache_folder": tmp_path,
        **arguments,
    }
    with pytest.raises(UsageError, match=message):
        protect(given.pop("model"), given.pop("example"), **given)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (2, 2, 4), (7,), ()])
def test_inputs_of_another_width_are_refused_before_they_are_read(scheme, shape):
    if scheme == "tile" and kernels() is None:
        pytest.skip("the extension was not built")
    layer = CheckedLinear(torch.nn.Linear(8, 4), scheme, name="fc1")
    with pytest.raises(UsageError, match="layer fc1 takes 8 features"):
        layer(torch.rand(shape))


def test_buckets_are_powers_of_two():
    assert [2**power for power in range(13)] == list(BUCKETS)
    assert all(bucket(rows) >= rows > bucket(rows) // 2 for rows in range(2, 4097))
    assert bucket(1) == bucket(0) == 1 and bucket(10**6) == 4096


def test_every_call_is_timed_and_the_slower_takes_longer():
    found = timed({"a": lambda: None, "b": lambda: sum(range(2000))}, torch.device("cpu"))
    assert 0 < found["a"] < found["b"]


def test_the_balance_is_measured():
    balance = measured_balance(torch.device("cpu"), torch.float32)
    assert balance.flops > 1e8 and balance.bandwidth > 1e8 and balance.intensity > 0
