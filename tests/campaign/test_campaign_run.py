"""Whole campaigns through the command line: the same values whatever is killed and whoever runs it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from executor_places import place

from ckptflip.campaign.store import reading

HERE = Path(__file__).parent
# A shell makes what it starts in the background, these tests say, ignore interrupts.
HEEDING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from ckptflip.cli.main import main
main()
"""
SPEC = """
name = "toy"
seed = 11
[[workload]]
name = "campaign_toy:make"
label = "toy"
options = { OPTIONS }
[clean]
seeds = [0, 1]
[restart]
epochs = [3, 4]
until = 8
[[policy]]
tensors = "TENSORS"
sweep = { bits = ["all", "critical"], count = [1, 5] }
[trials]
TRIALS
[measure]
propagation = [1]
[executor]
EXECUTOR
"""


def written(folder: Path, *, options: str = "", tensors: str = "*", trials: str = "per_cell = 4",
            executor: str = "workers = 2") -> Path:  # fmt: skip
    path = folder / "spec.toml"
    text = SPEC.replace("OPTIONS", options).replace("TENSORS", tensors).replace("TRIALS", trials)
    path.write_text(text.replace("EXECUTOR", executor))
    return path


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "ckptflip", *map(str, arguments)]


def ckptflip(*arguments: Any, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=HERE, capture_output=True, text=True, timeout=timeout, check=False,
        env=_environment(),
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])}


def run(spec: Path, store: Path, *more: Any, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = ckptflip("run", spec, "--store", store, *more)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def values(store: Path) -> dict[str, Any]:
    with reading(store) as reader:
        return reader.values()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(written(folder, options="slow = 0.06"), folder / "runs.db")
    return values(folder / "runs.db")


def test_a_campaign_runs_and_a_second_call_finds_it_complete(tmp_path: Path) -> None:
    spec = written(tmp_path)
    first = run(spec, tmp_path / "runs.db")
    assert "34 trials in" in first.stderr and "a resume repeats it bit for bit" in first.stderr
    before = values(tmp_path / "runs.db")
    assert "0 trials in" in run(spec, tmp_path / "runs.db").stderr
    assert values(tmp_path / "runs.db") == before
    with reading(tmp_path / "runs.db") as reader:
        trials = reader.trials()
        outcomes = set(trials.outcome)
        controls = {c.id for c in reader.cells() if c.policy is None}
        assert {o for o, c in zip(trials.outcome, trials.cell, strict=True) if c in controls} == {"identical"}
        measured = [e >= c + 1 for e, c in zip(trials.ended_epoch, _epochs(reader, trials), strict=True)]
        assert len(reader.propagation()) == 3 * sum(measured) > 0
    assert {"collapsed", "identical"} <= outcomes


def _epochs(reader: Any, trials: Any) -> list[int]:
    by_id = {cell.id: cell.epoch for cell in reader.cells()}
    return [by_id[cell] for cell in trials.cell.tolist()]


@pytest.mark.parametrize("more", [["--workers", "1"], ["--workers", "3"]])
def test_the_number_of_workers_changes_no_value(tmp_path: Path, undisturbed: Any, more: list[str]) -> None:
    run(written(tmp_path, options="slow = 0.06"), tmp_path / "runs.db", *more)
    assert values(tmp_path / "runs.db") == undisturbed


def test_killed_ten_times_it_ends_with_the_same_values(tmp_path: Path) -> None:
    spec, store = written(tmp_path, options="slow = 0.06", trials="per_cell = 9"), tmp_path / "runs.db"
    run(spec, tmp_path / "undisturbed.db")
    counts, environment = [0], _environment()
    for kill in range(10):
        process = subprocess.Popen(
            command("run", spec, "--store", store, "-q"), cwd=HERE, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Once amid the clean runs, then each time that a few more trials are there.
        deadline = time.monotonic() + (1.0 if kill == 0 else 60.0)
        while process.poll() is None and time.monotonic() < deadline and _finished(store) < counts[-1] + 2:
            time.sleep(0.02)
        if kill % 3 == 2:
            _kill_a_worker(process.pid)
            time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(_finished(store))
    run(spec, store)
    assert counts == sorted(counts)  # nothing was lost on the way
    assert values(store) == values(tmp_path / "undisturbed.db")
    with reading(store) as reader:
        done = [a.task for a in reader.attempts() if a.state == "done" and a.task.startswith("trial/")]
    assert len(done) == len(set(done))  # and nothing was done twice


def _finished(store: Path) -> int:
    if not store.exists():
        return 0
    with reading(store) as reader:
        return len(reader.trials().id)


def _kill_a_worker(driver: int) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == driver:
            os.kill(int(stat.parent.name), signal.SIGKILL)
            return


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("ray", "{}"), ("slurm", "{ poll = 0.5, grace = 1, time = 10, per_job = 4 }")]
)
def test_every_executor_gives_the_same_values(
    tmp_path: Path, undisturbed: Any, name: str, options: str
) -> None:
    executor = f'name = "{name}"\nworkers = 2\noptions = {options}'
    spec = written(tmp_path, options="slow = 0.06", executor=executor)
    with place(name):
        run(spec, tmp_path / "runs.db")
    assert values(tmp_path / "runs.db") == undisturbed
    with reading(tmp_path / "runs.db") as reader:
        assert {attempt.executor for attempt in reader.attempts()} == {name}


