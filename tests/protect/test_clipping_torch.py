"""Clipping of PyTorch models: bounds hold, clean outputs are the same bits, and nothing is left behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ckptflip import live  # noqa: E402
from ckptflip.errors import SelectionError, UsageError  # noqa: E402
from ckptflip.faults import Policy  # noqa: E402
from ckptflip.protect import clipping  # noqa: E402
from ckptflip.protect.clipping import torch_values  # noqa: E402
from ckptflip.recsys.models.crossing import Dcn  # noqa: E402
from ckptflip.recsys.models.dlrm import Dlrm  # noqa: E402
from ckptflip.recsys.models.factorisation import DeepFm  # noqa: E402

nn = torch.nn
SIZES = (50, 30, 20)


def dlrm():
    return Dlrm(SIZES, dense=3, embedding=8, bottom=(16, 8), top=(8, 1))


MODELS = {
    "dlrm": dlrm,
    "deepfm": lambda: DeepFm(SIZES, 3),
    "dcn": lambda: Dcn(SIZES, 3),
    "dcn 2": lambda: Dcn(SIZES, 3, version=2),
}


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch):
    """With the compiled kernel, where there is one, and without."""
    if request.param == "torch":
        monkeypatch.setattr(torch_values, "kernels", lambda: None)
    elif torch_values.kernels() is None:
        pytest.skip("the kernels were not built")
    return request.param


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.rand(40, 3), torch.stack([torch.randint(0, rows, (40,)) for rows in SIZES], dim=1)


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def traces(model):
    """All that clipping could leave on a model."""
    return [(dict(m._forward_hooks), m.__dict__.get("forward"), m.training) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_clean_outputs_are_the_same_bits(name, way, inputs):
    model = made(name)
    clean = model(*inputs)
    before = traces(model)
    bounds = clipping.calibrate(model, [inputs])
    assert traces(model) == before
    for grad in (True, False):
        with torch.set_grad_enabled(grad), clipping.clipped(model, bounds) as block:
            assert torch.equal(model(*inputs), clean)
        assert block.values == 0 and all(seen.calls == 1 for seen in block.counts())
    assert traces(model) == before and not block.active


@pytest.mark.parametrize("rows", [1, 40, 3000])
@pytest.mark.parametrize("value", [1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_faults_in_tables_and_layers_stay_within_bounds(value, rows, way, inputs):
    inputs = tuple(x.repeat(75, 1)[:rows] for x in inputs)
    model = made("dlrm")
    bounds = clipping.calibrate(model, [inputs])
    for name, weight in model.named_parameters():
        faulty = copy.deepcopy(model)
        with torch.no_grad():
            faulty.get_parameter(name).view(-1)[:] = value
            block = clipping.clip(faulty, bounds)
            outputs = faulty(*inputs)
        assert bounds["top_l.2"].low <= outputs.min() and outputs.max() <= bounds["top_l.2"].high, name
        place = {"e": "emb_l"}.get(name[0], name.rpartition(".")[0])
        assert {seen.layer: seen.values for seen in block.counts()}[place] > 0 or weight.shape == ()
        assert all(seen.fired <= seen.calls == 1 for seen in block.counts())


@pytest.mark.parametrize("cached", [0, torch_values._CACHED])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernels_and_pytorch_agree(name, cached, monkeypatch, inputs):
    if torch_values.kernels() is None:
        pytest.skip("the kernels were not built")
    monkeypatch.setattr(torch_values, "_CACHED", cached)
    model = made(name)
    bounds = clipping.calibrate(model, [inputs], rule="percentile:90")
    found = []
    for seed in range(6):
        with torch.no_grad(), live.faults(model, Policy(ber=1e-3), seed=seed):
            for kernels in (torch_values.kernels, lambda: None):
                with monkeypatch.context() as patch:
                    patch.setattr(torch_values, "kernels", kernels)
                    block = clipping.clip(model, bounds)
                    found.append((model(*inputs), [(s.layer, s.values) for s in block.counts()]))
                    block.remove()
    for (ours, counted), (theirs, recounted) in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(ours, theirs) and counted == recounted
    reached = {layer for _, counted in found for layer, number in counted if number}
    assert reached >= {layer for layer, _ in found[0][1]} - {"linear", "out"}


@pytest.mark.parametrize("columns", [1, 5, 16, 37])
def test_tables_of_any_width_are_stacked_as_pytorch_does(columns, monkeypatch):
    monkeypatch.setattr(torch_values, "_CACHED", 0)
    torch.manual_seed(columns)
    parts = [torch.randn(300, columns) for _ in range(7)]
    parts[3][17, -1] = float("nan")
    clip = torch_values.Clip(clipping.Bound("x", "Tables", -1.0, 1.0), (-1.0, 1.0, 0.5), True)
    with torch.no_grad():
        found = clip.stacked(parts)
    whole = torch.stack(parts, dim=1)
    assert torch.equal(found, whole.clamp(-1, 1).nan_to_num(0.5))
    assert clip.values == int(((whole.abs() > 1) | whole.isnan()).sum())


def test_tables_that_the_kernel_cannot_stack_are_stacked_by_pytorch(monkeypatch):
    monkeypatch.setattr(torch_values, "_CACHED", 0)
    clip = torch_values.Clip(clipping.Bound("x", "Tables", -9.0, 9.0), (0.0, 0.0, 0.0), True)
    whole = torch.arange(24.0).reshape(6, 4) / 8
    with torch.no_grad():
        for parts in (
            [whole, whole.double().float().t().contiguous().t()],
            [whole, whole.half()],
            [whole[:, :2], whole[:, 2:]],
        ):
            assert torch.equal(clip.stacked(parts), torch.stack(parts, dim=1))
        with pytest.raises(RuntimeError, match="equal size"):
            clip.stacked([whole, whole[:3]])


@pytest.mark.parametrize("name", ["deepfm", "dcn"])
def test_layers_that_are_computed_while_they_are_clipped_follow_autocast(name, inputs):
    model = made(name)
    bounds = clipping.fixed(model, 1e6, layers=["dense_l" if name == "deepfm" else "cross_l.*", "out"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        clean = model(*inputs)
        with clipping.clipped(model, bounds):
            assert torch.equal(model(*inputs), clean)


def test_cross_layers_refuse_what_pytorch_refuses(inputs):
    layer = made("dcn").cross_l[0]
    with torch.no_grad(), clipping.clipped(layer, clipping.fixed(layer, 1, layers="")):
        with pytest.raises(RuntimeError):
            layer(torch.rand(2, layer.weight.numel()), torch.rand(2, layer.weight.numel() - 1))
        one, many = torch.rand(1, layer.weight.numel()), torch.rand(3, layer.weight.numel())
        found = layer(one, many)
    assert torch.equal(found, layer(one, many).clamp(-1, 1))


NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan")])
)


@given(
    values=st.lists(NUMBERS, min_size=1, max_size=40),
    ends=st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)),
    outside=st.sampled_from(["bound", "zero", "mean"]),
    nan=st.sampled_from(["bound", "zero", "mean"]),
    repeat=st.sampled_from([1, 60]),
)
def test_every_value_is_kept_or_replaced_as_said(values, ends, outside, nan, repeat):
    low, high = sorted(ends)
    bound = clipping.Bound("x", "Identity", low, high, (low + high) / 2)
    bounds = clipping.Bounds((bound,), "range", outside=outside, nan=nan)
    below, above, odd = bounds.replacements(bound)
    given_ = np.array(values * repeat, np.float32)
    expected = np.where(
        np.isnan(given_), odd, np.where(given_ < low, below, np.where(given_ > high, above, given_))
    )
    beyond = int((~((given_ >= low) & (given_ <= high))).sum())
    for own in (True, False):
        clip = torch_values.Clip(bound, (below, above, odd), own)
        found = clip.clipped(torch.from_numpy(given_.copy()))
        assert np.array_equal(found.numpy().view(np.uint32), expected.astype(np.float32).view(np.uint32))
        assert (clip.values, clip.fired) == (beyond, int(beyond > 0))
        rectified = clip.rectified(torch.from_numpy(given_.copy()))
        assert np.array_equal(rectified.numpy(), np.maximum(expected.astype(np.float32), 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype).eval()
    x = torch.rand(16, 4, dtype=dtype)
    bounds = clipping.calibrate(model, [x], margin=0.01)
    clean = model(x)
    with torch.no_grad(), clipping.clipped(model, bounds) as block:
        assert torch.equal(model(x), clean) and not block.values
        model[0].weight[0, 0] = float("nan")
        assert model(x).isfinite().all() and block.values == 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_range_holds_its_own_data_in_every_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype).eval()
    x = torch.rand(64, 8, dtype=dtype)
    clean = model(x)
    with clipping.clipped(model, clipping.calibrate(model, [x])) as block:
        assert torch.equal(model(x), clean) and not block.values


def test_float64_has_a_wider_range_than_float32():
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1e60)
    bounds = clipping.calibrate(model, [torch.tensor([[-1.0], [2.0]], dtype=torch.float64)])
    assert (bounds["0"].low, bounds["0"].high) == (-1e60, 2e60)


@pytest.mark.parametrize("bounds", [None, {}, "bounds.json"])
def test_what_is_no_bounds_is_refused(bounds):
    with pytest.raises(UsageError, match="bounds are what calibrate, fixed or load gave"):
        clipping.clip(nn.Linear(2, 2), bounds)


def test_gradients_pass_where_values_do():
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0], [1e6], [1.0]])
        model[0].bias.zero_()
    bounds = clipping.fixed(model, 10, layers="0", outside="bound")
    with clipping.clipped(model, bounds):
        model(torch.ones(1, 1)).sum().backward()
    grads = model[0].weight.grad[:, 0]
    assert grads[1] == 0 and (grads[[0, 2]] == model[2].weight[0, [0, 2]]).all()


def test_what_others_hold_is_not_altered():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 5.0))

        def forward(self, x):
            return self.weight.detach(), {"also": [x]}

    model = Keeps()
    bounds = clipping.fixed(model, 1, layers="")
    x = torch.full((2,), 7.0)
    with torch.no_grad(), clipping.clipped(model, bounds) as block:
        first, second = model(x)
    assert first.tolist() == [1, 1, 1] and second["also"][0].tolist() == [1, 1]
    assert model.weight.tolist() == [5, 5, 5] and x.tolist() == [7, 7] and block.values == 5


def test_a_sequential_does_layer_and_relu_at_once_only_where_nothing_looks_between():
    def forward_of(model):
        with clipping.clipped(model, bounds):
            return [type(m.__dict__.get("forward")).__name__ for m in model]

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    bounds = clipping.fixed(model, 1, layers=["0", "2"])
    assert forward_of(model) == ["NoneType", "Rectifier", "Forward"]
    model[0].register_forward_hook(lambda *_: None)
    assert forward_of(model) == ["NoneType", "NoneType", "Forward"]
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu)
    assert forward_of(model) == ["Forward", "NoneType", "Forward", "NoneType"]


@pytest.mark.parametrize("part", [slice(1, None), slice(1, 3), 1])
def test_part_of_a_sequential_leaves_its_input_alone(part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.rand(8, 2)
    with torch.no_grad():
        hidden = model[0](x)
        wanted, kept = model[part](hidden), hidden.clone()
        with clipping.clipped(model, clipping.calibrate(model, [x])) as block:
            for given in (hidden, model[0](x)):
                assert torch.equal(model[part](given), wanted)
                assert torch.equal(given, kept) and (kept < 0).any()
            model(x)
            assert torch.equal(model[part](hidden), wanted) and torch.equal(hidden, kept)
    assert block.counts()[0].calls == 4
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_sequential_rectifies_in_place_what_its_layer_gave(monkeypatch):
    model, x, places = nn.Sequential(nn.Linear(2, 64), nn.ReLU()), torch.rand(8, 2), []

    def noting(self, input):
        places.append(torch.nn.functional.linear(input, self.weight, self.bias))
        return places[-1]

    monkeypatch.setattr(nn.Linear, "forward", noting)
    with torch.no_grad(), clipping.clipped(model, clipping.calibrate(model, [x])):
        assert model(x).data_ptr() == places[-1].data_ptr()
        model[1].register_forward_pre_hook(lambda module, given: None)
        assert model(x).data_ptr() != places[-1].data_ptr()


@pytest.mark.parametrize(("name", "layer"), [("dlrm", "emb_l"), ("dcn", "cross_l.0"), ("deepfm", "dense_l")])
def test_hooks_that_were_there_act_before_clipping_and_others_after(name, layer, inputs):
    model = made(name)
    bounds = clipping.calibrate(model, [inputs], layers=layer)
    module = model.get_submodule(layer)
    module.register_forward_hook(lambda module, given, output: torch.full_like(output, 1e30))
    with torch.no_grad(), clipping.clipped(model, bounds) as block:
        seen = []
        module.register_forward_hook(lambda module, given, output: seen.append(output))
        model(*inputs)
    assert block.values == seen[0].numel() and not seen[0].any()


def test_a_forward_of_ones_own_is_clipped_and_stays():
    model = nn.Sequential(nn.Linear(2, 2))
    forward = model[0].forward = lambda x: torch.full_like(x, 5.0)
    with clipping.clipped(model, clipping.fixed(model, 1, layers="0")):
        assert model(torch.zeros(1, 2)).tolist() == [[1, 1]]
    assert model[0].forward is forward


def test_what_a_later_hook_keeps_is_not_rectified():
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))
    x, kept = torch.rand(8, 2), []
    with torch.no_grad(), clipping.clipped(model, clipping.calibrate(model, [x])):
        clean = model(x)
        model[0].register_forward_hook(lambda module, given, output: kept.append(output))
        assert torch.equal(model(x), clean)
    assert torch.equal(kept[0], model[0](x)) and (kept[0] < 0).any()


def test_copies_are_clipped_on_their_own(inputs):
    model = made("dlrm")
    block = clipping.clip(model, clipping.calibrate(model, [inputs]))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.emb_l[0].weight[:] = float("nan")
        twin.bot_l[0].weight[:] = float("nan")
        assert twin(*inputs).isfinite().all() and model(*inputs).isfinite().all()
    assert block.values == 0


@pytest.mark.parametrize("name", MODELS)
def test_compiled_models_are_clipped_if_that_came_first(name, inputs):
    model = made(name)
    bounds = clipping.calibrate(model, [inputs])
    block = clipping.clip(model, bounds)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        clean = compiled(*inputs)
        assert block.values == 0
        hidden = "top_l.0" if name == "dlrm" else "mlp.0"
        model.get_submodule(hidden).weight[0, 0] = float("nan")
        assert compiled(*inputs).isfinite().all() and clean.isfinite().all()
    assert {seen.layer: seen.values for seen in block.counts()}[hidden] == 40
    block.remove()
    with pytest.raises(UsageError, match="compile it"):
        clipping.clip(compiled, bounds)


def test_modes_and_one_shot_batches(inputs):
    model = made("deepfm").train()
    model.mlp[2].eval()
    before = traces(model)
    bounds = clipping.calibrate(model, iter([inputs, {"dense": inputs[0], "ids": inputs[1]}]), margin=0.5)
    assert traces(model) == before
    assert bounds == clipping.calibrate(model, [inputs], margin=0.5)


def test_layers_that_nothing_passed_are_named(inputs):
    model = made("dlrm")
    model.spare = nn.Linear(2, 2)
    bounds = clipping.calibrate(model, [inputs])
    assert bounds.missed == ("spare",)
    clipping.clip(model, bounds).remove()


def test_the_studys_bounds(inputs):
    bounds = clipping.fixed(made("dlrm"))
    assert [(b.layer, b.low, b.high) for b in bounds.layers] == [
        (name, -100.0, 100.0) for name in ("bot_l.0", "bot_l.2", "top_l.0")
    ]
    assert (bounds.outside, bounds.nan) == ("bound", "zero")


def test_calibrated_bounds_recover_what_the_studys_lose(inputs):
    model = made("dlrm")
    clean = model(*inputs)
    bounds, study = clipping.calibrate(model, [inputs]), clipping.fixed(model)
    left = []
    for seed in range(10):
        with torch.no_grad(), live.faults(model, Policy(ber=3e-2, bits="critical"), seed=seed):
            for each in (bounds, study):
                with clipping.clipped(model, each):
                    left.append(float((model(*inputs) - clean).abs().mean().nan_to_num(1e30)))
    assert np.median(left[::2]) < 0.5 * np.median(left[1::2])


def test_bad_input_is_said(inputs):
    model = made("dlrm")
    bounds = clipping.calibrate(model, [inputs])
    with pytest.raises(UsageError, match="saw no values"):
        clipping.calibrate(model, [])
    with pytest.raises(UsageError, match="fixed\\(model, 6\\)"):
        clipping.calibrate(model, [inputs], rule="fixed:6")
    with pytest.raises(SelectionError, match=r"did you mean 'bot_l.0'"):
        clipping.calibrate(model, [inputs], layers="bot_l.00")
    with pytest.raises(UsageError, match="another model"):
        clipping.clip(made("deepfm"), bounds)
    with pytest.raises(UsageError, match=r"no layer 'emb_l'; there are none$"):
        clipping.clip(nn.Linear(1, 1), bounds)
    with pytest.raises(UsageError, match="was a Linear"):
        clipping.clip(nn.Sequential(nn.ReLU()), clipping.fixed(nn.Sequential(nn.Linear(1, 1)), layers="0"))
    with clipping.clipped(model, bounds), pytest.raises(UsageError, match="clipped already"):
        clipping.clip(model, bounds)
    with pytest.raises(UsageError, match=r"0 torch.nn.Linear"):
        clipping.fixed(nn.Sequential(nn.ReLU()))
    with pytest.raises(UsageError, match="no module of this Sequential"):
        clipping.calibrate(nn.Sequential(nn.ReLU()), [inputs[0]])
    with pytest.raises(UsageError, match=r"torch.nn.Module or a keras.Model, not int"):
        clipping.clip(3, bounds)
    with torch.no_grad():
        model.bot_l[0].bias[0] = float("nan")
    with pytest.raises(UsageError, match=r"bot_l.0 gives NaN"):
        clipping.calibrate(model, [inputs])
    assert not any(m._forward_hooks for m in model.modules())


def test_values_that_are_negated_when_read(way):
    """PyTorch keeps `conj().imag` as other numbers with a mark; bounds are of what it stands for."""

    class Imaginary(nn.Linear):
        def forward(self, x):
            return torch.complex(torch.zeros_like(x), super().forward(x)).conj().imag

    model = nn.Sequential(Imaginary(4, 4)).eval()
    calm, wild = torch.rand(8, 4), 100 * torch.rand(8, 4)
    with torch.no_grad():
        assert model(calm).is_neg()
        bounds = clipping.calibrate(model, [calm], outside="bound")
        low, high = model(calm).min(), model(calm).max()
        expected = model(wild).clamp(low, high)
        with clipping.clip(model, bounds):
            assert torch.equal(model(wild), expected)
