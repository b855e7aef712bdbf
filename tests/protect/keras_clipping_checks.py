"""Checks of clipping Keras models, run in a process of their own on the backend that KERAS_BACKEND names.

Writes, as JSON, what each check raised; null where it holds.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

if os.environ["KERAS_BACKEND"] != "tensorflow":
    # Keras looks for it on the way, which takes seconds, and does well without it.
    sys.modules["tensorflow"] = None

import keras
import numpy as np
from keras import layers

from ckptflip.errors import SelectionError, UsageError
from ckptflip.protect import clipping

X = np.random.default_rng(0).random((32, 4), np.float32)
IDS = np.random.default_rng(1).integers(0, 10, (32, 3))


def two_inputs():
    keras.utils.set_random_seed(0)
    dense, ids = keras.Input((4,)), keras.Input((3,), dtype="int32")
    rows = layers.Flatten()(layers.Embedding(10, 4, name="table")(ids))
    hidden = layers.Dense(8, activation="relu", name="hidden")(dense)
    outputs = layers.Dense(1, name="head")(layers.Concatenate()([hidden, rows]))
    model = keras.Model([dense, ids], outputs)
    model.compile("sgd", "mse")
    return model


def sequential():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8, name="a"), layers.ReLU(), layers.Dense(1, name="b")]
    )
    model.compile("sgd", "mse")
    return model


def damaged(layer, value):
    """Put a value in the place of a layer's weights."""
    variable = layer.weights[0]
    weights = np.array(keras.ops.convert_to_numpy(variable))
    weights[:] = value
    variable.assign(weights)


def check_clean_outputs_are_unchanged_and_faulty_ones_bounded():
    model = two_inputs()
    clean = model.predict([X, IDS], verbose=0)
    bounds = clipping.calibrate(model, [(X, IDS)])
    assert [b.layer for b in bounds.layers] == ["table", "hidden", "head"]
    for value in (1e30, -1e30, np.inf, np.nan):
        with clipping.clipped(model, bounds) as block:
            assert np.array_equal(model.predict([X, IDS], verbose=0), clean)
            assert block.values == 0
            kept = model.get_weights()
            damaged(model.get_layer("head"), value)
            outputs = model.predict([X, IDS], verbose=0)
            model.set_weights(kept)
        assert (outputs >= bounds["head"].low).all() and (outputs <= bounds["head"].high).all()
        seen = {s.layer: s for s in block.counts()}
        assert seen["head"].fired and seen["head"].values and not seen["table"].values
        assert seen["head"].calls >= seen["head"].fired


def check_nothing_is_left_behind():
    model = sequential()
    clean = model.predict(X, verbose=0)
    before = {layer.name: dict(layer.__dict__) for layer in model.layers}
    bounds = clipping.calibrate(model, [X])
    clipping.clip(model, bounds).remove()
    assert {layer.name: dict(layer.__dict__) for layer in model.layers} == before
    damaged(model.get_layer("b"), np.nan)
    assert np.isnan(model.predict(X, verbose=0)).any() and not np.isnan(clean).any()


def check_traced_functions_follow():
    model = sequential()
    model.predict(X, verbose=0), model.evaluate(X, X[:, :1], verbose=0)
    bounds = clipping.fixed(model, 1e-6, layers="b")
    with clipping.clipped(model, bounds):
        assert np.abs(model.predict(X, verbose=0)).max() <= 1.0001e-6
    assert np.abs(model.predict(X, verbose=0)).max() > 1e-3


def check_a_clipped_model_can_be_trained():
    model = sequential()
    bounds = clipping.calibrate(model, [X], margin=1.0)
    before = model.get_weights()[0]
    with clipping.clipped(model, bounds):
        model.fit(X, X[:, :1], verbose=0)
    assert not np.array_equal(before, model.get_weights()[0])


def check_the_studys_bounds_spare_the_last_layer():
    bounds = clipping.fixed(sequential(), 6)
    assert [(b.layer, b.low, b.high) for b in bounds.layers] == [("a", -6.0, 6.0)]
    assert (bounds.outside, bounds.nan) == ("bound", "zero")


def check_half_precision():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="float16", name="half")])
    bounds = clipping.calibrate(model, [X.astype("float16")])
    damaged(model.get_layer("half"), np.inf)
    with clipping.clipped(model, bounds):
        outputs = keras.ops.convert_to_numpy(model(X.astype("float16")))
    assert outputs.dtype == np.float16 and np.isfinite(outputs).all()


def check_bad_input_is_said():
    model = sequential()
    bounds = clipping.calibrate(model, [X])
    refused(UsageError, "already", lambda: clipping.clip(model, bounds), clipping.clip(model, bounds))
    refused(SelectionError, "did you mean 'a'", lambda: clipping.calibrate(model, [X], layers="aa"))
    refused(UsageError, "another model", lambda: clipping.clip(two_inputs(), bounds))
    refused(UsageError, "saw no values", lambda: clipping.calibrate(model, []))
    damaged(model.get_layer("b"), np.nan)
    refused(UsageError, "b gives NaN", lambda: clipping.calibrate(model, [X]))


def refused(kind, words, call, block=None):
    """What a call must raise; a block is taken off afterwards."""
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")
    finally:
        if block is not None:
            block.remove()


def raised(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    found = {name: raised(check) for name, check in list(globals().items()) if name.startswith("check_")}
    Path(sys.argv[1]).write_text(json.dumps(found), "utf-8")
