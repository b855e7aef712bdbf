"""What is Slurm's own: drivers that were killed, jobs that are requeued or cancelled, batches, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_places import CALL, SLURM, Open, await_true, collect, job, lives, place

from ckptflip.campaign.executors import Executor, slurm_queue, start
from ckptflip.campaign.executors.slurm import SlurmJobs
from ckptflip.campaign.executors.spool import Spool
from ckptflip.campaign.executors.worker_process import Setting
from ckptflip.errors import CampaignError, UsageError

DRIVER = """
import sys
from pathlib import Path
from ckptflip.campaign.executors import Job, Limits, start

executor = start("slurm", workers=4, call="executor_calls:perform", folder=Path(sys.argv[1]),
                 options={"poll": 0.5, "grace": 1, "time": 10})
executor.submit([Job(text, text.encode(), Limits(seconds=60)) for text in sys.argv[2:]])
print("sent", flush=True)
while True:
    executor.wait(0.2)
"""


@pytest.fixture(scope="module")
def opening() -> Iterator[Open]:
    with place("slurm") as found:
        yield found


def killed_driver(tmp_path: Path, folder: Path, *texts: str) -> subprocess.Popen[str]:
    """A driver that has sent jobs; it waits to be killed."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    here = str(Path(__file__).parent)
    driver = subprocess.Popen(
        [sys.executable, script, folder, *texts],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((here, os.environ["PYTHONPATH"]))},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None and driver.stdout.readline() == "sent\n"
    return driver


def moments(note: Path) -> list[str]:
    return [line.split()[0] for line in note.read_text().splitlines()]


def own_states(executor: Executor) -> dict[str, str]:
    assert isinstance(executor, SlurmJobs)
    return slurm_queue.states(executor.name) or {}


