"""Comparing the vision models' twins on the backend of Keras that a process runs on.

KERAS_BACKEND=torch python vision_twins.py        compare all of them; what differs, as JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from ckptflip.training.keras_settings import keras
from ckptflip.vision import architectures, keras_models, torch_models, weights

WIDTH = 0.125


def pair(architecture: str, dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    """The two models with equal weights, narrow, with statistics as after some training."""
    torch.manual_seed(0)
    ours = getattr(torch_models, architecture)(7, 3, WIDTH, **options).to(getattr(torch, dtype))
    norms = [module for module in ours.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        torch.nn.init.uniform_(norm.weight, 0.5, 1.0)
        torch.nn.init.uniform_(norm.bias, -0.3, 0.3)
    with torch.no_grad():
        ours.train()(torch.from_numpy(images(64, dtype)))
    for norm in norms:
        norm.momentum = 0.1
    theirs = getattr(keras_models, architecture)(7, 3, WIDTH, dtype=dtype, **options)
    weights.set_keras(theirs, weights.to_keras(ours.state_dict()))
    return ours.eval(), theirs


def images(count: int, dtype: str) -> np.ndarray:
    """float[count, 3, 32, 32], of no symmetry, so that a shifted or turned image would be seen."""
    return np.random.default_rng(1).normal(size=(count, 3, 32, 32)).astype(dtype)


def differences(architecture: str, dtype: str = "float32", **options: Any) -> dict[str, float]:
    """The largest difference of every layer's output, over the layer's largest value or 1."""
    ours, theirs = pair(architecture, dtype, **options)
    outputs: dict[str, torch.Tensor] = {}
    for layer in ours.layers:
        module = ours.get_submodule(layer.name)
        module.register_forward_hook(
            lambda _module, _inputs, output, name=layer.name: outputs.__setitem__(name, output)
        )
    x = images(4, dtype)
    with torch.no_grad():
        ours(torch.from_numpy(x))
    names = [layer.name for layer in ours.layers]
    every = keras.Model(
        theirs.inputs[0], [theirs.get_layer(weights.keras_name(name)).output for name in names]
    )
    found = {}
    for name, value in zip(names, every(x.transpose(0, 2, 3, 1), training=False), strict=True):
        expected, actual = outputs[name].numpy(), keras.ops.convert_to_numpy(value)
        actual = actual.transpose(0, 3, 1, 2) if actual.ndim == 4 else actual
        assert actual.shape == expected.shape, name
        found[name] = float(np.abs(actual - expected).max() / max(1, np.abs(expected).max()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: differences(name) for name in architectures.ARCHITECTURES}, sys.stdout)
