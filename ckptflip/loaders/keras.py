"""Loaders of Keras 3, on its torch backend unless KERAS_BACKEND says otherwise."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ckptflip.bits import as_words
from ckptflip.loaders.probes import Words

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras


def _model() -> Any:
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, name="dense"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(3, name="head"),
        ],
        name="net",
    )
    made.compile(keras.optimizers.SGD(momentum=0.9, name="sgd"), keras.losses.MeanSquaredError())
    return made


def _trained() -> Any:
    made = _model()
    made.fit(np.ones((4, 6), np.float32), np.ones((4, 3), np.float32), verbose=0)
    return made


def _words(model: Any) -> Words:
    """Every variable by layer and name, the optimizer's by the variable they are for."""
    found = {_name(v): v for v in model.weights}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return _arrays(found)
    trained = [_name(v) for v in model.trainable_variables]
    momentums = [v for v in optimizer.variables if v.name.endswith("_momentum")]
    found |= {f"sgd/momentum of {n}": v for n, v in zip(trained, momentums, strict=True)}
    found |= {"sgd/iteration": optimizer.iterations, "sgd/learning_rate": optimizer._learning_rate}
    return _arrays(found)


def _arrays(found: Mapping[str, Any]) -> Words:
    return {n: as_words(np.ascontiguousarray(keras.ops.convert_to_numpy(v))) for n, v in found.items()}


def _name(variable: Any) -> str:
    return str(variable.path).removeprefix("net/")


class Archive:
    """A `.keras` archive."""

    def write(self, folder: Path) -> Path:
        """Write with `Model.save`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _trained().save(folder / "model.keras")
        return folder / "model.keras"

    def load(self, path: Path) -> Words:
        """Read with `keras.saving.load_model`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _words(keras.saving.load_model(path))


class Legacy:
    """An HDF5 file of Keras 2's form, without the optimizer.

    Keras 3 writes an optimizer's slots there and never reads them.
    """

    def write(self, folder: Path) -> Path:
        """Write with `Model.save`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _trained().save(folder / "model.h5", include_optimizer=False)
        return folder / "model.h5"

    def load(self, path: Path) -> Words:
        """Read with `keras.saving.load_model`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _words(keras.saving.load_model(path, compile=False))


class Weights:
    """Weights alone."""

    name = "model.weights.h5"
    options: Mapping[str, Any] = MappingProxyType({})

    def write(self, folder: Path) -> Path:
        """Write with `Model.save_weights`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _trained().save_weights(folder / self.name, **self.options)
        return folder / self.name

    def load(self, path: Path) -> Words:
        """Read with `Model.load_weights`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _model()
            made.optimizer.build(made.trainable_variables)
            made.load_weights(path)
        return _words(made)


class Shards(Weights):
    """Weights in several files and an index."""

    name = "model.weights.json"
    options: Mapping[str, Any] = MappingProxyType({"max_shard_size": 2e-7})