def test_the_start_script_uses_what_runs_already(opening: Open) -> None:
    folder = Path(os.environ["SLURM_CONF"]).parent
    again = subprocess.run([SLURM / "start", folder], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == os.environ["SLURM_CONF"]


def test_a_new_driver_adopts_what_runs_and_finds_what_is_finished(opening: Open, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    notes = [tmp_path / "quick", tmp_path / "slow", tmp_path / "queued"]
    texts = [f"note {notes[0]} 0", f"note {notes[1]} 4", f"note {notes[2]} 0"]
    driver = killed_driver(tmp_path, folder, *texts)
    await_true(lambda: notes[0].exists() and moments(notes[0]) == ["begin", "end"], 60)
    await_true(lambda: notes[1].exists(), 60)
    driver.kill()
    driver.communicate()
    # The first was handed out, and is stored, for its driver waited again; the new one gets the others.
    executor = opening(workers=4, folder=folder)
    executor.submit([job(text) for text in texts[1:]])
    reports = collect(executor, 2)
    assert {report.answer for report in reports.values()} == {b"noted"}
    assert [moments(note) for note in notes] == [["begin", "end"]] * 3


def test_a_report_that_no_driver_has_fetched_is_found(opening: Open, tmp_path: Path) -> None:
    executor = opening(folder=tmp_path / "spool")
    note = tmp_path / "note"
    executor.submit([job(f"note {note} 0")])
    await_true(lambda: any((tmp_path / "spool" / "reports").iterdir()), 60)
    # As if its driver had been killed here: another takes the folder.
    after = opening(folder=tmp_path / "spool")
    after.submit([job(f"note {note} 0")])
    assert collect(after, 1)[f"note {note} 0"].answer == b"noted"
    assert moments(note) == ["begin", "end"]
    # What was handed out and stored is run again when it is submitted again.
    after.submit([job(f"note {note} 0")])
    collect(after, 1)
    assert moments(note) == ["begin", "end"] * 2


def test_a_payload_that_changed_is_never_taken_for_the_old_one(opening: Open, tmp_path: Path) -> None:
    before = opening(folder=tmp_path / "spool")
    note = tmp_path / "note"
    before.submit([job(f"note {note} 600", "key")])
    await_true(lambda: note.exists() and note.read_text(), 60)
    worker = int(note.read_text().split()[1])
    after = opening(folder=tmp_path / "spool")
    after.submit([job("echo new", "key")])
    assert not lives(worker)
    assert collect(after, 1)["key"].answer == b"new"


def test_jobs_of_an_executor_set_up_otherwise_are_cancelled(opening: Open, tmp_path: Path) -> None:
    before = opening(folder=tmp_path / "spool")
    note = tmp_path / "note"
    before.submit([job(f"note {note} 600")])
    await_true(lambda: note.exists() and note.read_text(), 60)
    worker = int(note.read_text().split()[1])
    after = opening(folder=tmp_path / "spool", environment={"KERAS_BACKEND": "torch"})
    await_true(lambda: not lives(worker))
    assert set(own_states(after).values()) <= slurm_queue.ENDED


def test_a_cancelled_job_is_reported_with_slurms_word(opening: Open, tmp_path: Path) -> None:
    executor = opening()
    note = tmp_path / "note"
    executor.submit([job(f"note {note} 600")])
    await_true(lambda: note.exists(), 60)
    slurm_queue.cancel(list(own_states(executor)))
    loss = collect(executor, 1)[f"note {note} 600"].loss
    assert loss is not None and loss.state == "crashed" and "ended as CANCELLED" in loss.message


def test_a_requeued_batch_goes_on_with_what_has_no_report(opening: Open, tmp_path: Path) -> None:
    executor = opening(options={"per_job": 2})
    done, once = tmp_path / "done", tmp_path / "once"
    executor.submit([job(f"note {done} 0"), job(f"once {once} second")])
    await_true(lambda: once.exists() and once.read_text(), 60)
    (batch,) = own_states(executor)
    subprocess.run(["scontrol", "requeue", batch], check=True)
    await_true(lambda: own_states(executor)[batch] == "PENDING")
    # Slurm lets two minutes pass; the node refuses a job in the second in which it was requeued.
    subprocess.run(
        ["scontrol", "update", f"JobId={batch}", "StartTime=now+3"], check=True, capture_output=True
    )
    reports = collect(executor, 2)
    assert reports[f"once {once} second"].answer == b"second"
    assert reports[f"note {done} 0"].answer == b"noted" and moments(done) == ["begin", "end"]


def test_a_batch_that_dies_takes_only_what_had_begun(opening: Open, tmp_path: Path) -> None:
    executor = opening(workers=1, options={"per_job": 3})
    note = tmp_path / "note"
    executor.submit([job("echo before"), job(f"note {note} 600"), job("echo after")])
    await_true(lambda: note.exists() and note.read_text(), 60)
    submitit = int(note.read_text().split()[2])
    os.kill(submitit, signal.SIGKILL)
    reports = collect(executor, 3)
    assert [reports[f"echo {when}"].answer for when in ("before", "after")] == [b"before", b"after"]
    loss = reports[f"note {note} 600"].loss
    assert loss is not None and loss.state == "crashed" and "ended as FAILED" in loss.message


def test_batches_run_as_many_at_once_as_they_have_cores(opening: Open, tmp_path: Path) -> None:
    executor = opening(workers=1, options={"per_job": 2, "cpus": 2})
    assert executor.slots == 2
    notes = [tmp_path / "one", tmp_path / "two"]
    executor.submit([job(f"note {note} 1.5") for note in notes])
    await_true(lambda: all(note.exists() for note in notes), 60)
    assert [moments(note) for note in notes] == [["begin"], ["begin"]]
    collect(executor, 2)


def test_a_refusal_of_sbatch_is_told(opening: Open) -> None:
    executor = opening(options={"partition": "no-such-partition"})
    with pytest.raises(CampaignError, match=r"sbatch refused the jobs: .*[Ii]nvalid partition"):
        executor.submit([job("echo a")])


def test_options_are_checked(opening: Open, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'partition'"):
        start("slurm", workers=1, folder=tmp_path, call=CALL, options={"partiton": "gpu"})
    with pytest.raises(UsageError, match="per_job is 0"):
        start("slurm", workers=1, folder=tmp_path, call=CALL, options={"per_job": 0})


def test_a_machine_without_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CampaignError, match=r"sbatch is not on this machine"):
        start("slurm", workers=1, folder=tmp_path / "spool", call=CALL)


@pytest.mark.parametrize(
    ("state", "told"),
    [("TIMEOUT", "hung"), ("OUT_OF_MEMORY", "out-of-memory"), ("NODE_FAIL", "crashed"), ("GONE", "crashed")],
)
def test_slurms_states_are_told_in_ours(state: str, told: str) -> None:
    assert slurm_queue.loss("7_1", state).state == told


def test_a_spool_keeps_one_submission_per_key(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.put_job(job("echo a", "key"))
    spool.begin(first)
    second = spool.put_job(job("echo b", "key"))
    assert spool.job(first) is None and not spool.begun(first)
    assert Spool(tmp_path).name("key") == second
    assert spool.job(second) == job("echo b", "key")
    assert spool.put_setting(Setting("a:b", "")) is False
    assert spool.put_setting(Setting("a:b", "", {}, ["another path"])) is False
    assert spool.put_setting(Setting("a:c", "")) is True