@pytest.mark.slow
def test_a_slurm_driver_that_is_killed_takes_up_its_jobs(tmp_path: Path, undisturbed: Any) -> None:
    executor = 'name = "slurm"\nworkers = 2\noptions = { poll = 0.5, grace = 1, time = 10, per_job = 4 }'
    spec, store = written(tmp_path, options="slow = 0.06", executor=executor), tmp_path / "runs.db"
    with place("slurm"):
        for trials in (1, 12):
            process = subprocess.Popen(
                command("run", spec, "--store", store, "-q"), cwd=HERE, env=_environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while process.poll() is None and _finished(store) < trials and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert _finished(store) < 34
        run(spec, store)
    assert values(store) == undisturbed
    with reading(store) as reader:
        done = [a.task for a in reader.attempts() if a.state == "done" and a.task.startswith("trial/")]
    assert len(done) == len(set(done)) == 34


def test_shards_unite_to_the_whole(tmp_path: Path, undisturbed: Any) -> None:
    spec = written(tmp_path, options="slow = 0.06")
    parts = [tmp_path / f"part{i}.db" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        run(spec, part, "--shard", f"{i}/3")
    told = run(spec, parts[0], "--shard", "1/3").stderr
    assert f"10 cells; shard 1/3 complete. Next: ckptflip merge {parts[0]} and the stores" in told
    assert ", shard 1/3 complete, not running" in ckptflip("status", parts[0]).stderr
    sizes = [len(values(part)["trials"]) for part in parts]
    assert sum(sizes) == 34 and min(sizes) > 8
    done = ckptflip("merge", *parts, "-o", tmp_path / "all.db")
    assert done.returncode == 0, done.stderr
    # The united store is complete, and says so: nothing is left to run.
    assert values(tmp_path / "all.db") == undisturbed
    assert "34 of 34 trials" in ckptflip("status", tmp_path / "all.db").stderr
    assert "0 trials in" in run(spec, tmp_path / "all.db").stderr


def test_shards_in_one_store_make_the_whole(tmp_path: Path, undisturbed: Any) -> None:
    spec, store = written(tmp_path, options="slow = 0.06"), tmp_path / "runs.db"
    run(spec, store, "--shard", "1/2")
    assert f"Next: ckptflip report {store}" in run(spec, store, "--shard", "2/2").stderr
    assert values(store) == undisturbed


def test_a_shard_takes_no_stop_rule(tmp_path: Path) -> None:
    spec = written(tmp_path, trials="stop = { half_width = 0.2 }")
    assert "a stop rule" in run(spec, tmp_path / "x.db", "--shard", "1/2", expect=2).stderr


@pytest.mark.parametrize("shard", ["0/1", "3/2", "a", "1/0"])
def test_a_dry_run_refuses_what_is_no_shard(tmp_path: Path, shard: str) -> None:
    done = ckptflip("run", written(tmp_path), "--shard", shard, "--dry-run")
    assert done.returncode == 2 and f"shard {shard!r}: write 2/4" in done.stderr


def test_an_edited_spec_is_noticed(tmp_path: Path) -> None:
    spec, store = written(tmp_path, trials="per_cell = 2"), tmp_path / "runs.db"
    run(spec, store)
    before = values(store)["trials"]
    written(tmp_path, trials="per_cell = 3")
    refused = run(spec, store, expect=2)
    assert "differs in: trials" in refused.stderr and "--extend" in refused.stderr
    run(spec, store, "--extend")
    after = values(store)["trials"]
    assert set(before) < set(after) and len(after) == len(before) + 8
    written(tmp_path, trials="per_cell = 2")
    said = run(spec, store, "--extend", expect=2).stderr
    assert "has 3 trials of" in said and "the spec wants 2: --extend adds trials and takes none away" in said
    spec.write_text(spec.read_text().replace("seed = 11", "seed = 12"))
    assert "differs in: seed" in run(spec, store, "--extend", expect=2).stderr


def test_a_stricter_rule_opens_stopped_cells(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    sizes = []
    for trials in (
        "stop = { half_width = 0.3, batch = 5 }",
        "stop = { half_width = 0.2, batch = 5 }",
        "per_cell = 30",
    ):
        spec = written(tmp_path, trials=trials, tensors="!unused*")
        run(spec, store, "--extend")
        sizes.append(len(values(store)["trials"]))
        run(spec, tmp_path / f"{len(sizes)}.db")
    assert sizes[0] < sizes[1] < sizes[2]
    # What was added is what a fresh store has; cells that the rule took further keep what they have.
    assert set(values(tmp_path / "3.db")["trials"]) < set(values(store)["trials"])


def test_a_label_stays(tmp_path: Path) -> None:
    spec, store = written(tmp_path, trials="per_cell = 1"), tmp_path / "runs.db"
    run(spec, store)
    spec.write_text(spec.read_text().replace('label = "toy"', 'label = "other"'))
    assert "is called 'toy' in" in run(spec, store, "--extend", expect=2).stderr


def test_failed_trials_of_a_removed_policy_are_no_longer_counted(tmp_path: Path) -> None:
    spec, store = written(tmp_path, options="raise = true", tensors="unused*"), tmp_path / "runs.db"
    text = spec.read_text().replace('["all", "critical"], count = [1, 5]', '["sign", "mantissa"]')
    spec.write_text(text)
    run(spec, store, expect=4)
    spec.write_text(text.replace('["sign", "mantissa"]', '["mantissa"]'))
    run(spec, store, "--extend")


def test_a_trial_without_the_metric_fails_alone(tmp_path: Path) -> None:
    spec = written(tmp_path, options="mute = true", tensors="unused*", trials="per_cell = 1")
    text = spec.read_text().replace('["all", "critical"], count = [1, 5]', '["sign", "mantissa"]')
    spec.write_text(text.replace("epochs = [3, 4]", "epochs = [3]"))
    assert "1 of 3 trials failed" in run(spec, tmp_path / "runs.db", expect=4).stderr
    with reading(tmp_path / "runs.db") as reader:
        assert {m for m in reader.trials().message if m} == {
            "the altered workload gave no 'accuracy' at some epoch"
        }


def test_stop_rules_end_cells_alike_with_any_workers(tmp_path: Path) -> None:
    trials = "stop = { half_width = 0.25, at_least = 5, batch = 5, at_most = 60 }"
    spec = written(tmp_path, trials=trials, tensors="!unused*")
    for workers in (1, 3):
        run(spec, tmp_path / f"{workers}.db", "--workers", workers)
    assert values(tmp_path / "1.db") == values(tmp_path / "3.db")
    with reading(tmp_path / "1.db") as reader:
        reasons = {cell.stopped for cell in reader.cells() if cell.policy is not None}
    assert reasons == {"precise enough"}


def test_strata_give_the_same_with_any_workers_and_after_a_restart(tmp_path: Path) -> None:
    spec = written(tmp_path, trials='per_cell = 60\nstrata = ["layer", "field"]', tensors="!unused*")
    text = spec.read_text().replace('sweep = { bits = ["all", "critical"], count = [1, 5] }', "")
    spec.write_text(text)
    for workers in (1, 3):
        run(spec, tmp_path / f"{workers}.db", "--workers", workers)
    assert values(tmp_path / "1.db") == values(tmp_path / "3.db")
    assert "0 trials in" in run(spec, tmp_path / "1.db").stderr
    with reading(tmp_path / "1.db") as reader:
        strata = reader.strata()
    assert {s.field for s in strata} == {"sign", "critical", "exponent", "mantissa"}


def test_a_horizon_of_nothing_measures_the_altered_checkpoint(tmp_path: Path) -> None:
    spec, store = written(tmp_path, tensors="!unused*"), tmp_path / "runs.db"
    text = spec.read_text().replace("until = 8", "horizon = 0").replace("propagation = [1]", "")
    spec.write_text(text)
    run(spec, store)
    with reading(store) as reader:
        trials, curves = reader.trials(), reader.curves("accuracy")
    assert len(trials.id) == len(curves.value) == 34
    ended = trials.outcome != "collapsed"
    assert (trials.right_after[ended] == trials.final[ended]).all()
    assert set(trials.outcome) <= {"identical", "masked", "degraded", "collapsed"}


@pytest.mark.parametrize(
    ("options", "executor", "state", "signal_number"),
    [
        ('crash = "SIGSEGV"', "workers = 2\nretries = 1", "crashed", 11),
        ("raise = true", "workers = 2", "crashed", None),
        ("hang = true", 'workers = 2\ntime_limit = "3s"', "hung", None),
        ("eat = true", 'workers = 2\nmemory_limit = "400M"', "out-of-memory", None),
    ],
)
def test_a_failing_trial_fails_alone(
    tmp_path: Path, options: str, executor: str, state: str, signal_number: int | None
) -> None:
    spec = written(tmp_path, options=options, tensors="unused*", executor=executor, trials="per_cell = 1")
    text = spec.read_text().replace('["all", "critical"], count = [1, 5]', '["sign", "mantissa"]')
    spec.write_text(text.replace("epochs = [3, 4]", "epochs = [3]"))
    store = tmp_path / "runs.db"
    failed = run(spec, store, expect=4)
    assert "1 of 3 trials failed" in failed.stderr
    with reading(store) as reader:
        trials, attempts = reader.trials(), reader.attempts()
    assert sorted(trials.state) == sorted(["done", "done", state])
    bad = list(trials.state).index(state)
    assert trials.message[bad] and trials.outcome[bad] == ""
    assert trials.signal[bad] == (signal_number or trials.signal[bad])
    tries = [a for a in attempts if a.state == state]
    assert len(tries) == (2 if signal_number else 1)
    # Tried again, it fails again; what is done stays.
    run(spec, store, "--retry", expect=4)
    with reading(store) as reader:
        assert sorted(reader.trials().state) == sorted(trials.state)
        assert len([a for a in reader.attempts() if a.state == state]) == 2 * len(tries)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("per_cell = 4", "per_cel = 4"), 2, "[trials] has no key 'per_cel'; did you mean 'per_cell'?"),
        (('tensors = "*"', 'tensors = "conv*"'), 2, "is impossible: tensors 'conv*' matches nothing"),
        (("count = [1, 5]", "count = [1, 500000]"), 2, "is impossible"),
        (("campaign_toy:make", "campaign_toy:mak"), 1, "has no 'mak'; did you mean 'make'?"),
        (("campaign_toy:make", "campaign_toy:broken"), 1, "no such data"),
        (("options = {  }", "options = { fail_clean = 7 }"), 1, "training epoch 7 failed"),
        (("[executor]", '[metric]\nname = "acuracy"\n[executor]'), 2, "did you mean 'accuracy'?"),
        (("[executor]", "[metric]\nchance = 1.0\n[executor]"), 2, "counts as collapsed"),
        (("workers = 2", 'name = "lokal"'), 2, "there is no executor 'lokal'"),
    ],
)
def test_bad_specs_are_said_and_nothing_is_lost(
    tmp_path: Path, change: tuple[str, str], code: int, message: str
) -> None:
    spec = written(tmp_path)
    assert change[0] in spec.read_text()
    spec.write_text(spec.read_text().replace(*change))
    assert message in run(spec, tmp_path / "runs.db", expect=code).stderr


