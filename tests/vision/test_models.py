"""The vision models are the well-known ones, and their twins are equal layer by layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("keras")

from ckptflip.errors import UsageError, WorkloadError  # noqa: E402
from ckptflip.training.keras_settings import backend, keras  # noqa: E402
from ckptflip.vision import architectures, keras_models, torch_models, weights  # noqa: E402
from ckptflip.vision.architectures import ARCHITECTURES, Dropout  # noqa: E402

# Of TensorFlow: its variables have an old __array__.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

sys.path.insert(0, str(Path(__file__).parent))
import vision_twins as twins  # noqa: E402

# For ten classes and three channels; ResNets and VGG16 as in the widespread CIFAR collections.
PARAMETERS = {
    "alexnet": 23_272_266,
    "vgg16": 14_728_266,
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
}
# Convolutions and dense layers, with those that change a block's input in the ResNets.
WEIGHTED = {"alexnet": 8, "vgg16": 14, "resnet18": 18 + 3, "resnet50": 50 + 4}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_and_layers_are_the_known_ones(name):
    with torch.device("meta"):
        model = getattr(torch_models, name)()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert sum(isinstance(module, kinds) for module in model.modules()) == WEIGHTED[name]
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_without_normalisation_vgg_has_biases_alone():
    with torch.device("meta"):
        model = torch_models.vgg16(batch_norm=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_719_818
    assert not list(model.buffers())


def test_keras_has_the_full_number_of_parameters():
    model = keras_models.resnet18()
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == PARAMETERS["resnet18"]


def check_equal(found, dtype, name):
    """In float32 rounding grows from layer to layer; float64 tells that it is only that."""
    assert len(found) == len(ARCHITECTURES[name]())
    outputs, inner = {"float32": (1e-5, 1e-4), "float64": (1e-12, 1e-12)}[dtype]
    assert list(found.values())[-1] <= outputs
    assert max(found.values()) <= inner, max(found, key=found.get)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_s_output_equals_its_twin_s(name, dtype):
    if dtype == "float64" and backend() != "tensorflow":
        pytest.skip(f"Keras computes in float32 on {backend()}")
    check_equal(twins.differences(name, dtype), dtype, name)


def test_twins_are_equal_on_another_backend():
    other = "torch" if backend() != "torch" else "tensorflow"
    script = Path(__file__).with_name("vision_twins.py")
    environment = os.environ | {"KERAS_BACKEND": other, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for name in ARCHITECTURES:
        check_equal(found[name], "float32", name)


def test_the_comparison_sees_a_difference(monkeypatch):
    """The epsilon, where zeros are padded and the flattened order matter to what is compared."""
    exact = twins.differences("resnet18")
    monkeypatch.setattr(keras_models, "NORM_EPSILON", 1e-3)
    changed = twins.differences("resnet18")
    assert changed["conv1"] == exact["conv1"]
    assert changed["fc"] > 1e-4
    monkeypatch.undo()
    right = keras.layers.ZeroPadding2D
    monkeypatch.setattr(keras.layers, "ZeroPadding2D", lambda _, **given: right(((0, 1), (0, 1)), **given))
    assert twins.differences("alexnet")["conv1"] > 0.1
    monkeypatch.undo()
    monkeypatch.setattr(keras.layers, "Permute", lambda _, **given: keras.layers.Identity(**given))
    assert twins.differences("alexnet")["fc1"] > 0.1


def test_settings_of_layers_agree():
    ours, theirs = twins.pair("resnet50")
    for layer in ours.layers:
        a, b = ours.get_submodule(layer.name), theirs.get_layer(weights.keras_name(layer.name))
        if isinstance(a, torch.nn.BatchNorm2d):
            assert (b.epsilon, b.momentum) == (a.eps, 1 - a.momentum)
        if isinstance(a, torch.nn.Conv2d):
            assert (b.use_bias, b.strides) == (a.bias is not None, a.stride)


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_dropout_and_variants(name):
    rates = [layer.rate for layer in ARCHITECTURES[name]() if isinstance(layer, Dropout)]
    assert rates == ([0.5, 0.5] if name == "alexnet" else [])
    if name == "vgg16":
        assert max(twins.differences(name, batch_norm=False).values()) <= 1e-5
    else:
        assert "dropout1" not in twins.differences(name, dropout=0.0)


def test_weights_begin_with_the_same_spread():
    ours, theirs = torch_models.alexnet(width=0.5), keras_models.alexnet(width=0.5)
    converted = weights.to_keras(ours.state_dict())
    for path, array in weights.read_keras(theirs).items():
        if array.ndim > 1:
            np.testing.assert_allclose(array.std(), converted[path].std(), rtol=0.1, err_msg=path)
        else:
            assert not array.any()
            assert not converted[path].any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_go_there_and_back_bit_for_bit(name):
    ours, theirs = twins.pair(name)
    back = weights.from_keras(weights.read_keras(theirs))
    state = {n: t for n, t in ours.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[n].view(np.uint32), t.numpy().view(np.uint32)) for n, t in state.items())
    fresh = getattr(torch_models, name)(7, 3, twins.WIDTH)
    weights.set_torch(fresh, back)
    assert all(torch.equal(fresh.state_dict()[n], t) for n, t in state.items())


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_converted_weights_are_no_longer_the_model_s(name):
    """Else they would change with it, and so would the twin where its backend takes the memory over."""
    ours, theirs = twins.pair(name)
    converted = weights.to_keras(ours.state_dict())
    weights.set_keras(theirs, converted)
    kept = {path: array.copy() for path, array in converted.items()}
    with torch.no_grad():
        for value in ours.state_dict().values():
            value.add_(1)
    assert all(np.array_equal(array, kept[path]) for path, array in converted.items())
    for array in converted.values():
        array += 1
    assert all(np.array_equal(array, kept[path]) for path, array in weights.read_keras(theirs).items())


def test_bfloat16_keeps_its_bits():
    words = torch.tensor([[0x7F81, 0x3F80], [-1, 1]], dtype=torch.int16)
    converted = weights.to_keras({"fc.weight": words.view(torch.bfloat16)})["fc/kernel"]
    assert converted.dtype == ml_dtypes.bfloat16
    assert converted.view(np.int16).tolist() == words.numpy().T.tolist()


def test_a_dense_layer_behind_a_flattened_image_is_permuted():
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(1, 3, 2, 4)), rng.normal(size=(5, 24))
    converted = weights.to_keras({"fc.weight": kernel}, {"fc": (3, 2, 4)})["fc/kernel"]
    expected = kernel @ image.reshape(-1)
    np.testing.assert_allclose(image.transpose(0, 2, 3, 1).reshape(-1) @ converted, expected)
    back = weights.from_keras({"fc/kernel": converted}, {"fc": (3, 2, 4)})
    assert np.array_equal(back["fc.weight"], kernel)
    with pytest.raises(WorkloadError, match="takes 24 values, an image of 3 channels of 3x3 has 27"):
        weights.to_keras({"fc.weight": kernel}, {"fc": (3, 3, 3)})


def test_weights_that_do_not_fit_are_named_and_nothing_is_set():
    ours, theirs = twins.pair("alexnet")
    before = weights.read_keras(theirs)
    arrays = {path: array + 1 for path, array in before.items()}
    for change, said in (
        ({"fc9/bias": np.zeros(1)}, "fc9/bias is unknown"),
        ({"fc3/bias": np.zeros(9, np.float32)}, r"fc3/bias is float32\[7\] in the model"),
        ({"fc3/bias": np.zeros(7)}, "float64"),
    ):
        with pytest.raises(WorkloadError, match=said):
            weights.set_keras(theirs, arrays | change)
    with pytest.raises(WorkloadError, match=r"fc3\.bias is missing"):
        weights.set_torch(ours, {n: t.numpy() for n, t in ours.state_dict().items() if n != "fc3.bias"})
    assert all(np.array_equal(array, before[path]) for path, array in weights.read_keras(theirs).items())
    with pytest.raises(WorkloadError, match="no counterpart"):
        weights.to_keras({"pos_embed": np.zeros((1, 2, 3))})
    with pytest.raises(WorkloadError, match="no counterpart"):
        weights.from_keras({"x/embeddings": np.zeros((2, 3))})


@pytest.mark.parametrize("bad", [{"width": 0}, {"width": 99}, {"classes": 0}, {"channels": 0}])
def test_sizes_that_make_no_sense_are_refused(bad):
    with pytest.raises(UsageError):
        architectures.resnet18(**bad)


def test_one_channel_and_a_hundred_classes():
    ours = torch_models.resnet18(100, 1, 0.125)
    assert ours(torch.zeros(2, 1, 32, 32)).shape == (2, 100)
    assert keras_models.resnet18(100, 1, 0.125).output_shape == (None, 100)
