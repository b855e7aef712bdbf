"""The digits workloads in Keras: layers, names, optimizers, schedule, batches and data as in PyTorch."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptflip.training import digits
from ckptflip.training.keras_settings import keras

if TYPE_CHECKING:
    from ckptflip.training.keras import Data, KerasWorkload

_BATCH = 64


def cnn() -> KerasWorkload:
    """``digits-cnn-keras``: two convolutions, dropout, two dense layers; SGD with momentum, step schedule."""
    return _workload("digits-cnn-keras", _cnn_model)


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


def _workload(name: str, model: Any) -> KerasWorkload:
    from ckptflip.training.keras import KerasWorkload

    return KerasWorkload(name, model=model, data=images, batch_size=_BATCH)


def _cnn_model() -> Any:
    layers = keras.layers
    steps = 5 * ceil(len(images()[0][0]) / _BATCH)
    # Halved after every five epochs, counted in steps as Keras' schedules are.
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, steps, 0.5, staircase=True)
    return _compiled([
        layers.Conv2D(16, 3, padding="same", name="conv1"), layers.ReLU(name="relu1"),
        layers.Conv2D(32, 3, padding="same", name="conv2"), layers.ReLU(name="relu2"),
        layers.MaxPooling2D(2, name="pool"), layers.Flatten(name="flatten"),
        layers.Dropout(0.25, name="dropout1"),
        layers.Dense(64, name="fc1"), layers.ReLU(name="relu3"), layers.Dropout(0.25, name="dropout2"),
        layers.Dense(10, name="fc2"),
    ], keras.optimizers.SGD(rate, momentum=0.9))  # fmt: skip


def _mlp_model() -> Any:
    layers = keras.layers
    return _compiled([
        layers.Flatten(name="flatten"), layers.Dense(64, name="fc1"), layers.ReLU(name="relu"),
        layers.Dense(10, name="fc2"),
    ], keras.optimizers.Adam(3e-3, epsilon=1e-8))  # fmt: skip


def _compiled(layers: list[Any], optimizer: Any) -> Any:
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
