"""Vision workloads resume exactly, train as their twins do, and refuse what does not fit."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from ckptflip import torch_h5  # noqa: E402
from ckptflip.cli.main import run  # noqa: E402
from ckptflip.errors import UsageError, WorkloadError  # noqa: E402
from ckptflip.training import find  # noqa: E402
from ckptflip.vision import digits, recipes, weights, workloads  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import cifar_writer as writer  # noqa: E402

SMALL = {"width": 0.0625, "subset": 48, "batch_size": 32}
TENSORFLOW = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def go_on(workload, epochs):
    return [(workload.train_epoch(), workload.evaluate()) for _ in range(epochs)]


def resumes_exactly(make, folder, epochs=2):
    """Some epochs, save, load into a fresh workload, as many more: the bits of the uninterrupted run."""
    straight, resumed = make(), make()
    suffix = getattr(straight, "suffix", ".h5")
    straight.start(3)
    go_on(straight, epochs)
    straight.save(folder / f"half{suffix}")
    measured = go_on(straight, epochs)
    straight.save(folder / f"whole{suffix}")
    resumed.load(folder / f"half{suffix}")
    assert go_on(resumed, epochs) == measured
    resumed.save(folder / f"again{suffix}")
    return state_of(folder / f"whole{suffix}") == state_of(folder / f"again{suffix}")


def state_of(path):
    """The bytes of a checkpoint; of Keras' archive those members that hold no date."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in ("model.weights.h5", "ckptflip.json")]


@pytest.mark.parametrize("precision", ["fp32", "mixed-bf16", "bf16", "fp64"])
def test_a_narrow_resnet_resumes_exactly(tmp_path, precision):
    assert resumes_exactly(lambda: find("resnet18", precision=precision, **SMALL), tmp_path)
    state = torch_h5.load(tmp_path / "half.h5")
    stored = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    assert state["model"]["conv1.weight"].dtype == stored
    moments = [one["momentum_buffer"] for one in state["optimizer"]["state"].values()]
    assert len(moments) == 62
    assert all(moment.dtype == stored and moment.abs().sum() > 0 for moment in moments)
    assert (state["model"]["bn1.running_mean"] != 0).all()
    assert state["scheduler"]["last_epoch"] == 2


def test_float16_with_a_gradient_scaler_and_dropout_resumes_exactly(tmp_path):
    make = lambda: find("alexnet", precision="mixed-fp16", width=0.0625, subset=40, batch_size=20)  # noqa: E731
    assert resumes_exactly(make, tmp_path)
    assert torch_h5.load(tmp_path / "half.h5")["scaler"]["_growth_tracker"] == 4


