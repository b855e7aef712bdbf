"""What every executor keeps to, on this machine, on a real Ray cluster and on a real Slurm."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_places import PLACES, Open, await_true, collect, job, lives, place

from ckptflip.errors import CampaignError

MEMORY = 400_000_000


@pytest.fixture(scope="module", params=PLACES)
def opening(request: pytest.FixtureRequest) -> Iterator[Open]:
    with place(request.param) as found:
        yield found


def test_every_job_is_reported_once_in_whatever_order(opening: Open) -> None:
    executor = opening(options={"per_job": 3} if opening.name == "slurm" else {})
    assert executor.wait() == []
    texts = [f"sleep {0.05 * (i % 3):.2f} {i}" for i in range(12)]
    executor.submit([job(text) for text in texts[:5]])
    executor.submit([job(text) for text in texts[5:]])
    reports = collect(executor, len(texts))
    assert [reports[text].answer for text in texts] == [b"%d" % i for i in range(12)]
    assert all(report.loss is None and report.pid and report.host for report in reports.values())
    assert executor.wait() == []


def test_what_kills_a_job_fails_that_job_alone(opening: Open) -> None:
    executor = opening(options={"per_job": 7} if opening.name == "slurm" else {})
    deadly = {
        "raise it went wrong": ("crashed", None, "ValueError: it went wrong"),
        "leave 0": ("crashed", None, "SystemExit"),
        "exit 0": ("crashed", None, "exited with code 0"),
        "exit 3": ("crashed", None, "exited with code 3"),
        "crash": ("crashed", signal.SIGSEGV, "about to crash"),
        "hang": ("hung", None, "no answer within 1 s"),
        "hang-deaf": ("hung", None, "no answer within 1 s"),
        "eat": ("out-of-memory", None, "400,000,000 bytes"),
        "memory-error": ("out-of-memory", None, "too much to ask"),
        "number": ("crashed", None, "returned a int"),
    }
    jobs = [job(text, seconds=1 if "hang" in text else 60, memory=MEMORY) for text in deadly]
    well = [job(f"echo {i}", memory=MEMORY) for i in range(10)]
    executor.submit([one for pair in zip(jobs, well, strict=True) for one in pair])
    reports = collect(executor, 20)
    for text, (state, number, words) in deadly.items():
        loss = reports[text].loss
        assert loss is not None and reports[text].answer is None
        assert (loss.state, loss.signal) == (state, number), (text, loss)
        assert words in loss.message
    assert [reports[f"echo {i}"].answer for i in range(10)] == [b"%d" % i for i in range(10)]


def test_a_worker_that_is_killed_loses_its_job_and_the_job_can_come_again(
    opening: Open, tmp_path: Path
) -> None:
    executor = opening()
    victim = job(f"once {tmp_path / 'pid'} second time")
    executor.submit([victim, job("echo beside")])
    await_true(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 60)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    reports = collect(executor, 2)
    loss = reports[victim.key].loss
    assert loss is not None and (loss.state, loss.signal) == ("crashed", signal.SIGKILL)
    assert reports["echo beside"].answer == b"beside"
    executor.submit([victim])
    assert collect(executor, 1)[victim.key].answer == b"second time"


def test_cancelling_leaves_no_process(opening: Open, tmp_path: Path) -> None:
    executor = opening()
    notes = [tmp_path / f"note-{i}" for i in range(2)]
    executor.submit([job(f"note {path} 600") for path in notes])
    await_true(lambda: all(path.exists() and path.read_text() for path in notes), 60)
    pids = [int(path.read_text().split()[1]) for path in notes]
    assert all(map(lives, pids))
    executor.close(cancel=True)
    await_true(lambda: not any(map(lives, pids)))
    assert executor.wait() == []
    with pytest.raises(CampaignError, match="closed"):
        executor.submit([job("echo late")])


def test_closing_lets_jobs_end_and_their_reports_be_fetched(opening: Open) -> None:
    executor = opening()
    executor.submit([job(f"sleep 0.3 {i}") for i in range(3)])
    executor.close()
    assert sorted(report.answer or b"" for report in executor.wait()) == [b"0", b"1", b"2"]


def test_variables_are_set_and_frameworks_have_one_thread(opening: Open) -> None:
    executor = opening(environment={"KERAS_BACKEND": "jax", "MKL_NUM_THREADS": "2"})
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "KERAS_BACKEND"]
    before = {name: os.environ.get(name) for name in names}
    executor.submit([job(f"variable {name}") for name in names])
    reports = collect(executor, 3)
    assert [reports[f"variable {name}"].answer for name in names] == [b"1", b"2", b"jax"]
    assert {name: os.environ.get(name) for name in names} == before


def test_a_call_that_cannot_be_imported_is_told_by_each_job(opening: Open) -> None:
    executor = opening(call="no_such_module:perform")
    executor.submit([job("echo 1"), job("echo 2")])
    for report in collect(executor, 2).values():
        assert report.loss is not None
        assert report.loss.state == "crashed" and "No module named 'no_such_module'" in report.loss.message