def test_access_counts_that_are_missing_are_missed_before_the_clean_runs(tmp_path: Path) -> None:
    spec = written(tmp_path)
    text = spec.read_text()
    assert 'tensors = "*"' in text
    spec.write_text(text.replace('tensors = "*"', 'rows = "hot:1%"\nrows_weight = "reads.npz"'))
    said = run(spec, tmp_path / "runs.db", expect=2).stderr
    assert "access counts reads.npz: there is no such file; ckptflip.recsys.tables.write_counts" in said
    assert "clean run" not in said


def test_another_bit_in_a_clean_run_is_noticed(tmp_path: Path) -> None:
    """A store whose clean runs are gone trains them again, and must get the same."""
    spec, store = written(tmp_path), tmp_path / "runs.db"
    run(spec, store)
    shutil.rmtree(tmp_path / "runs.db.clean")
    written(tmp_path, trials="per_cell = 5")
    run(spec, store, "--extend")
    shutil.rmtree(tmp_path / "runs.db.clean")
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("UPDATE run_values SET value = 0.123 WHERE epoch = 2")
    written(tmp_path, trials="per_cell = 6")
    assert "other" in run(spec, store, "--extend", expect=1).stderr


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_says_so_and_goes_on(tmp_path: Path, asked: signal.Signals) -> None:
    spec, store = written(tmp_path, options="slow = 0.2"), tmp_path / "runs.db"
    environment = _environment()
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, "run", str(spec), "--store", str(store)], cwd=HERE, env=environment,
        text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and not _finished(store) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(asked)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "what is finished is kept; the same command goes on" in said
    assert said.endswith("Error: interrupted\n") and "resource_tracker" not in said, said
    run(spec, store)
    assert len(values(store)["trials"]) == 34


def test_a_recipe_beside_its_spec_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "beside_its_spec.py").write_text((HERE / "campaign_toy.py").read_text())
    spec = written(tmp_path, trials="per_cell = 1")
    spec.write_text(spec.read_text().replace("campaign_toy:make", "beside_its_spec:make"))
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        command("run", spec, "--store", tmp_path / "runs.db"), cwd=tmp_path / "elsewhere", check=False,
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "10 trials in" in done.stderr


def test_the_plan_can_be_seen_without_running(tmp_path: Path) -> None:
    done = ckptflip("run", written(tmp_path), "--dry-run")
    assert done.returncode == 0 and "10 cells, 34 trials" in done.stderr
    assert json.loads(ckptflip("run", "--schema").stdout)["title"] == "ckptflip campaign"
    assert ckptflip("run").returncode == 2