def test_a_fresh_process_goes_on_the_same(tmp_path):
    straight = find("resnet18", **SMALL)
    straight.start(1)
    straight.train_epoch()
    straight.save(tmp_path / "1.h5")
    straight.train_epoch()
    straight.save(tmp_path / "2.h5")
    code = (
        "import sys; from ckptflip.training import find\n"
        f"workload = find('resnet18', **{SMALL})\n"
        "workload.load(sys.argv[1]); workload.train_epoch(); workload.save(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "1.h5"), str(tmp_path / "again.h5")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "mixed-fp16"])
def test_half_precision_is_what_computes(precision):
    """In each precision the outputs differ from those of fp32 with the same weights by about its rounding."""
    options = {"width": 0.0625, "subset": 16, "batch_size": 8, "augment": False}
    exact, half = find("vgg16", **options), find("vgg16", precision=precision, **options)
    exact.start(0)
    half.start(0)
    first, second = exact.evaluate()["loss"], half.evaluate()["loss"]
    assert 0 < abs(first - second) < 0.01 * first
    assert next(half.model.parameters()).dtype == (torch.float16 if precision == "fp16" else torch.float32)


def test_augmentation_changes_training_and_can_be_left_out():
    losses = []
    for augment in (True, False):
        workload = find("resnet18", augment=augment, **SMALL)
        workload.start(0)
        losses.append((workload.train_epoch()["loss"], workload.evaluate()["loss"]))
    assert losses[0][0] != losses[1][0]


def test_names_tell_what_a_checkpoint_depends_on(tmp_path):
    assert find("resnet18").name == "resnet18[data=digits,precision=fp32]"
    made = workloads.alexnet(precision="fp16", augment=False, rate=0.1, **SMALL)
    assert made.name == (
        "alexnet[data=digits,precision=fp16,width=0.0625,augment=no,subset=48,batch_size=32,rate=0.1]"
    )
    made.start(0)
    made.save(tmp_path / "0.h5")
    other = workloads.alexnet(precision="bf16", augment=False, rate=0.1, **SMALL)
    with pytest.raises(WorkloadError, match=r"precision=fp16.*precision=bf16"):
        other.load(tmp_path / "0.h5")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "fp8"}, "one of fp32, fp64"),
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
        ({"subset": 0}, "subset"),
        ({"rate": -1.0}, "learning rate"),
        ({"data": "cifar10"}, "cifar10:DIR"),
        ({"data": ""}, "not nothing"),
        ({"data": "/nowhere"}, "no folder or archive /nowhere"),
        ({"precison": "fp16"}, "no option precison; did you mean precision"),
        ({"thread": 1}, "no option thread; did you mean threads"),
        ({"config": 1}, "no option config; it takes data, .*, device, threads$"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        find("resnet18", **options)


def test_workloads_without_options_say_so():
    with pytest.raises(UsageError, match="digits-mlp has no option precision; it takes none"):
        find("digits-mlp", precision="fp16")


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_cifar_s_files_are_trained_on_and_resumed(tmp_path, data, monkeypatch):
    place = writer.write(tmp_path / "data", data, "binary")
    options = {"width": 0.0625, "batch_size": 4}
    make = lambda: find("resnet18", data=f"{data}:{place}", **options)  # noqa: E731
    assert resumes_exactly(make, tmp_path)
    made = make()
    assert made.name.startswith(f"resnet18[data={data},")
    made.start(0)
    assert made.model.fc.out_features == (10 if data == "cifar10" else 100)
    # A folder that moved is the same data: only the set's name is kept.
    moved = place.rename(tmp_path / "moved")
    found = find("resnet18", data=str(moved), **options)
    found.load(tmp_path / "half.h5")
    assert found.epoch == 2


def test_flips_are_for_photographs_only():
    assert not recipes.Recipe("resnet18", recipes.Options()).draws(0, 0, range(50)).mirrored.any()


def test_digits_are_enlarged_exactly():
    (x, y), (x_test, _) = digits.images(3)
    assert x.shape == (1437, 3, 32, 32)
    assert x_test.shape == (360, 3, 32, 32)
    assert np.bincount(y).min() > 130
    assert np.array_equal(x[:, 0], x[:, 2])
    assert digits.images(1)[0][0].shape == (1437, 1, 32, 32)
    assert np.array_equal(x * 1024, np.round(x * 1024))
    # Pixel centres of the small image lie between four of the large one: these average to it inside.
    small = np.random.default_rng(0).integers(0, 17, (2, 8, 8)).astype(np.float32)
    large = digits.enlarged(small, 24)
    assert np.array_equal(large[:, 1::3, 1::3], small)
    with pytest.raises(UsageError):
        digits.enlarged(small, 20)
    with pytest.raises(UsageError):
        digits.images(2)


def test_the_command_line_trains_resumes_and_refuses(tmp_path, capsys):
    shape = ["--width", "0.0625", "--subset", "24", "--precision", "mixed-bf16", "--no-augment"]
    assert run(["train", "vgg16", "--epochs", "2", "--save", str(tmp_path / "a"), *shape]) == 0
    start = str(tmp_path / "a" / "epoch_001.h5")
    assert run(["resume", "vgg16", start, "--until", "2", "--save", str(tmp_path / "b"), *shape]) == 0
    ends = [(tmp_path / run / "epoch_002.h5").read_bytes() for run in "ab"]
    assert ends[0] == ends[1]
    capsys.readouterr()
    assert run(["resume", "vgg16", start, "--until", "2"]) == 1
    assert "belongs to the workload 'vgg16[data=digits,precision=mixed-bf16" in capsys.readouterr().err
    assert run(["train", "digits-cnn", "--epochs", "1", "--save", str(tmp_path / "c"), "--width", "2"]) == 2
    assert "digits-cnn has no option width; it takes precision" in capsys.readouterr().err


# With Keras


@TENSORFLOW
@pytest.mark.parametrize("precision", ["fp32", "mixed-fp16"])
def test_a_narrow_keras_resnet_resumes_exactly(tmp_path, precision):
    pytest.importorskip("keras")
    make = lambda: find("resnet18-keras", precision=precision, **SMALL)  # noqa: E731
    assert resumes_exactly(make, tmp_path, epochs=1)


@TENSORFLOW
@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet18"])
def test_twins_train_alike(name, monkeypatch):
    """Three steps of SGD with momentum and augmentation on the same batches, from the same weights."""
    pytest.importorskip("keras")
    from ckptflip.training.keras_settings import backend
    from ckptflip.vision import keras_models, torch_models

    for models in (torch_models, keras_models):
        # Dropout draws from other generators in each framework.
        whole = models.alexnet
        monkeypatch.setattr(
            models, "alexnet", lambda *args, whole=whole, **given: whole(*args, dropout=0.0, **given)
        )
    double = backend() == "tensorflow"
    if not double and name == "vgg16":
        pytest.skip("in float32 a narrow VGG16's steps magnify rounding; in float64 its twins are equal")
    options = {"width": 0.125, "subset": 96, "batch_size": 32, "rate": 1 / 64}
    options["precision"] = "fp64" if double else "fp32"
    ours, theirs = find(name, **options), find(f"{name}-keras", **options)
    ours.start(5)
    theirs.start(5)
    weights.set_keras(theirs.model, weights.to_keras(ours.model.state_dict()))
    before, after = ours.train_epoch(), theirs.train_epoch()
    # Even then Keras keeps learning rate and momentum in float32.
    close = 1e-6 if double else 2e-3
    assert after["loss"] == pytest.approx(before["loss"], rel=close)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=close)
    expected = weights.to_keras(ours.model.state_dict())
    for path, array in weights.read_keras(theirs.model).items():
        # Keras' running variance is the batch's, PyTorch's that of the population: n against n - 1, n >= 128.
        loose = 1e-2 if path.endswith("moving_variance") else close
        np.testing.assert_allclose(array, expected[path], rtol=loose, atol=close, err_msg=path)


