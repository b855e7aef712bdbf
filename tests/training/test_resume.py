"""A clean resume is exact: 5 epochs, save, load and 10 more give the bits of 15 epochs."""

import json
import random
import subprocess
import sys

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ckptflip import torch_h5  # noqa: E402
from ckptflip.errors import CheckpointError, UsageError, WorkloadError  # noqa: E402
from ckptflip.training import find  # noqa: E402
from ckptflip.training.pytorch import TorchWorkload  # noqa: E402

BUILT_IN = ["digits-cnn", "digits-mlp"]


def go_on(workload, epochs):
    return [(workload.train_epoch(), workload.evaluate()) for _ in range(epochs)]


@pytest.fixture(scope="module", params=BUILT_IN)
def straight(request, tmp_path_factory):
    """15 epochs at a stretch, with the checkpoints of epochs 5 and 15."""
    folder = tmp_path_factory.mktemp(request.param)
    workload = find(request.param)
    workload.start(3)
    go_on(workload, 5)
    workload.save(folder / "5.h5")
    measured = go_on(workload, 10)
    workload.save(folder / "15.h5")
    return request.param, folder, measured


def test_five_and_ten_epochs_equal_fifteen(straight, tmp_path):
    name, folder, measured = straight
    workload = find(name)
    workload.load(folder / "5.h5")
    assert workload.epoch == 5
    assert go_on(workload, 10) == measured
    workload.save(tmp_path / "15.h5")
    # The file holds weights, optimizer, scheduler and random states: equal bytes are equal states.
    assert (tmp_path / "15.h5").read_bytes() == (folder / "15.h5").read_bytes()


