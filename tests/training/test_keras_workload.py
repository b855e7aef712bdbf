"""Keras: a clean resume is exact on every backend; altered checkpoints train; what does not fit is named."""

import base64
import json
import os
import random
import subprocess
import sys
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

import keras_recipes as recipes
from keras_recipes import dense, go_on, keras, layers, workload

import ckptflip
from ckptflip.cli.main import cli
from ckptflip.errors import CheckpointError, CkptflipError, UsageError, WorkloadError
from ckptflip.training import find, harness
from ckptflip.training.keras import KerasWorkload
from ckptflip.training.keras_settings import backend
from ckptflip.training.track import collapsed

ELSEWHERE = {
    "torch": ("full", "mixed_float16"),
    "tensorflow": ("full", "adam", "mixed_float16", "mixed_bfloat16", "float64"),
    # Every shape of every operation is compiled, which takes its time.
    "jax": ("full", "mixed_float16", "float64"),
}
CASES = [(name, recipe) for name, chosen in ELSEWHERE.items() if find_spec(name) for recipe in chosen]


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory):
    """For each backend a process that goes on from checkpoints of another; they run beside the tests."""
    quiet = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(ckptflip.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    started = {}
    for name in sorted({name for name, _ in CASES}, key=lambda name: name == backend()):
        folder, mode = tmp_path_factory.mktemp(name), "straight"
        if name == backend():
            told, mode = {recipe: recipes.straight(folder, recipe) for recipe in ELSEWHERE[name]}, "resumed"
            (folder / "straight.json").write_text(json.dumps(told))
        command = [sys.executable, str(Path(recipes.__file__)), mode, str(folder), *ELSEWHERE[name]]
        log = (folder / "log").open("w")
        env = os.environ | quiet | {"KERAS_BACKEND": name}
        started[name] = folder, subprocess.Popen(command, env=env, stdout=log, stderr=log)
        log.close()
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def same(one, other):
    """That two checkpoints hold the same words, and the same state beside them."""
    assert [d.tensor for d in ckptflip.diff(one, other) if d.status != "same"] == []
    assert held(one) == held(other)


def held(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("ckptflip.json"))


def alter_held(path, alter):
    """Rewrite our member of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(members["ckptflip.json"])
    alter(content)
    members["ckptflip.json"] = json.dumps(content).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_two_and_two_epochs_equal_four(tmp_path, name):
    # Written out, so that a norm of NaN, as of a step that overflowed, equals itself.
    assert repr(recipes.straight(tmp_path, name)) == repr(recipes.resumed(tmp_path, name))
    same(tmp_path / f"{name}-4.keras", tmp_path / f"{name}-resumed.keras")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The recipe `full` after two epochs, and what the next two measured."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "full-2.keras", recipes.straight(folder, "full")


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "full.keras"
    path.write_bytes(trained[0].read_bytes())
    return path


def test_what_makes_the_resume_exact_is_in_use(saved, trained):
    with ckptflip.opened(saved) as target:
        names = {tensor.name for tensor in target.tensors}
    assert {"batch_normalization/moving_mean", "sgd/iteration", "sgd/momentum of dense/kernel"} <= names
    state = held(saved)
    assert (state["epoch"], state["seed"], state["workload"], state["backend"]) == (2, 3, "full", backend())
    # A draw without a seed, two augmentations, noise and dropout.
    assert len(state["kept"]) == 5
    alter_held(saved, lambda state: state["kept"][1].update(data=state["kept"][2]["data"]))
    made = workload("full")
    made.load(saved)
    assert go_on(made, 1)[0] != trained[1][0]


@pytest.mark.skipif(backend() != "torch", reason="draws of other backends come from variables alone")
def test_dropout_on_torch_draws_from_a_generator_that_is_kept(saved, trained):
    # Keras leaves a dropout without a seed to PyTorch's own generator.
    import torch

    state = torch.Generator().manual_seed(99).get_state().numpy().tobytes()
    alter_held(saved, put(base64.b64encode(state).decode(), "rng", "cpu"))
    made = workload("full")
    made.load(saved)
    assert go_on(made, 1)[0] != trained[1][0]
    alter_held(saved, put("AAAA", "rng", "cpu"))
    with pytest.raises(CheckpointError, match="random generators is damaged"):
        made.load(saved)


def test_measuring_changes_nothing(saved, trained, tmp_path):
    made = workload("full")
    made.load(saved)
    assert made.evaluate() == made.evaluate()
    made.save(tmp_path / "again.keras")
    same(saved, tmp_path / "again.keras")
    measured = made.evaluate()
    assert {"accuracy", "loss", "sparse_categorical_crossentropy", "nan", "inf", "extreme"} == measured.keys()
    assert go_on(made, 2) == trained[1]


def test_keras_itself_reads_the_checkpoint(saved):
    made = workload("full")
    made.load(saved)
    x = recipes.data(6, 6, 2)[1][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = keras.saving.load_model(saved)
        assert np.array_equal(model.predict(x, verbose=0), made.model.predict(x, verbose=0))
    assert int(model.optimizer.iterations) == 6


@pytest.mark.skipif(backend() != "torch", reason="the others compile Keras' own step in another way")
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_a_step_is_the_one_that_keras_takes():
    def compiled():
        norm = layers.BatchNormalization()
        made = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu"), norm, layers.Dense(2)])
        made.compile(recipes.accumulating(), recipes.cross_entropy())
        return made

    made = KerasWorkload("step", model=compiled, data=lambda: recipes.data(5), batch_size=16)
    made.start(5)
    model = compiled()
    model.set_weights(made.model.get_weights())
    (x, y), _ = recipes.data(5)
    order = np.random.default_rng(np.random.SeedSequence((5, 0))).permutation(len(x))
    losses = [float(model.train_on_batch(x[order[i : i + 16]], y[order[i : i + 16]])) for i in (0, 16, 32)]
    assert np.isfinite(losses).all()
    measured = made.train_epoch()
    for one, other in zip(model.get_weights(), made.model.get_weights(), strict=True):
        assert np.array_equal(one, other)
    assert measured["grad_norm"] > 0


def test_the_norm_is_that_of_the_whole_gradient():
    x, y = np.array([[1.0, 2.0]], "float32"), np.array([[3.0]], "float32")

    def model():
        made = keras.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="zeros")])
        # Neither the clipping nor the scale of the loss has a part in the norm.
        sgd = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, clipnorm=0.01))
        made.compile(sgd, "mse")
        return made

    made = KerasWorkload("norm", model=model, data=((x, y), (x, y)), batch_size=1)
    made.start(0)
    # Loss (w·x + b - 3)², at zero: 9; its gradient -6 (1, 2, 1).
    measured = made.train_epoch()
    assert measured["loss"] == 9
    assert measured["grad_norm"] == pytest.approx(6 * 6**0.5, rel=1e-6)
    assert "accuracy" not in made.evaluate()


def test_settings_and_generators_of_the_process_are_left_alone(tmp_path):
    def state():
        keras.config.set_dtype_policy("float32")
        return (
            random.getstate(), np.random.get_state()[1].tolist(), keras.config.floatx(),  # noqa: NPY002
            keras.config.dtype_policy().name, os.environ.get("NPROC"),
        )  # fmt: skip

    before, name = state(), layers.Flatten().name
    for recipe in ("float64", "mixed_bfloat16"):
        made = workload(recipe)
        made.start(1)
        go_on(made, 1)
        made.save(tmp_path / "c.keras")
        made.load(tmp_path / "c.keras")
        assert keras.config.dtype_policy().name == "float32"
    assert state() == before
    count = int(name.rpartition("_")[2]) if name != "flatten" else 0
    assert layers.Flatten().name == f"flatten_{count + 1}"
    if backend() == "torch":
        import torch

        assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_differ_and_the_process_has_no_part():
    results = []
    for seed, outside in ((1, 10), (1, 20), (2, 10)):
        keras.utils.set_random_seed(outside)
        made = workload("adam")
        made.start(seed)
        random.random()
        results.append(go_on(made, 1))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_an_augmentation_is_told_which_samples(tmp_path):
    seen = []

    def augment(inputs, seed, epoch, indices):
        seen.append((seed, epoch, len(indices)))
        return inputs + np.float32(epoch)

    made = KerasWorkload(
        "a", model=dense, data=lambda: recipes.data(5), batch_size=16, augment=augment, test_batch=10
    )
    made.start(4)
    go_on(made, 2)
    assert seen == [(4, epoch, n) for epoch in (0, 1) for n in (16, 16, 8)]


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_the_digits_are_twins(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    ours, theirs = find(f"digits-{name}-keras"), find(f"digits-{name}")
    for one in (ours, theirs):
        one.start(0)
    assert [layer.name for layer in ours.model.layers] == [name for name, _ in theirs.model.named_children()]
    counts = [p.numel() for p in theirs.model.parameters()]
    assert [int(np.prod(v.shape)) for v in ours.model.trainable_variables] == counts
    for (x, y), (a, b) in zip(ours._data(), theirs._data(), strict=True):
        assert np.array_equal(np.moveaxis(x, -1, 1), a)
        assert np.array_equal(y, b)
    if name == "cnn":
        steps = 5 * -(-len(ours._data()[0][0]) // 64)
        rate = ours.model.optimizer._learning_rate
        assert [float(rate(at)) for at in (0, steps - 1, steps)] == [
            torch.tensor(value).item() for value in (0.05, 0.05, 0.025)
        ]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    run = tmp_path_factory.mktemp("digits") / "run"
    return run, harness.train("digits-mlp-keras", 3, run)


def test_critical_flips_make_a_run_collapse_and_undo_mends_it(digits, tmp_path):
    run, clean = digits
    assert [row.epoch for row in clean.rows] == [0, 1, 2, 3]
    assert clean.rows[-1].accuracy > 0.85
    bad = tmp_path / "bad.keras"
    record = ckptflip.inject(
        run / "epoch_001.keras", out=bad, tensors="fc*", bits="critical", count=40, seed=2
    )
    assert record.bits_effective == 40
    altered = harness.resume("digits-mlp-keras", bad, 3)
    assert not altered.clean
    assert altered.rows[0].extreme + altered.rows[0].nan + altered.rows[0].inf > 30
    assert collapsed(altered, clean.rows[-1].accuracy)
    ckptflip.undo(bad, record)
    assert bad.read_bytes() == (run / "epoch_001.keras").read_bytes()
    mended = harness.resume("digits-mlp-keras", bad, 3, overwrite=True, track=tmp_path / "t.jsonl")
    assert mended.rows[-1].loss == clean.rows[-1].loss


# Keras' torch backend carries bfloat16 through float32, which quiets a signalling NaN.
@pytest.mark.parametrize("name", ["adam", "float64", *(["bfloat16"] if backend() != "torch" else [])])
def test_altered_words_reach_the_model_as_they_are(tmp_path, name):
    made = workload(name)
    made.start(0)
    made.save(tmp_path / "c.keras")
    for seed in range(3):  # signalling NaNs among them
        bad = tmp_path / "bad.keras"
        ckptflip.inject(
            tmp_path / "c.keras",
            out=bad,
            bits="exponent",
            fault="set1",
            fraction=0.7,
            seed=seed,
            overwrite=True,
        )
        other = workload(name)
        other.load(bad)
        other.save(tmp_path / "again.keras")
        same(bad, tmp_path / "again.keras")


def test_a_wrong_checksum_is_named(saved):
    ckptflip.inject(saved, in_place=True, tensors="dense*", count=1, seed=0, checksum="leave")
    with pytest.raises(CheckpointError, match=r"Bad CRC-32.*--checksum repair") as caught:
        workload("full").load(saved)
    assert str(saved) in str(caught.value)


def test_damage_is_one_clear_error(saved):
    content = saved.read_bytes()
    for length in (0, 10, 1000, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            workload("full").load(saved)
    rng = np.random.default_rng(0)
    for _ in range(30):
        altered = bytearray(content)
        altered[rng.integers(len(content))] ^= 1 << rng.integers(8)
        saved.write_bytes(altered)
        try:
            workload("full").load(saved)
        except CkptflipError as error:
            assert str(saved) in str(error)
    with pytest.raises(CheckpointError, match="does not exist"):
        workload("full").load(saved.with_name("none.keras"))


def put(value, *keys):
    def alter(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return alter


@pytest.mark.parametrize(
    ("alter", "error", "said"),
    [
        (put("other", "workload"), WorkloadError, "belongs to the workload 'other', not to 'full'"),
        (put("numpy", "backend"), WorkloadError, "trained on Keras' numpy backend.*KERAS_BACKEND=numpy"),
        (put("keras/9", "schema"), WorkloadError, "keras/9"),
        (put(-1, "epoch"), CheckpointError, "epoch -1"),
        (put(1 << 64, "seed"), CheckpointError, "seed 18446744073709551616"),
        (put(10**9, "threads"), CheckpointError, "threads 1000000000"),
        (put("x", "epoch"), CheckpointError, r"ckptflip\.json"),
        (put("Adam", "optimizer"), WorkloadError, "another optimizer: Adam, and the model has SGD"),
        (put([], "variables"), WorkloadError, "another architecture: .*is missing"),
        (
            put([9], "variables", 1, "shape"), WorkloadError,
            r"conv2d/bias is float32\[9\], the model has float32\[3\]",
        ),
        (lambda state: state["kept"].pop(), WorkloadError, "another architecture: its random generators"),
        (put("AAAA", "kept", 2, "data"), CheckpointError, "has 3 bytes, not"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_named(saved, trained, alter, error, said):
    made = workload("full")
    made.load(trained[0])
    before = made.model
    alter_held(saved, alter)
    with pytest.raises(error, match=said) as caught:
        made.load(saved)
    assert str(saved) in str(caught.value)
    assert made.model is before


def test_another_architecture_and_another_optimizer_are_refused(tmp_path):
    def load(model, path):
        KerasWorkload("w", model=model, data=lambda: recipes.data(5), batch_size=16).load(path)

    made = KerasWorkload("w", model=dense, data=lambda: recipes.data(5), batch_size=16)
    made.start(0)
    made.save(tmp_path / "w.keras")
    load(dense, tmp_path / "w.keras")
    with pytest.raises(WorkloadError, match="another optimizer: Adam, and the model has SGD"):
        load(lambda: dense("sgd"), tmp_path / "w.keras")
    with pytest.raises(WorkloadError, match=r"another architecture: .*float32.*the model has float64"):
        load(lambda: dense(floatx="float64", policy="float64"), tmp_path / "w.keras")

    def wider():
        model = keras.Sequential([keras.Input((5,)), layers.Dense(9), layers.Dense(2)])
        model.compile("adam", recipes.cross_entropy())
        return model

    with pytest.raises(WorkloadError, match="another architecture"):
        load(wider, tmp_path / "w.keras")


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_a_model_that_keras_alone_saved_is_refused(tmp_path):
    dense().save(tmp_path / "plain.keras")
    with pytest.raises(WorkloadError, match=r"lacks ckptflip\.json"):
        workload("adam").load(tmp_path / "plain.keras")


def uncompiled():
    return keras.Sequential([keras.Input((5,)), layers.Dense(2)])


def without_loss():
    model = uncompiled()
    model.compile("sgd")
    return model


def frozen():
    model = dense()
    model.trainable = False
    return model


def two_outputs():
    x = keras.Input((5,))
    model = keras.Model(x, [layers.Dense(2)(x), layers.Dense(1)(x)])
    model.compile("sgd", ["mse", "mse"])
    return model


def own_step():
    class Mine(keras.Model):
        def train_step(self, data):
            return {}

    x = keras.Input((5,))
    model = Mine(x, layers.Dense(2)(x))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (uncompiled, r"not compiled; call model\.compile"),
        (without_loss, "compiled without a loss"),
        (frozen, "no weights to train"),
        (two_outputs, "the model has 2 outputs"),
        (own_step, "Mine has a train_step of its own"),
        (lambda: 3, "made a int, not a keras.Model"),
        (lambda: 1 / 0, "making the model failed: ZeroDivisionError"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model, said):
    with pytest.raises(WorkloadError, match=said):
        KerasWorkload("w", model=model, data=lambda: recipes.data(5), batch_size=4).start(0)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((({"a": np.ones(2)}, np.ones(2)),) * 2, "one array each"),
        (((np.ones((3, 5)), np.ones(2)),) * 2, "3 inputs and 2 targets"),
        (((np.ones((0, 5)), np.ones(0)),) * 2, "need samples"),
        (((np.array([None]), np.ones(1)),) * 2, "arrays of numbers"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data, said):
    with pytest.raises(WorkloadError, match=said):
        KerasWorkload("w", model=dense, data=data, batch_size=4).start(0)


def test_numbers_that_make_no_sense_are_refused():
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "threads": 0}, {"batch_size": 1, "test_batch": 0}):
        with pytest.raises(UsageError, match=r"of 1 or more|from 1 to 4096"):
            KerasWorkload("w", model=dense, data=recipes.data(5), **wrong)
    made = workload("adam")
    with pytest.raises(UsageError, match="seed"):
        made.start(-1)
    with pytest.raises(WorkloadError, match="no state yet"):
        made.train_epoch()


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path):
    class Untold(keras.Model):
        def __init__(self, what):
            super().__init__()
            self.head = layers.Dense(2)

        def call(self, x):
            return self.head(x)

        def get_config(self):
            raise TypeError("it cannot be told")

    def model():
        made = Untold(object())
        made.compile("sgd", recipes.cross_entropy())
        return made

    made = KerasWorkload("w", model=model, data=recipes.data(5), batch_size=20)
    made.start(0)
    assert go_on(made, 1)[0][0]["loss"] > 0
    (tmp_path / "w.keras").write_text("old")
    with pytest.raises(CheckpointError, match=r"Keras cannot save the model to .*it cannot be told"):
        made.save(tmp_path / "w.keras")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("w.keras", "old")]


def test_the_commands_train_inject_resume_and_plot(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done

    call("train", "digits-mlp-keras", "--epochs", "3", "--save", "runs")
    names = [f"epoch_00{n}.keras" for n in range(4)]
    assert sorted(path.name for path in Path("runs").iterdir()) == [*names, "track.jsonl"]
    same(Path("runs/epoch_003.keras"), digits[0] / "epoch_003.keras")
    call("inject", "runs", "--epoch", "2", "-o", "bad.keras", "--bits", "critical", "--count", "20")
    call("resume", "digits-mlp-keras", "bad.keras", "--until", "3", "--save", "on", "--label", "20 flips")
    assert sorted(path.name for path in Path("on").iterdir()) == [*names[2:], "track.jsonl"]
    call("plot", "runs", "on", "-o", "c.svg")
    assert Path("c.svg").read_text().startswith("<?xml")
    Path("runs/epoch_002.keras.flips.jsonl").write_text("{}")  # of the file that is replaced
    call("train", "digits-mlp-keras", "--epochs", "1", "--save", "runs", "--overwrite")
    assert sorted(path.name for path in Path("runs").iterdir()) == [*names[:2], "track.jsonl"]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_fresh_process_goes_on_the_same(processes, name, recipe):
    folder, process = processes[name]
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-2000:]
    straight, resumed = (
        json.loads((folder / f"{mode}.json").read_text()) for mode in ("straight", "resumed")
    )
    assert repr(resumed[recipe]) == repr(straight[recipe])
    same(folder / f"{recipe}-4.keras", folder / f"{recipe}-resumed.keras")
    assert held(folder / f"{recipe}-4.keras")["backend"] == name


@pytest.mark.skipif(
    not all(map(find_spec, ("triton", "tensorflow", "torch"))), reason="needs TensorFlow, PyTorch and Triton"
)
def test_tensorflow_and_an_optimizer_of_pytorch_in_one_process():
    """Triton, which PyTorch's optimizers load, ends the process if it comes after TensorFlow."""
    script = "from ckptflip.training import find\nfor n in 'digits-mlp-keras', 'digits-mlp': find(n).start(0)"
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
