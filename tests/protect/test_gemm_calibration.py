"""Ranges of inputs from clean batches: how they are given, what is refused, and the model is left alone."""

import pytest
import torch

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.conversion import protect
from ckptflip.protect.gemm.linear import ProtectedLinear
from ckptflip.protect.gemm.quantised import quantise


class Named(torch.nn.Module):
    """Takes two arguments by name, and gives its layer its input by name."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, dense, scale=1.0):
        return self.fc(input=dense * scale)


@pytest.fixture
def x():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_a_batch_is_given_as_the_model_takes_it(x, form):
    torch.manual_seed(0)
    batch = {"tensor": x, "tuple": (x, 1.0), "list": [x, 1.0], "dict": {"dense": x, "scale": 1.0}}[form]
    converted = protect(Named(), calibration=[batch])
    layer = converted.model.fc.checked.packed.layer
    assert converted.taken[0].range == "static"
    assert layer.x_scale == pytest.approx(float(x.max() - x.min()) / 255)
    assert torch.equal(converted.model(x), converted.model.fc(input=x))


def test_a_single_layer_is_calibrated_by_name(x):
    converted = protect(torch.nn.Linear(4, 3), calibration=[{"input": x}])
    assert converted.taken[0].range == "static"
    assert torch.equal(converted.model(input=x), converted.model(x))


def test_a_protected_layer_takes_its_input_by_name(x):
    layer = ProtectedLinear(quantise(torch.nn.Linear(4, 3)))
    assert torch.equal(layer(input=x), layer(x))


def test_every_module_keeps_its_mode(x):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    model.train()
    model[1].eval()
    before = model[1].running_mean.clone()
    protect(model, calibration=[x])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(RuntimeError, match="shapes"):
        protect(model, calibration=[x[:, :3]])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_that_gives_a_layer_no_number_is_refused_wherever_it_stands(x, bad, place):
    batches = [x, x, x]
    batches[place] = x.clone()
    batches[place][3, 2] = bad
    with pytest.raises(UsageError, match="calibration gives layer '0' NaN or infinity"):
        protect(torch.nn.Sequential(torch.nn.Linear(4, 3)), calibration=batches)


def test_a_layer_whose_inputs_are_too_large_for_float32_is_left_with_the_reason(x):
    class Split(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = torch.nn.Linear(4, 3).double(), torch.nn.Linear(4, 3).double()

        def forward(self, x):
            return self.small(x) + self.large(x * 1e200)

    converted = protect(Split(), calibration=[x.double()])
    assert [layer.name for layer in converted.taken] == ["small"]
    assert [(layer.name, "may leave float32" in layer.reason) for layer in converted.left] == [
        ("large", True)
    ]
    assert bool(converted.model(x.double()).isfinite().all())
