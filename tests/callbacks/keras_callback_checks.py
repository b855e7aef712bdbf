"""Checks of Keras' callbacks that run in a process of their own, on the backend that KERAS_BACKEND names.

Prints, as JSON, what each check raised; null where it holds.
"""

from __future__ import annotations

import json
import math
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

from ckptflip import record_files
from ckptflip.bits import popcount
from ckptflip.callbacks.guard import DivergenceGuard
from ckptflip.callbacks.keras import KerasGuard, KerasInjector, KerasTracker
from ckptflip.callbacks.keras_seals import KerasSealer
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.callbacks.tracker import ConvergenceTracker
from ckptflip.errors import CkptflipError
from ckptflip.faults import Policy
from ckptflip.live.keras_variables import KerasTarget
from ckptflip.protect.seals import verify
from ckptflip.training import track
from ckptflip.training.track import Header, Row, Track

BACKEND = os.environ["KERAS_BACKEND"]
X = np.random.default_rng(0).random((24, 6)).astype("float32")
Y = (X.sum(axis=1) > 3).astype("int32")
# Every step of every model is compiled there, which takes its time.
ON_JAX = (
    "check_exactly_the_recorded_words_differ_from_the_same_run_without",
    "check_a_resumed_run_does_not_inject_twice",
    "check_gradients_are_hit_before_the_step_or_refused",
    "check_the_guard_takes_the_model_back_and_training_goes_on",
)
SETTINGS = {"batch_size": 8, "verbose": 0, "shuffle": False}  # 3 steps in an epoch


def model_of(seed=1, **compiled):
    if BACKEND == "tensorflow":
        # Compiling every step of every model takes its time; one check does.
        compiled = {"jit_compile": False} | compiled
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="stem"),
            layers.BatchNormalization(name="bn"),
            layers.Dense(2, name="head", activation="softmax"),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, name="sgd"),
        keras.losses.SparseCategoricalCrossentropy(),
        metrics=["accuracy"],
        **compiled,
    )
    return model


def words_of(model):
    target = KerasTarget(model)
    return {t.name: target.read(i, np.arange(t.words)).copy() for i, t in enumerate(target.tensors)}


class Snapshots(keras.callbacks.Callback):
    """All words after every step; list it where they are wanted."""

    def __init__(self):
        super().__init__()
        self.after = []

    def on_train_batch_end(self, batch, logs=None):
        self.after.append(words_of(self.model))


def fitted(*callbacks, epochs=2, model=None, **more):
    model = model or model_of()
    model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **SETTINGS, **more)
    return model


def differing(a, b):
    return {
        (name, int(i)): (int(a[name][i]), int(b[name][i]))
        for name in a
        for i in np.flatnonzero(a[name] != b[name])
    }


def recorded(record):
    plan, entries = record.plan, record.header.tensors
    rows = zip(plan.tensor, plan.word, plan.before, plan.after, strict=True)
    return {(entries[t].name, int(w)): (int(b), int(a)) for t, w, b, a in rows if a != b}


def refused(said, *callbacks, model=None, **more):
    model = model or model_of()
    if model.built:
        before = words_of(model)
    try:
        fitted(*callbacks, model=model, **more)
    except CkptflipError as why:
        assert said in str(why), why
    else:
        raise AssertionError(f"not refused: {said}")
    if model.built:
        assert not differing(before, words_of(model))
    assert "apply" not in vars(model.optimizer)


def check_exactly_the_recorded_words_differ_from_the_same_run_without():
    for roles in (("model",), ("optimizer",), ("statistic",))[: 1 if BACKEND == "jax" else 3]:
        clean, faulty = Snapshots(), Snapshots()
        schedule = InjectionSchedule(Policy(roles=roles, count=5, bits="exponent"), seed=3, steps=4)
        injector = KerasInjector(schedule)
        fitted(clean)
        fitted(injector, faulty)
        (record,) = injector.records
        assert len(recorded(record)) >= 1
        for step in range(4):
            assert not differing(clean.after[step], faulty.after[step]), step
        assert differing(clean.after[4], faulty.after[4]) == recorded(record)
        assert differing(clean.after[5], faulty.after[5])


def check_an_epoch_is_hit_at_its_first_step_and_records_are_written():
    folder = Path(tempfile.mkdtemp())
    injector = KerasInjector(InjectionSchedule(Policy(roles=("weight",)), seed=2, epochs=1), records=folder)
    fitted(injector, epochs=3)
    assert [one["step"] for one in injector.state_dict()["schedule"]["fired"]] == [3]
    assert record_files.read(folder / "step_000003.flips.jsonl").header.output == "epoch 1, step 3"


