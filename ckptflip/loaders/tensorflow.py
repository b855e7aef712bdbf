"""Loaders of TensorFlow: checkpoint readers, restored objects, SavedModels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.bits import as_words
from ckptflip.loaders.probes import Words

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import tensorflow as tf

SHAPES = {"kernel": (6, 5), "bias": (5,), "scale": ()}


def _module() -> Any:
    random = np.random.default_rng(0)
    module = tf.Module()
    for name, shape in SHAPES.items():
        setattr(module, name, tf.Variable(random.standard_normal(shape).astype("float32"), name=name))
    return module


def _words(array: Any) -> Any:
    return as_words(np.ascontiguousarray(array))


class Reader:
    """A checkpoint, read tensor by tensor."""

    def write(self, folder: Path) -> Path:
        """Write with `tf.train.Checkpoint`."""
        module = _module()
        tf.train.Checkpoint(**{n: getattr(module, n) for n in SHAPES}).write(str(folder / "ckpt"))
        return folder / "ckpt"

    def load(self, path: Path) -> Words:
        """Read with `tf.train.load_checkpoint`."""
        reader = tf.train.load_checkpoint(str(path))
        return {n: _words(reader.get_tensor(f"{n}/.ATTRIBUTES/VARIABLE_VALUE")) for n in SHAPES}


class Restore(Reader):
    """The same, restored into variables."""

    def load(self, path: Path) -> Words:
        """Read with `tf.train.Checkpoint.restore`."""
        module = _module()
        found = tf.train.Checkpoint(**{n: getattr(module, n) for n in SHAPES})
        found.read(str(path)).assert_existing_objects_matched()
        return {n: _words(getattr(module, n).numpy()) for n in SHAPES}


class SavedModel:
    """A SavedModel's variables."""

    def write(self, folder: Path) -> Path:
        """Write with `tf.saved_model.save`."""
        tf.saved_model.save(_module(), str(folder / "saved"))
        return folder / "saved"

    def load(self, path: Path) -> Words:
        """Read with `tf.saved_model.load`."""
        module = tf.saved_model.load(str(path))
        return {n: _words(getattr(module, n).numpy()) for n in SHAPES}
