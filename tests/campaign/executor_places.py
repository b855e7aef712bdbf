"""Where the executors' tests run: processes here, a Ray cluster of two CPUs, a Slurm of one node."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptflip.campaign.executors import Executor, Job, Limits, Report, start

CALL = "executor_calls:perform"
SLURM = Path(__file__).parents[1] / "slurm"
PLACES = ("local", "ray", "slurm")
# Polled often, for a test waits for each of these.
OPTIONS: dict[str, dict[str, Any]] = {"local": {}, "ray": {}, "slurm": {"poll": 0.5, "grace": 1, "time": 10}}


@contextmanager
def slurm_node() -> Iterator[Path]:
    """A Slurm of one node, its configuration in the environment; skips where there can be none."""
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed (slurm-wlm and munge)")
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons are started by root alone")
    folder = tempfile.mkdtemp(prefix="slurm-")
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    environment = {**os.environ, "SLURM_TEST_PORT": str(27817 + 2 * worker)}
    begun = subprocess.run([SLURM / "start", folder], env=environment, capture_output=True, text=True)
    patch = pytest.MonkeyPatch()
    try:
        if begun.returncode:
            pytest.skip(f"Slurm cannot be started here: {begun.stderr.strip()}")
        patch.setenv("SLURM_CONF", begun.stdout.strip())
        # A job finds this very package, wherever it is started.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        yield Path(folder)
    finally:
        subprocess.run([SLURM / "stop", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        patch.undo()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of two CPUs, which executors find and leave running."""
    pytest.importorskip("ray")
    from ckptflip.campaign.executors.ray_cluster import connect, quiet_ray

    ray = quiet_ray()
    connect(ray, 2, {})
    try:
        yield
    finally:
        ray.shutdown()


class Open:
    """Starts executors of one kind, in folders of their own unless told.

    Attributes:
        name: of the kind.
        opened: those that were started.
        folders: made for them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.opened: list[Executor] = []
        self.folders: list[Path] = []

    def __call__(self, workers: int = 2, folder: Path | None = None, **keywords: Any) -> Executor:
        """Start one."""
        keywords["options"] = OPTIONS[self.name] | keywords.get("options", {})
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="executor-"))
            self.folders.append(folder)
        self.opened.append(start(self.name, workers=workers, folder=folder, **{"call": CALL} | keywords))
        return self.opened[-1]


@contextmanager
def place(name: str) -> Iterator[Open]:
    """A place where executors of a kind can be started; all are freed in the end."""
    with {"local": nothing, "ray": ray_cluster, "slurm": slurm_node}[name]():
        opening = Open(name)
        try:
            yield opening
        finally:
            for executor in opening.opened:
                executor.close(cancel=True)
            for folder in opening.folders:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def nothing() -> Iterator[None]:
    """Processes on this machine need no place."""
    yield


def job(text: str, key: str | None = None, *, seconds: float | None = 60, memory: int | None = None) -> Job:
    """A job for `executor_calls.perform`, its key the text itself."""
    return Job(key or text, text.encode(), Limits(seconds=seconds, memory=memory))


def collect(executor: Executor, count: int, seconds: float = 120) -> dict[str, Report]:
    """Reports until there are so many; each key once."""
    found: dict[str, Report] = {}
    until = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < until:
        for report in executor.wait(1):
            assert report.key not in found, f"{report.key} was reported twice"
            found[report.key] = report
    assert len(found) == count, f"{len(found)} of {count} reports after {seconds} s: {sorted(found)}"
    return found


def lives(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def await_true(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