def test_a_fresh_process_goes_on_the_same(straight, tmp_path):
    name, folder, measured = straight
    code = (
        "import json, sys; from ckptflip.training import find\n"
        "workload = find(sys.argv[1]); workload.load(sys.argv[2])\n"
        "print(json.dumps([(workload.train_epoch(), workload.evaluate()) for _ in range(10)]))\n"
        "workload.save(sys.argv[3])\n"
    )
    command = [sys.executable, "-c", code, name, str(folder / "5.h5"), str(tmp_path / "15.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(measured))
    assert (tmp_path / "15.h5").read_bytes() == (folder / "15.h5").read_bytes()


def test_what_makes_the_resume_exact_is_in_use(straight):
    """Dropout, momentum and schedule are there, so the tests above would see them lost."""
    name, folder, _ = straight
    state = torch_h5.load(folder / "5.h5")
    moment = {"digits-cnn": "momentum_buffer", "digits-mlp": "exp_avg_sq"}[name]
    assert all(one[moment].abs().sum() > 0 for one in state["optimizer"]["state"].values())
    with h5py.File(folder / "5.h5") as file:
        names = [file[f"optimizer/state/{i}"].attrs["name"] for i in range(4)]
    assert names == list(state["model"])[:4]
    if name == "digits-cnn":
        start = find(name)
        start.start(3)
        assert start.model.dropout1.p > 0
        assert state["scheduler"]["last_epoch"] == 5
        assert state["optimizer"]["param_groups"][0]["lr"] == 0.025


def test_losing_the_random_state_matters_to_dropout_alone(straight, tmp_path):
    name, folder, measured = straight
    state = torch_h5.load(folder / "5.h5")
    state["rng"]["cpu"] = torch.Generator().manual_seed(99).get_state()
    torch_h5.save(state, tmp_path / "other.h5")
    workload = find(name)
    workload.load(tmp_path / "other.h5")
    assert (go_on(workload, 1)[0] != measured[0]) == (name == "digits-cnn")


def test_settings_and_generators_of_the_process_are_left_alone(tmp_path):
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        numpy_state = np.random.get_state
        before = torch.get_rng_state(), numpy_state()[1].tolist(), random.getstate()
        workload = find("digits-cnn")
        workload.start(1)
        go_on(workload, 1)
        workload.save(tmp_path / "c.h5")
        workload.load(tmp_path / "c.h5")
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (numpy_state()[1].tolist(), random.getstate()) == before[1:]
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)


def test_seeds_differ_and_the_process_generator_has_no_part():
    results = []
    for seed, outside in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(outside)
        workload = find("digits-mlp")
        workload.start(seed)
        torch.rand(outside)
        results.append(go_on(workload, 1))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_nan_and_extreme_weights_are_counted_and_trained_on(straight, tmp_path):
    name, folder, _ = straight
    state = torch_h5.load(folder / "5.h5")
    weights = state["model"]["fc2.weight"].view(torch.int32)
    weights[0, :3] = torch.tensor([0x7F800001, 0x7F800000, 0x7E967699], dtype=torch.int32)
    torch_h5.save(state, tmp_path / "bad.h5")
    workload = find(name)
    workload.load(tmp_path / "bad.h5")
    tested = workload.evaluate()
    assert (tested["nan"], tested["inf"], tested["extreme"]) == (1, 1, 1)
    assert np.isnan(tested["loss"])
    assert np.isnan(workload.train_epoch()["loss"])
    assert workload.epoch == 6
    assert workload.evaluate()["nan"] > 1


def test_a_signalling_nan_reaches_the_model_as_it_is(straight, tmp_path):
    name, folder, _ = straight
    state = torch_h5.load(folder / "5.h5")
    state["model"]["fc2.weight"].view(torch.int32)[0, 0] = 0x7F800001
    torch_h5.save(state, tmp_path / "bad.h5")
    workload = find(name)
    workload.load(tmp_path / "bad.h5")
    workload.save(tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "bad.h5").read_bytes()


def test_another_workload_s_checkpoint_is_refused(straight):
    name, folder, _ = straight
    other = find(next(one for one in BUILT_IN if one != name))
    with pytest.raises(WorkloadError, match=f"belongs to the workload '{name}'"):
        other.load(folder / "5.h5")
    with pytest.raises(WorkloadError, match="no state yet"):
        other.train_epoch()


def delete(*keys):
    def alter(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return alter


def put(value, *keys):
    def alter(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return alter


@pytest.mark.parametrize(
    ("alter", "error", "said"),
    [
        (delete("rng"), WorkloadError, "lacks rng"),
        (delete("model", "fc1.bias"), WorkloadError, "another architecture: fc1.bias is missing"),
        (
            put(torch.ones(3), "model", "fc1.bias"),
            WorkloadError,
            r"float32\[3\], the model has float32\[64\]",
        ),
        (put(torch.ones(64).half(), "model", "fc1.bias"), WorkloadError, "float16"),
        (put([1], "model"), CheckpointError, "its model is a list"),
        (put(-1, "epoch"), CheckpointError, "epoch -1"),
        (
            put(torch.zeros(5056, dtype=torch.uint8), "rng", "cpu"),
            CheckpointError,
            "random generators is damaged",
        ),
        (put(None, "rng", "cpu"), CheckpointError, "random generators is damaged"),
        (delete("optimizer", "param_groups", 0, "lr"), WorkloadError, "another optimizer: lr"),
        (put({}, "optimizer"), CheckpointError, "parameter groups"),
        (put([], "optimizer", "param_groups"), WorkloadError, "the optimizer does not fit"),
        (put({}, "scheduler"), WorkloadError, "scheduler"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, alter, error, said):
    workload = find("digits-mlp")
    workload.start(0)
    workload.save(tmp_path / "c.h5")
    state = torch_h5.load(tmp_path / "c.h5")
    alter(state)
    torch_h5.save(state, tmp_path / "c.h5")
    before = workload.model
    with pytest.raises(error, match=said) as caught:
        workload.load(tmp_path / "c.h5")
    assert str(tmp_path / "c.h5") in str(caught.value)
    assert workload.model is before


@pytest.mark.parametrize(
    "extras",
    [
        {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
        {"scheduler": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])},
        {"scaler": lambda: torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)},
    ],
    ids=["plateau", "multistep", "scaler"],
)
def test_a_workload_of_one_s_own_resumes_exactly(tmp_path, extras):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()

    def make():
        return TorchWorkload(
            "own",
            model=lambda: torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 2)
            ),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            loss=torch.nn.CrossEntropyLoss(),
            data=((x, y), (x, y)),
            batch_size=16,
            **extras,
        )

    one, two = make(), make()
    one.start(0)
    go_on(one, 3)
    one.save(tmp_path / "3.h5")
    two.load(tmp_path / "3.h5")
    assert go_on(two, 3) == go_on(one, 3)
    one.save(tmp_path / "a.h5")
    two.save(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="seed"):
        find("digits-mlp").start(-1)
    with pytest.raises(UsageError, match="batch_size"):
        TorchWorkload("x", model=None, optimizer=None, loss=None, data=None, batch_size=0)
