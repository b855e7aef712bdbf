"""The digits workloads in Keras: layers, names, optimizers, schedule, batches and data as in PyTorch."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptflip.errors import UsageError
from ckptflip.training import digits
from ckptflip.training.keras_settings import backend, keras

if TYPE_CHECKING:
    from ckptflip.training.keras import Data, KerasWorkload

_BATCH = 64
# What Keras calls the precisions of `digits.PRECISIONS`.
_DTYPES = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}


def cnn(precision: str = "fp32") -> KerasWorkload:
    """``digits-cnn-keras``: two convolutions, dropout, two dense layers; SGD with momentum, step schedule.

    Args:
        precision: as of `digits.cnn`: weights, optimizer and steps are of it, learning rate and momentum stay
            float32.

    Raises:
        UsageError: no such precision, or fp64 on another backend than TensorFlow.
    """
    name = digits.named("digits-cnn-keras", precision)
    dtype = _DTYPES[precision]

    def data() -> Data:
        (x, y), (x_test, y_test) = images()
        # Pixels are sixteenths; what Keras is given in float32 its layers narrow without a loss.
        wide = np.float64 if precision == "fp64" else np.float32
        return (x.astype(wide), y), (x_test.astype(wide), y_test)

    def model() -> Any:
        if precision == "fp64" and backend() != "tensorflow":
            raise UsageError(
                f"on its {backend()} backend Keras computes in float32, whatever a layer's dtype: for fp64 "
                "set KERAS_BACKEND=tensorflow, or use the workload digits-cnn"
            )
        return _cnn_model(dtype)

    return _workload(name, model, data)


def mlp() -> KerasWorkload:
    """``digits-mlp-keras``: two dense layers, Adam."""
    return _workload("digits-mlp-keras", _mlp_model)


def images() -> Data:
    """The digits, split as for PyTorch, with the channel last.

    Returns:
        ``((inputs, targets), (test inputs, test targets))``: float32[n, 8, 8, 1] in 0 to 1, int64[n].
    """
    (x, y), (x_test, y_test) = digits.images(extra="keras")
    return (np.moveaxis(x, 1, -1).copy(), y), (np.moveaxis(x_test, 1, -1).copy(), y_test)


def _workload(name: str, model: Any, data: Any = images) -> KerasWorkload:
    from ckptflip.training.keras import KerasWorkload

    return KerasWorkload(name, model=model, data=data, batch_size=_BATCH)


def _cnn_model(dtype: str) -> Any:
    layers = keras.layers
    steps = 5 * ceil(len(images()[0][0]) / _BATCH)
    # Halved after every five epochs, counted in steps as Keras' schedules are.
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, steps, 0.5, staircase=True)
    same: dict[str, Any] = {"dtype": dtype}
    return _compiled([
        layers.Conv2D(16, 3, padding="same", name="conv1", **same), layers.ReLU(name="relu1", **same),
        layers.Conv2D(32, 3, padding="same", name="conv2", **same), layers.ReLU(name="relu2", **same),
        layers.MaxPooling2D(2, name="pool", **same), layers.Flatten(name="flatten", **same),
        layers.Dropout(0.25, name="dropout1", **same),
        layers.Dense(64, name="fc1", **same), layers.ReLU(name="relu3", **same),
        layers.Dropout(0.25, name="dropout2", **same),
        layers.Dense(10, name="fc2", **same),
    ], keras.optimizers.SGD(rate, momentum=0.9), dtype)  # fmt: skip


def _mlp_model() -> Any:
    layers = keras.layers
    return _compiled([
        layers.Flatten(name="flatten"), layers.Dense(64, name="fc1"), layers.ReLU(name="relu"),
        layers.Dense(10, name="fc2"),
    ], keras.optimizers.Adam(3e-3, epsilon=1e-8))  # fmt: skip


def _compiled(layers: list[Any], optimizer: Any, dtype: str = "float32") -> Any:
    model = keras.Sequential([keras.Input((8, 8, 1), dtype=dtype), *layers])
    # Logits of float16 or bfloat16 are widened by the loss.
    wide = "float64" if dtype == "float64" else "float32"
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=wide))
    return model
