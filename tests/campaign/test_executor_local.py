"""Local workers: they die with their driver, are replaced when they die, and keep off its terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_places import Open, await_true, collect, job, lives, place

from ckptflip.campaign.executors import Job, Limits, names, start
from ckptflip.campaign.executors.local import usable_cores
from ckptflip.campaign.executors.registry import check_options
from ckptflip.campaign.executors.worker_process import WARM, log_path
from ckptflip.errors import CampaignError, UsageError

# A driver without `if __name__ == "__main__"`, that would start workers of its own if a worker imported it.
DRIVER = """
import signal, sys, time
from pathlib import Path
from ckptflip.campaign.executors import Job, start

# A shell makes what it starts in the background, these tests say, ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
executor = start("local", workers=2, call="executor_calls:perform", folder=Path(sys.argv[1]))
executor.submit([Job(str(i), text.encode()) for i, text in enumerate(sys.argv[2:])])
left = len(sys.argv) - 2
try:
    while left:
        for report in executor.wait():
            print(report.answer, flush=True)
            left -= 1
except KeyboardInterrupt:
    executor.close(cancel=True)
    print("interrupted")
"""


@pytest.fixture
def opening() -> Iterator[Open]:
    with place("local") as found:
        yield found


def drive(folder: Path, *texts: str) -> subprocess.Popen[str]:
    script = folder / "driver.py"
    script.write_text(DRIVER)
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    return subprocess.Popen(
        [sys.executable, script, folder / "spool", *texts],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def logs(folder: Path) -> list[int]:
    """Workers that have begun."""
    return [int(log.stem.partition("-")[2]) for log in folder.glob("worker-*.log")]


def pid_in(path: Path) -> int:
    await_true(lambda: path.exists() and path.read_text())
    return int(path.read_text().split()[1])


@pytest.mark.parametrize("deed", ["note", "hang-deaf"])
def test_workers_do_not_outlive_a_driver_that_was_killed(tmp_path: Path, deed: str) -> None:
    note = tmp_path / "note"
    driver = drive(
        tmp_path, *((f"note {note} 600",) if deed == "note" else ("hang-deaf", f"note {note} 600"))
    )
    pid_in(note)
    await_true(lambda: len(logs(tmp_path / "spool")) == 2)
    time.sleep(0.2)
    workers = logs(tmp_path / "spool")
    assert all(map(lives, workers))
    driver.kill()
    driver.communicate()
    await_true(lambda: not any(map(lives, workers)))


def test_an_interrupt_from_the_terminal_is_the_drivers_alone(tmp_path: Path) -> None:
    note = tmp_path / "note"
    driver = drive(tmp_path, f"note {note} 600")
    pid_in(note)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.communicate(timeout=60) == ("interrupted\n", "")


def test_an_interrupt_while_workers_start_prints_nothing_of_theirs(tmp_path: Path) -> None:
    driver = drive(tmp_path, "sleep 5 a")
    await_true(lambda: (tmp_path / "spool").exists())
    os.killpg(driver.pid, signal.SIGINT)
    assert "spawn" not in driver.communicate(timeout=60)[1]


def test_what_workers_print_stays_off_the_terminal_and_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    driver = drive(tmp_path, "noise 100", "echo b")
    out, err = driver.communicate(timeout=60)
    assert sorted(out.split()) == ["b'b'", "b'done'"]
    assert err == ""
    assert any(b"nnnn" in log.read_bytes() for log in (tmp_path / "spool").glob("worker-*.log"))


def test_an_idle_worker_that_dies_is_replaced(opening: Open) -> None:
    executor = opening(workers=1)
    executor.submit([job("pid")])
    first = int((collect(executor, 1)["pid"].answer or b"0").split()[0])
    os.kill(first, signal.SIGKILL)
    executor.submit([job(f"echo {i}") for i in range(3)])
    reports = collect(executor, 3)
    assert {report.answer for report in reports.values()} == {b"0", b"1", b"2"}
    assert first not in {report.pid for report in reports.values()}


def test_workers_killed_at_any_moment_lose_no_job(opening: Open, tmp_path: Path) -> None:
    executor = opening(folder=tmp_path)
    texts = [f"sleep 0.02 {i}" for i in range(60)]
    executor.submit([job(text) for text in texts])
    reports, killed = {}, set()
    until = time.monotonic() + 120
    while len(reports) < len(texts) and time.monotonic() < until:
        reports |= {report.key: report for report in executor.wait(0.15)}
        pids = set(logs(tmp_path)) - killed
        for pid in list(pids)[:1] if len(killed) < 8 else ():
            killed.add(pid)
            if lives(pid):
                os.kill(pid, signal.SIGKILL)
    assert len(reports) == len(texts) and len(killed) == 8
    lost = [report.loss for report in reports.values() if report.loss is not None]
    assert len(lost) <= 8 and {(loss.state, loss.signal) for loss in lost} <= {("crashed", 9)}


def test_workers_that_cannot_even_start_do_not_keep_jobs_for_ever(
    opening: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # An interpreter that ends at once stands for a broken installation.
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: b"/bin/false")
    executor = opening(workers=1)
    executor.submit([job("echo a"), job("echo b")])
    for report in collect(executor, 2).values():
        assert report.loss is not None and "workers die before they take a job" in report.loss.message


def dying_python(folder: Path, times: int) -> tuple[bytes, Path]:
    """An interpreter that is killed at the first so many starts, and where it counts its starts."""
    count, script = folder / "starts", folder / "python"
    script.write_text(
        f"#!/bin/sh\necho >> {count}\n[ $(wc -l < {count}) -gt {times} ] || kill -9 $$\n"
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(0o755)
    return os.fsencode(script), count


def test_a_job_outlives_any_number_of_workers_that_were_killed_before_they_took_it(
    opening: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, count = dying_python(tmp_path, 12)
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: python)
    executor = opening(workers=1)
    executor.submit([job("echo a"), job("echo b")])
    assert {report.answer for report in collect(executor, 2).values()} == {b"a", b"b"}
    assert count.read_text() == "\n" * 13


def test_workers_that_are_killed_at_every_start_do_not_keep_jobs_for_ever(
    opening: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, _ = dying_python(tmp_path, 1000)
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: python)
    executor = opening(workers=1)
    executor.submit([job("echo a"), job("echo b")])
    for report in collect(executor, 2).values():
        assert report.loss is not None and report.loss.signal == signal.SIGKILL
        assert "workers die before they take a job, by SIGKILL" in report.loss.message


def test_workers_are_warm_and_inherit_no_module(opening: Open) -> None:
    import numpy  # noqa: F401  (what the driver has imported)

    executor = opening(workers=1)
    executor.submit([job("modules"), job("pid", "first"), job("pid", "second")])
    reports = collect(executor, 3)
    assert reports["modules"].answer == b""
    assert reports["first"].answer == reports["second"].answer


def test_variables_are_set_before_they_are_read(opening: Open) -> None:
    pytest.importorskip("threadpoolctl")
    executor = opening(workers=1)
    executor.submit([job("threads")])
    assert collect(executor, 1)["threads"].answer == b"1"
    executor = opening(workers=1, environment={"OPENBLAS_NUM_THREADS": "2"})
    executor.submit([job("threads")])
    assert collect(executor, 1)["threads"].answer == b"%d" % min(2, usable_cores())


def test_workers_import_what_is_asked_for_before_their_first_job(opening: Open) -> None:
    executor = opening(workers=1, environment={WARM: "no_such_module,numpy"})
    executor.submit([job("modules")])
    assert collect(executor, 1)["modules"].answer == b"numpy"


def test_a_limit_is_that_of_its_job(opening: Open) -> None:
    executor = opening(workers=1)
    executor.submit(
        [job("sleep 30 a", seconds=0.3), job("sleep 0.6 b", seconds=None), job("sleep 0.1 c", memory=1)]
    )
    reports = collect(executor, 3)
    assert [loss and loss.state for loss in (reports[key].loss for key in ("sleep 30 a", "sleep 0.6 b"))] == [
        "hung",
        None,
    ]
    assert (loss := reports["sleep 0.1 c"].loss) and loss.state == "out-of-memory"
    assert 0.3 <= reports["sleep 30 a"].seconds < 30 and reports["sleep 0.6 b"].seconds >= 0.6


def test_a_log_does_not_grow_without_end(opening: Open, tmp_path: Path) -> None:
    executor = opening(workers=1, folder=tmp_path)
    executor.submit([job("noise 600000", str(i)) for i in range(5)])
    pid = next(iter(collect(executor, 5).values())).pid
    assert 0 < log_path(tmp_path, pid).stat().st_size < 2_000_000


def test_as_many_workers_as_usable_cores(tmp_path: Path) -> None:
    executor = start("local", workers=None, folder=tmp_path, call="executor_calls:perform")
    assert executor.slots == usable_cores() == len(os.sched_getaffinity(0))
    executor.close()


def test_bytes_pass_unchanged(opening: Open) -> None:
    executor = opening(workers=1, call="zlib:compress")
    payload = bytes(range(256)) * 8192
    executor.submit([Job("big", payload, Limits())])
    import zlib

    assert zlib.decompress(collect(executor, 1)["big"].answer or b"") == payload


def test_names_and_options_are_checked(tmp_path: Path) -> None:
    assert {"local", "ray", "slurm"} <= set(names())
    with pytest.raises(UsageError, match=r"no executor 'slrum'\. Did you mean 'slurm'"):
        start("slrum", workers=1, folder=tmp_path)
    with pytest.raises(UsageError, match=r"local has no option 'nice'\. It takes none"):
        start("local", workers=1, folder=tmp_path, options={"nice": 3})
    with pytest.raises(UsageError, match="0 workers"):
        start("local", workers=0, folder=tmp_path)
    with pytest.raises(UsageError, match="names no function"):
        start("local", workers=1, folder=tmp_path, call="module.function")
    with pytest.raises(UsageError, match="option per_job is True, which is no int"):
        check_options("x", {"per_job": True}, {"per_job": int})
    (tmp_path / "file").write_text("")
    with pytest.raises(CampaignError, match="cannot be made"):
        start("local", workers=1, folder=tmp_path / "file" / "spool")


def test_an_executor_of_another_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "another-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[ckptflip.executors]\nhere = my_executor:start\nbroken = no_such_module:start\n"
    )
    page = Path(__file__).parents[2] / "docs" / "executors.md"
    example = page.read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_executor.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"here", "broken"} <= set(names())
    executor = start("here", workers=1, folder=tmp_path / "spool", call="executor_calls:perform")
    executor.submit([job("echo a")])
    assert collect(executor, 1)["echo a"].answer == b"a"
    with pytest.raises(UsageError, match="executor here has no option 'nice'"):
        start("here", workers=1, folder=tmp_path / "spool", options={"nice": 1})
    with pytest.raises(CampaignError, match=r"executor broken .* cannot be imported: ModuleNotFoundError"):
        start("broken", workers=1, folder=tmp_path / "spool")