@TENSORFLOW
def test_keras_learning_rates_fall_after_the_same_epochs(monkeypatch):
    keras = pytest.importorskip("keras")
    monkeypatch.setattr(workloads, "MILESTONES", (1, 2))
    options = {"width": 0.0625, "subset": 24, "batch_size": 8, "augment": False}
    ours, theirs = find("vgg16", **options), find("vgg16-keras", **options)
    ours.start(0)
    theirs.start(0)
    rates = theirs.model.optimizer._learning_rate
    for epoch in range(3):
        expected = 0.05 / 10**epoch
        for step in range(3 * epoch, 3 * epoch + 3):
            assert float(keras.ops.convert_to_numpy(rates(step))) == pytest.approx(expected)
        assert ours._run.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        ours.train_epoch()


def test_keras_options_are_checked_and_named():
    pytest.importorskip("keras")
    from ckptflip.training.keras_settings import backend

    assert find("resnet18-keras", width=0.5).name == "resnet18-keras[data=digits,precision=fp32,width=0.5]"
    with pytest.raises(UsageError, match=r"alexnet-keras has no option device; it takes .*, threads$"):
        find("alexnet-keras", device="cuda")
    if backend() != "tensorflow":
        with pytest.raises(UsageError, match="computes in float32"):
            find("resnet18-keras", precision="fp64")


def test_help_names_the_models():
    from ckptflip.cli.train import command

    text = CliRunner().invoke(command, ["--help"]).output
    assert "resnet18" in text
    assert "--precision" in text
