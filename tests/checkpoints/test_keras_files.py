"""Files that Keras wrote: roles and layers are recognised, and Keras loads exactly the planned words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import ckptflip
from ckptflip.bits import as_words

pytest.importorskip("torch")
os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

# Keras and its backend warn about themselves on import and on saving in the older form.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model() -> object:
    made = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, name="stem"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )
    made.compile("adam", "mse")
    made.fit(np.ones((4, 8, 8, 1), np.float32), np.ones((4, 10), np.float32), verbose=0)
    return made


@pytest.fixture(params=["m.weights.h5", "m.h5"])
def saved(model, request, tmp_path) -> Path:  # type: ignore[no-untyped-def]
    path = tmp_path / request.param
    model.save_weights(path) if "weights" in path.name else model.save(path)
    return path


def test_layers_and_roles_are_recognised(saved: Path) -> None:
    with ckptflip.opened(saved) as checkpoint:
        found = {(t.layer, t.role) for t in checkpoint.tensors if t.role != "optimizer"}
        sizes = {(t.layer, t.role): t.shape for t in checkpoint.tensors if t.role != "optimizer"}
    assert {("stem", "weight"), ("stem", "bias"), ("bn", "norm"), ("bn", "statistic")} <= found
    assert {("head", "weight"), ("head", "bias")} <= found
    assert sizes["stem", "weight"] == (3, 3, 1, 4)
    assert [role for _, role in found if role == "counter"] == ["counter"]


def test_keras_loads_exactly_the_planned_words(model, saved: Path) -> None:  # type: ignore[no-untyped-def]
    before = {w.path: as_words(np.ascontiguousarray(w.numpy())).copy() for w in model.layers[0].weights}
    out = saved.with_name(f"bad.{saved.name}")
    record = ckptflip.inject(saved, out=out, layers="stem", roles="model", count=5, seed=2)
    if "weights" in saved.name:
        loaded = keras.models.clone_model(model)
        loaded.load_weights(out, skip_mismatch=False)
    else:
        loaded = keras.models.load_model(out, compile=False)
    after = {w.path: as_words(np.ascontiguousarray(w.numpy())) for w in loaded.layers[0].weights}
    planned: dict[int, int] = {}
    for tensor, rows in record.plan.by_tensor():
        shape = record.header.tensors[tensor].shape
        for word, mask in zip(
            record.plan.word[rows], (record.plan.before ^ record.plan.after)[rows], strict=True
        ):
            planned[(len(shape), int(word))] = int(mask)
    found = {
        (weight.ndim, int(word)): int((before[path] ^ after[path])[word])
        for path, weight in ((w.path, w.numpy()) for w in loaded.layers[0].weights)
        for word in np.flatnonzero(before[path] ^ after[path])
    }
    assert found == planned
    assert record.bits_effective == 5
