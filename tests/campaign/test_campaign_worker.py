"""What a worker does: trials against what the package does step by step; shortcuts against full runs."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import ckptflip
from ckptflip.campaign import clean as clean_runs
from ckptflip.campaign import loading, worker
from ckptflip.campaign import task as tasks
from ckptflip.campaign.executors.worker_process import WARM
from ckptflip.campaign.machine import environment_of
from ckptflip.campaign.outcomes import judge
from ckptflip.campaign.spec import Metric
from ckptflip.campaign.task import CleanResult, CleanTask, TrialResult, TrialTask, WorkloadSpec
from ckptflip.errors import CampaignError
from ckptflip.faults.policy import Policy

EPOCH, UNTIL = 3, 9


@pytest.fixture(autouse=True)
def toy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def perform(task: tasks.Task) -> Any:
    return tasks.decode_result(worker.perform(tasks.encode(task)))


def clean(folder: Path, **options: Any) -> CleanResult:
    until = options.pop("until", UNTIL)
    keep = options.pop("keep", (EPOCH, EPOCH + 1, UNTIL))
    spec = WorkloadSpec(name="campaign_toy:make", options=options)
    made = perform(CleanTask(workload=spec, seed=4, until=until, keep=keep, folder=str(folder / "seed_4")))
    assert isinstance(made, CleanResult)
    return made


def trial(folder: Path, run: CleanResult, policy: Policy | None, seed: int, **changes: Any) -> TrialResult:
    options = changes.pop("options", {})
    made = perform(TrialTask(
        workload=WorkloadSpec(name="campaign_toy:make", options=options),
        checkpoint=str(folder / "seed_4" / run.checkpoints[EPOCH]), epoch=EPOCH, until=UNTIL, policy=policy,
        seed=seed, clean=dict(zip(run.epochs, run.digests, strict=True)), **changes,
    ))  # fmt: skip
    assert isinstance(made, TrialResult)
    return made


def test_workers_are_told_the_frameworks_of_built_in_workloads_alone() -> None:
    def told(*names: str, **more: Any) -> dict[str, str]:
        plain = {"name": "x", "restart": {"epochs": [1], "until": 2}, "trials": {"per_cell": 1}}
        made = loading.convert(plain | {"workload": [{"name": name} for name in names]} | more)
        return environment_of(made)

    torch, keras = "ckptflip.training.pytorch,torch._dynamo", "ckptflip.training.keras"
    assert told("digits-cnn", "digits-mlp") == {WARM: torch}
    assert told("digits-cnn", "digits-cnn-keras") == {WARM: f"{torch},{keras}"}
    assert told("campaign_toy:make") == {}
    found = told("digits-mlp-keras", keras_backend="jax")
    assert found == {"KERAS_BACKEND": "jax", WARM: keras}
    for module in (torch, keras):
        for name in module.split(","):
            assert find_spec(name) is not None


def test_a_clean_run_keeps_what_is_asked_for(tmp_path: Path) -> None:
    run = clean(tmp_path)
    assert (run.state, run.exact, run.epochs) == ("done", True, tuple(range(UNTIL + 1)))
    there = sorted(path.name for path in (tmp_path / "seed_4").glob("*.h5"))
    assert there == ["epoch_003.h5", "epoch_004.h5", "epoch_009.h5"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("name", ["epoch_003.h5", "epoch_009.h5"])
def test_a_checkpoint_that_changed_is_trained_again(tmp_path: Path, name: str, damage: str) -> None:
    run = clean(tmp_path)
    path = tmp_path / "seed_4" / name
    before = path.read_bytes()
    if damage == "flip":
        ckptflip.inject(path, in_place=True, bits="mantissa", count=3, seed=1)
    else:
        path.write_bytes(before[:1000] if damage == "cut" else b"")
    again = clean(tmp_path)
    assert (again.values, again.digests) == (run.values, run.digests)
    assert path.read_bytes() == before


def test_another_code_of_a_workload_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import campaign_toy

    assert clean(tmp_path).state == "done"
    data = campaign_toy._data()
    monkeypatch.setattr(campaign_toy, "_data", lambda: (data[0] * 2, data[1]))
    worker._kept.clear()
    again = clean(tmp_path)
    assert again.state == "crashed" and "a resume no longer repeats the run" in again.message
    worker._kept.clear()


def test_a_save_that_was_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    clean(tmp_path)
    (tmp_path / "seed_4" / "draft.h5").write_bytes(b"half")
    (tmp_path / "seed_4" / "epoch_009.h5").unlink()
    assert clean(tmp_path).exact is True


@pytest.mark.parametrize("missing", ["epoch_003.h5", "epoch_004.h5", "epoch_009.h5", "clean.msgpack"])
def test_a_clean_run_is_completed_to_the_same_bits(tmp_path: Path, missing: str) -> None:
    run = clean(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "seed_4").glob("*.h5")}
    (tmp_path / "seed_4" / missing).unlink()
    again = clean(tmp_path)
    assert (again.epochs, again.values, again.digests) == (run.epochs, run.values, run.digests)
    assert {path.name: path.read_bytes() for path in (tmp_path / "seed_4").glob("*.h5")} == before


def test_a_clean_run_can_go_on_and_keep_more(tmp_path: Path) -> None:
    short, straight = clean(tmp_path / "a"), clean(tmp_path / "b", until=14, keep=(1, EPOCH, 14))
    longer = clean(tmp_path / "a", until=14, keep=(1, EPOCH, 14))
    assert (longer.values, longer.digests) == (straight.values, straight.digests)
    assert longer.digests[: len(short.digests)] == short.digests
    assert (tmp_path / "a" / "seed_4" / "epoch_001.h5").exists()


def test_a_trial_is_inject_and_resume(tmp_path: Path) -> None:
    from campaign_toy import make

    run = clean(tmp_path)
    policy = Policy(tensors=("first/weight",), bits="mantissa", count=20)
    made = trial(tmp_path, run, policy, 77)
    record = ckptflip.inject(
        tmp_path / "seed_4" / "epoch_003.h5", out=tmp_path / "x.h5", policy=policy, seed=77
    )
    workload = make()
    workload.load(tmp_path / "x.h5")
    expected = [workload.evaluate()["accuracy"]]
    while workload.epoch < UNTIL:
        workload.train_epoch()
        expected.append(workload.evaluate()["accuracy"])
    assert list(made.values["accuracy"]) == expected
    assert (made.digest, made.ended, made.epochs) == (
        workload.digest(),
        "horizon",
        tuple(range(EPOCH, UNTIL + 1)),
    )
    assert made.counts == record.header.counts and made.flips is not None
    assert made.flips.after == record.plan.after.astype("<u8").tobytes()


def test_a_restart_without_change_repeats_the_clean_run(tmp_path: Path) -> None:
    run = clean(tmp_path)
    made = trial(tmp_path, run, None, 0, identical=False)
    assert made.digest == run.digests[-1]
    assert made.values["loss"] == run.values["loss"][EPOCH:]
    assert made.counts is None and made.flips is None


@pytest.mark.parametrize("seed", range(6))
def test_the_collapsed_shortcut_gives_the_outcome_of_the_full_run(tmp_path: Path, seed: int) -> None:
    run = clean(tmp_path)
    policy = Policy(tensors=("first/weight", "last/weight"), bits="critical", count=1 + seed)
    short, full = (trial(tmp_path, run, policy, seed, collapsed=wanted) for wanted in (True, False))
    values = dict(zip(run.epochs, run.values["accuracy"], strict=True))
    outcomes = [
        judge(r.epochs, r.values, values, Metric(), identical=False, until=UNTIL).outcome
        for r in (short, full)
    ]
    assert outcomes[0] == outcomes[1]
    count = len(short.epochs)
    assert repr({n: full.values[n][:count] for n in short.values}) == repr(dict(short.values))
    assert (short.ended == "collapsed") == (outcomes[0] == "collapsed") or short.ended == "horizon"
    assert full.ended == "horizon"


def test_some_of_them_collapse_early(tmp_path: Path) -> None:
    run = clean(tmp_path)
    policy = Policy(tensors=("first/weight", "last/weight"), bits="critical", count=8)
    made = [trial(tmp_path, run, policy, seed) for seed in range(5)]
    assert any(each.ended == "collapsed" and each.epochs[-1] < UNTIL for each in made)


@pytest.mark.parametrize("seed", range(4))
def test_the_identical_shortcut_gives_the_values_of_the_full_run(tmp_path: Path, seed: int) -> None:
    options = {"renewed": EPOCH + 1}
    run = clean(tmp_path, **options)
    policy = Policy(tensors=("unused/weight",), bits="mantissa", count=3)
    short, full = (
        trial(tmp_path, run, policy, seed, identical=wanted, options=options) for wanted in (True, False)
    )
    assert (short.ended, short.epochs[-1]) == ("identical", EPOCH + 2)
    assert full.ended == "horizon" and full.digest == run.digests[-1]
    assert full.values["loss"][3:] == run.values["loss"][EPOCH + 3 :]


def test_propagation_is_measured_where_it_is_asked(tmp_path: Path) -> None:
    run = clean(tmp_path)
    place = str(tmp_path / "seed_4" / run.checkpoints[EPOCH + 1])
    policy = Policy(tensors=("first/weight",), bits="exponent,!critical", count=1)
    made = trial(tmp_path, run, policy, 1, propagation={EPOCH + 1: place})
    assert [spread.epoch for spread in made.spread] == [EPOCH + 1]
    changed = {layer["layer"]: layer["changed"] for layer in made.spread[0].layers}
    assert changed["first"] > 0 and changed["unused"] == 0


def test_an_identical_trial_has_spread_nowhere(tmp_path: Path) -> None:
    options = {"renewed": EPOCH + 1}
    run = clean(tmp_path, **options)
    last = str(tmp_path / "seed_4" / run.checkpoints[UNTIL])
    policy = Policy(tensors=("unused/weight",), bits="mantissa", count=3)
    short, full = (
        trial(tmp_path, run, policy, 0, identical=wanted, options=options, propagation={UNTIL: last})
        for wanted in (True, False)
    )
    assert short.ended == "identical" and short.spread == full.spread
    assert [layer["changed"] for layer in short.spread[0].layers] == [0, 0, 0]


def test_what_killed_trials_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys
    import tempfile

    from ckptflip.campaign import trial as trials

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = tmp_path / f"{trials._PREFIX}{ended.pid}-abc"
    other = tmp_path / f"ckptflip-trial-elsewhere.example-{ended.pid}-abc"
    alive = tmp_path / f"{trials._PREFIX}{os.getpid()}-abc"
    for folder in (dead, other, alive):
        folder.mkdir()
    trials._sweep.__wrapped__()
    assert [folder.exists() for folder in (dead, other, alive)] == [False, True, True]


def test_too_many_flips_are_counted_alone(tmp_path: Path) -> None:
    made = trial(tmp_path, clean(tmp_path), Policy(count=30), 0, most_flips=10)
    assert made.flips is None and made.counts is not None and made.counts.bits_hit == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fail_clean": 2}, "training epoch 2 failed: ValueError: the recipe gives up"), ({"x": 1}, "")],
)
def test_a_recipe_that_raises_is_a_state(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made = clean(tmp_path, **options)
    assert (made.state == "crashed") == bool(message) and message in made.message


def test_a_workload_that_cannot_be_found_is_a_state(tmp_path: Path) -> None:
    for name, message in (("campaign_toy:broken", "no such data"), ("no_such_module:x", "no such module")):
        spec = WorkloadSpec(name=name)
        made = perform(CleanTask(workload=spec, seed=0, until=2, keep=(1,), folder=str(tmp_path)))
        assert made.state == "crashed" and message in made.message


def test_memory_that_was_refused_is_its_own_state() -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate …")
    outer = ckptflip.errors.WorkloadError("training epoch 3 failed")
    outer.__cause__ = error
    assert worker._is_memory(outer) and not worker._is_memory(ValueError("x"))


def test_an_altered_counter_is_no_trial(tmp_path: Path) -> None:
    """A checkpoint that says another epoch would be compared with the wrong rows."""
    torch_run = WorkloadSpec(name="digits-mlp")
    pytest.importorskip("torch")
    folder = tmp_path / "seed_0"
    run = perform(CleanTask(workload=torch_run, seed=0, until=2, keep=(1, 2), folder=str(folder)))
    made = perform(TrialTask(
        workload=torch_run, checkpoint=str(folder / run.checkpoints[1]), epoch=2, until=3, policy=None, seed=0
    ))  # fmt: skip
    assert made.state == "crashed" and "should be of epoch 2" in made.message


def test_values_keep_nan_and_what_was_not_measured() -> None:
    result = TrialResult(values={"loss": (math.nan, None, math.inf)})
    again = tasks.decode_result(tasks.encode(result))
    assert repr(again.values["loss"]) == "(nan, None, inf)"


@pytest.mark.parametrize(
    "why",
    [
        OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device', "
                "buf = 0x5581, total write size = 4096)"),
        OSError(28, "No space left on device"),
        RuntimeError("Unable to synchronously close file (No space left on device)"),
    ],
)  # fmt: skip
def test_a_full_disk_is_told_in_words(tmp_path: Path, why: Exception) -> None:
    class Full:
        def save(self, path: Path) -> None:
            path.write_bytes(b"half")
            raise why

    with pytest.raises(CampaignError) as told:
        clean_runs._saved(Full(), tmp_path / "epoch_001.h5")  # type: ignore[arg-type]
    assert str(told.value) == (
        f"{tmp_path / 'epoch_001.h5'} cannot be written: No space left on device. Free space there, and run "
        "the same command again"
    )
    assert not list(tmp_path.iterdir())