def check_undo_right_after_a_firing_gives_the_clean_run():
    class Undo(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if len(injector.records) == 1 and not done:
                assert self.model is not None
                done.append(injector.undo())

    done = []
    injector = KerasInjector(InjectionSchedule(Policy(roles=("model",), count=6), seed=5, steps=2))
    clean = words_of(fitted())
    again = words_of(fitted(injector, Undo()))
    assert done == [len(injector.records[0])]
    assert not differing(clean, again)


def check_a_resumed_run_does_not_inject_twice():
    path = Path(tempfile.mkdtemp()) / "m.weights.h5"
    schedules = (
        {"epochs": "0-1"},
        {"probability": 0.5, "once": True},
        {"every": 2},
        {"steps": [0, 4]},
    )[: 4 if BACKEND == "torch" else 2 if BACKEND == "tensorflow" else 1]
    for when in schedules:
        policy = Policy(roles=("weight", "bias"), count=3, bits="mantissa")
        whole = KerasInjector(InjectionSchedule(policy, seed=4, **when))
        straight = words_of(fitted(whole, epochs=3))
        first = KerasInjector(InjectionSchedule(policy, seed=4, **when))
        fitted(first, keras.callbacks.ModelCheckpoint(path, save_weights_only=True), epochs=1)
        model = model_of(seed=9)
        model.optimizer.build(model.trainable_variables)
        model.load_weights(path)
        second = KerasInjector(InjectionSchedule(policy, seed=4, **when))
        resumed = words_of(fitted(second, model=model, epochs=3, initial_epoch=1))
        wheres = [r.header.output for r in (*first.records, *second.records)]
        assert wheres == [r.header.output for r in whole.records], when
        assert not differing(straight, resumed), when


def check_state_of_ones_own_checkpoints_counts_instead_of_the_optimizer():
    policy = Policy(roles=("weight",))
    first = KerasInjector(InjectionSchedule(policy, seed=4, epochs=0))
    model = fitted(first, epochs=1)
    state = json.loads(json.dumps(first.state_dict()))
    assert (state["steps"], len(state["schedule"]["fired"])) == (3, 1)
    again = KerasInjector(InjectionSchedule(policy, seed=4, epochs=0))
    again.load_state_dict(state)
    fitted(again, model=model, epochs=1)
    assert again.records == []


def check_gradients_are_hit_before_the_step_or_refused():
    policy = Policy(tensors=("gradients/head/bias",), bits="sign", count=2)
    injector = KerasInjector(InjectionSchedule(policy, seed=1, steps=1), gradients=True)
    if BACKEND != "torch":
        refused("faults in gradients would never be seen", injector)
        if BACKEND == "jax":
            return
    eager = {} if BACKEND == "torch" else {"run_eagerly": True}
    clean, faulty = Snapshots(), Snapshots()
    fitted(clean, model=model_of(**eager))
    model = fitted(injector, faulty, model=model_of(**eager))
    (record,) = injector.records
    assert record.header.tensors[0].name == "gradients/head/bias"
    assert not differing(clean.after[0], faulty.after[0])
    assert {name for name, _ in differing(clean.after[1], faulty.after[1])} == {
        "head/bias",
        "sgd/momentum of head/bias",
    }
    before = clean.after[0]["sgd/momentum of head/bias"].view("float32")
    # v ← 0.9 v − 0.1 g: with the sign of g turned, the step goes the other way.
    a = clean.after[1]["sgd/momentum of head/bias"].view("float32") - np.float32(0.9) * before
    b = faulty.after[1]["sgd/momentum of head/bias"].view("float32") - np.float32(0.9) * before
    assert np.allclose(a, -b, rtol=1e-3, atol=1e-7)
    assert "apply" not in vars(model.optimizer)


def check_compiled_models_see_faults_in_weights():
    if BACKEND == "torch":
        return
    clean = fitted(model=model_of(jit_compile=True))
    injector = KerasInjector(
        InjectionSchedule(Policy(tensors=("head/bias",), bits="critical"), seed=1, steps=0)
    )
    faulty = fitted(injector, model=model_of(jit_compile=True))
    assert faulty.jit_compile
    assert len(injector.records) == 1
    assert differing(words_of(clean), words_of(faulty))


def check_what_cannot_work_is_refused_before_training():
    def injector(policy=None, **when):
        return KerasInjector(InjectionSchedule(policy or Policy(), seed=1, **when))

    refused("matches nothing", injector(Policy(tensors=("nowhere/kernel",)), steps=1))
    refused("larger than", injector(Policy(tensors=("bn/gamma",), count=9999), steps=1))
    refused("can never fire in this run", injector(epochs=9), epochs=3)
    refused("can never fire in this run", injector(steps=6), epochs=2)
    refused("rank 2", injector(steps=1, ranks=2))
    unbuilt = keras.Sequential([layers.Dense(2)])
    unbuilt.compile("sgd", "mse")
    if BACKEND != "torch":
        refused("without a stop", injector(steps=1), model=model_of(steps_per_execution=3))
    for bad in ("schedule", None):
        try:
            KerasInjector(bad)
        except CkptflipError as why:
            assert "InjectionSchedule" in str(why)
        else:
            raise AssertionError("taken")


def check_nothing_is_left_behind():
    model = model_of()
    known = {id(v) for v in model.variables}
    attributes = set(vars(model)), set(vars(model.optimizer))
    injector = KerasInjector(InjectionSchedule(Policy(roles=("weight",)), seed=1, every=1))
    other = model_of()
    fitted(model=other)
    fitted(injector, model=model)
    assert known == {id(v) for v in model.variables}
    assert set(vars(model)) == set(vars(other))
    assert set(vars(model.optimizer)) == set(vars(other.optimizer))
    assert attributes[1] <= set(vars(model.optimizer))


def check_the_tracker_writes_a_track_from_fits_logs():
    out = Path(tempfile.mkdtemp()) / "track.jsonl"
    clean = Track(
        Header(workload="k", start_epoch=0, until=2), tuple(Row(epoch=e, accuracy=0.99) for e in (1, 2))
    )
    tracker = ConvergenceTracker(clean, out)
    model = fitted(KerasTracker(tracker), validation_data=(X, Y))
    rows = track.read(out).rows
    assert [r.epoch for r in rows] == [1, 2]
    measured = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert math.isclose(rows[-1].accuracy, measured["accuracy"], rel_tol=1e-6)
    assert rows[0].train_loss > 0 and rows[0].seconds > 0
    assert math.isclose(tracker.comparisons[-1].difference, rows[-1].accuracy - 0.99)


def check_the_guard_stops_at_the_batch_that_diverges():
    schedule = InjectionSchedule(Policy(tensors=("head/kernel",), fault="value:nan"), seed=1, steps=4)
    guard = DivergenceGuard()
    after = Snapshots()
    fitted(KerasInjector(schedule), KerasGuard(guard), after, epochs=4)
    (event,) = guard.events
    assert (event.step, event.reason) == (6, "loss is nan")
    assert len(after.after) == 6


def check_the_guard_takes_the_model_back_and_training_goes_on():
    schedule = InjectionSchedule(Policy(tensors=("head/kernel",), fault="value:nan"), seed=1, steps=4)
    folder = Path(tempfile.mkdtemp())
    guard = DivergenceGuard("rollback", folder=folder)
    after = Snapshots()
    clean = Snapshots()
    fitted(clean, epochs=1)
    model = fitted(KerasInjector(schedule), KerasGuard(guard), after, epochs=4)
    assert [(e.step, e.restored) for e in guard.events] == [(6, 3)]
    restored, good = after.after[5], clean.after[2]
    assert not differing({n: w for n, w in restored.items() if n in good}, good)
    assert len(after.after) == 12
    assert all(math.isfinite(x) for x in model.history.history["loss"][2:])
    assert sum(popcount(w) for w in words_of(model).values())


def check_the_sealer_seals_what_is_saved():
    folder = Path(tempfile.mkdtemp())
    saver = keras.callbacks.ModelCheckpoint(folder / "at_{epoch:02d}.weights.h5", save_weights_only=True)
    (folder / "other.weights.h5").write_bytes(b"nobody's")
    fitted(saver, KerasSealer(saver, repair=0.1), epochs=2)
    sealed = sorted(p.name for p in folder.glob("*.seal"))
    assert sealed == ["at_01.weights.h5.seal", "at_02.weights.h5.seal"], sealed
    assert all(verify(folder / name.removesuffix(".seal")).intact for name in sealed)
    batches = keras.callbacks.ModelCheckpoint(folder / "batch_{batch}.keras", save_freq=2)
    fitted(batches, KerasSealer(batches), epochs=1)
    assert verify(folder / "batch_2.keras").intact


def main() -> None:
    checks = {n: f for n, f in globals().items() if n.startswith("check_")}
    if BACKEND == "jax":
        checks = {n: checks[n] for n in ON_JAX}
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
