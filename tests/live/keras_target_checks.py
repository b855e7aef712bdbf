"""Checks of `KerasTarget` that run in a process of their own, on the backend that KERAS_BACKEND names.

Prints, as JSON, what each check raised; null where it holds.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

if os.environ["KERAS_BACKEND"] != "tensorflow":
    # Keras looks for it on the way, which takes seconds, and does well without it.
    sys.modules["tensorflow"] = None

import keras
import numpy as np
from keras import layers

import ckptflip
from ckptflip import live
from ckptflip.bits import as_words, popcount
from ckptflip.errors import LiveError, RecordError, UsageError
from ckptflip.faults import Policy
from ckptflip.live.keras_variables import KerasGradients, KerasTarget
from ckptflip.live.target import inject, undo

BACKEND = os.environ["KERAS_BACKEND"]
SIGNALLING = {"float32": 0x7F800001, "float16": 0x7C01, "bfloat16": 0x7F81, "float64": 0x7FF0000000000001}


def compiled(model, optimizer="adam"):
    model.compile(optimizer, keras.losses.MeanSquaredError())
    model.optimizer.build(model.trainable_variables)
    return model


def cnn():
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3, name="stem"),
                layers.BatchNormalization(name="bn"),
                layers.Dropout(0.1),
                layers.Flatten(),
                layers.Dense(10, name="head"),
            ]
        )
    )


def nested():
    encoder = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4), layers.LayerNormalization()], name="encoder"
    )
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, layers.Dense(4)(encoder(inner_input)), name="inner")
    x = keras.Input((4,))
    shared = layers.Dense(4, name="shared")
    y = layers.Add()([shared(x), keras.ops.relu(inner(shared(x)))])
    model = keras.Model(x, layers.Bidirectional(layers.LSTM(2))(layers.Reshape((2, 2))(y)))
    return compiled(model, keras.optimizers.RMSprop(momentum=0.5))


def mixed():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, dtype="mixed_float16"), layers.Dense(2)])
    return compiled(model, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(momentum=0.9)))


def words_of(model):
    target = KerasTarget(model)
    return {t.name: target.read(i, np.arange(t.words)).copy() for i, t in enumerate(target.tensors)}


def check_names_layers_roles_shapes_and_words_are_those_of_the_file():
    for make in (cnn, nested, mixed):
        model = make()
        for variable in model.weights:
            variable.assign(np.random.default_rng(1).random(variable.shape))
        path = Path(tempfile.mkdtemp()) / "m.keras"
        model.save(path)
        live = words_of(model)
        known = {t.name: t for t in KerasTarget(model).tensors}
        left = set(known)
        with ckptflip.opened(path) as file:
            for i, tensor in enumerate(file.tensors):
                twin = next(t for t in known.values() if tensor.name in (t.name, *t.aliases))
                if twin.name == tensor.name:
                    assert (twin.layer, twin.role) == (tensor.layer, tensor.role), tensor
                    left.remove(twin.name)
                assert (twin.shape, twin.number) == (tensor.shape, tensor.number)
                assert (live[twin.name] == np.concatenate([*file.blocks(i)])).all(), tensor.name
        assert {known[name].role for name in left} <= {"rng"}, left


def check_a_file_and_the_model_in_memory_get_the_same_faults_undone_by_either():
    model = nested()
    path = Path(tempfile.mkdtemp()) / "m.keras"
    model.save(path)
    before = words_of(model)
    policy = Policy(layers=("shared",), bits="exponent", count=6, roles=("model",))
    record = inject(KerasTarget(model), policy, seed=3)
    assert record.bits_effective == 6
    changed = {n: w for n, w in words_of(model).items() if (w != before[n]).any()}
    assert set(changed) <= {"shared/kernel", "shared/bias"}
    model.save(path.with_name("faulty.keras"))
    assert ckptflip.undo(
        path.with_name("faulty.keras"), record, out=path.with_name("b.keras")
    ).restored == len(record)
    assert undo(KerasTarget(model), record) == len(record)
    assert all((w == before[n]).all() for n, w in words_of(model).items())


def check_exactly_the_recorded_words_change_whatever_the_role():
    model = cnn()
    before = words_of(model)
    target = KerasTarget(model)
    record = inject(target, Policy(count=40, design="tensor"), seed=11)
    after = words_of(model)
    assert record.bits_effective == 40
    assert sum(popcount(before[n] ^ after[n]) for n in before) == 40
    entries = record.header.tensors
    for tensor, word, was, became in zip(
        record.plan.tensor, record.plan.word, record.plan.before, record.plan.after, strict=True
    ):
        name = entries[tensor].name
        assert (before[name][word], after[name][word]) == (was, became)
    assert {"optimizer", "statistic", "counter"} & {e.role for e in entries}


def check_a_signalling_nan_survives_beside_and_under_a_flip():
    for dtype, word in SIGNALLING.items():
        if dtype == "float64" and BACKEND == "jax":
            continue
        model = keras.Sequential([keras.Input((3,), dtype=dtype), layers.Dense(5, dtype=dtype, name="d")])
        target = KerasTarget(model)
        wide = target.tensors[0].number.word_dtype
        now = target.read(0, np.arange(15))
        target.xor(0, np.arange(15), (now ^ wide.type(word)).astype(np.uint64))
        assert (target.read(0, np.arange(15)) == word).all(), dtype
        for seed in range(3):
            record = inject(target, Policy(tensors=("d/kernel",), bits="0-3", count=5), seed=seed)
            found = target.read(0, np.arange(15))
            assert popcount(found ^ wide.type(word)) == 5
            assert undo(target, record) == len(record)
        assert (target.read(0, np.arange(15)) == word).all(), dtype
        # And what the layer itself holds has these bits, not only what is read through the target.
        if dtype in ("float32", "float16"):
            held = np.asarray(keras.ops.convert_to_numpy(model.layers[0].kernel.value))
            assert (as_words(np.ascontiguousarray(held)) == word).all()


def check_flips_are_seen_by_the_trained_and_compiled_model():
    model = cnn()
    x, y = np.ones((4, 8, 8, 1), "float32"), np.zeros((4, 10), "float32")
    model.fit(x, y, epochs=1, verbose=0)
    clean = model.predict_on_batch(x)
    record = inject(KerasTarget(model), Policy(tensors=("head/bias",), bits="sign", count=10), seed=1)
    faulty = model.predict_on_batch(x)
    assert (clean != faulty).any()
    undo(KerasTarget(model), record)
    assert (model.predict_on_batch(x) == clean).all()


def check_undo_is_refused_once_training_has_gone_on():
    model = cnn()
    record = inject(KerasTarget(model), Policy(tensors=("head/kernel",), bits="sign", count=50), seed=1)
    rng = np.random.default_rng(2)
    x, y = rng.random((4, 8, 8, 1), "float32"), rng.random((4, 10), "float32")
    model.fit(x, y, epochs=1, verbose=0)
    before = words_of(model)
    try:
        undo(KerasTarget(model), record)
    except RecordError as why:
        assert "Training has gone on" in str(why)
    else:
        raise AssertionError("undone all the same")
    assert all((w == before[n]).all() for n, w in words_of(model).items())


def check_gradients_have_the_names_of_their_parameters_and_are_altered_bit_by_bit():
    if BACKEND == "jax":
        return
    model = cnn()
    values = [keras.ops.convert_to_tensor(np.ones(v.shape, "float32")) for v in model.trainable_variables]
    target = KerasGradients(model, values, model.trainable_variables)
    assert [t.name for t in target.tensors][:2] == ["gradients/stem/kernel", "gradients/stem/bias"]
    record = inject(target, Policy(tensors=("gradients/head/bias",), bits="critical", count=10), seed=1)
    after = keras.ops.convert_to_numpy(target.gradients[-1])
    assert (after.view(np.uint32) == 0x7F800000).all()
    assert undo(target, record) == 10
    assert (keras.ops.convert_to_numpy(target.gradients[-1]) == 1).all()


def check_scalars_and_counters_can_be_hit():
    model = cnn()
    target = KerasTarget(model)
    record = inject(target, Policy(tensors=("adam*/iteration", "adam*/learning_rate"), count=3), seed=5)
    assert record.bits_effective == 3
    assert undo(target, record) == len(record)


def check_a_model_without_variables_and_what_is_no_model_are_refused():
    for bad, said in ((keras.Sequential([layers.Dense(2)]), "build it first"), (object(), "no Keras model")):
        try:
            KerasTarget(bad)
        except UsageError as why:
            assert said in str(why)
        else:
            raise AssertionError(f"{bad} was taken")


def check_variables_that_jax_has_taken_away_are_not_silently_altered():
    if BACKEND != "jax":
        return
    model = cnn()
    target = KerasTarget(model)
    model._purge_model_variables(trainable_variables=True)
    try:
        target.xor(0, np.array([0]), np.array([1], np.uint64))
    except LiveError as why:
        assert "jax_state_sync" in str(why)
    else:
        raise AssertionError("altered nothing, and did not say so")


def check_the_cost_follows_the_flips_not_the_model():
    """A thousand flips in 16 million weights: a few thousand words are touched, and no tensor is copied."""
    if BACKEND == "jax":
        return
    import tracemalloc

    class Counting(KerasTarget):
        touched = 0

        def read(self, tensor, words):
            Counting.touched += words.size
            return super().read(tensor, words)

        def xor(self, tensor, words, masks):
            Counting.touched += words.size
            super().xor(tensor, words, masks)

    model = keras.Sequential([keras.Input((4000,)), layers.Dense(4000, name="big")])
    target, policy = Counting(model), Policy(tensors=("big/kernel",), count=1000)
    inject(target, policy, seed=0)
    Counting.touched = 0
    # numpy tells what its arrays take.
    tracemalloc.start()
    inject(target, policy, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1000 <= Counting.touched <= 5000
    assert peak < 4000 * 4000 * 4 / 16, f"{peak:,} bytes"


def check_a_block_puts_faults_in_and_takes_them_out():
    model = cnn()
    before = words_of(model)
    x = np.ones((2, 8, 8, 1), "float32")
    clean = keras.ops.convert_to_numpy(model(x))
    policy = Policy(tensors=("head/kernel",), bits="sign", fraction=0.5)
    for leave in (None, ZeroDivisionError):
        try:
            with live.faults(model, policy, seed=1) as block:
                during = words_of(model)
                assert (keras.ops.convert_to_numpy(model(x)) != clean).any()
                if leave is not None:
                    raise leave
        except ZeroDivisionError:
            pass
        assert sum(popcount(before[n] ^ during[n]) for n in before) == block.effective == 720
        assert all((before[n] == now).all() for n, now in words_of(model).items())
        assert (keras.ops.convert_to_numpy(model(x)) == clean).all()
    for options in ({"activations": "head"}, {"every": 2}, {"gradients": True}):
        try:
            live.faults(model, Policy(), seed=1, **options)
        except UsageError as error:
            assert "of a Keras model the state alone" in str(error)
        else:
            raise AssertionError("not refused")


def main() -> None:
    checks = {n: f for n, f in globals().items() if n.startswith("check_")}
    found = {}
    for name, check in checks.items():
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
