"""What is Ray's own: its processes are killed, its clusters are not there, its resources are counted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_places import Open, await_true, collect, job, lives, place

from ckptflip.campaign.executors import start
from ckptflip.errors import CampaignError, UsageError


@pytest.fixture(scope="module")
def opening() -> Iterator[Open]:
    with place("ray") as found:
        yield found


def test_a_process_of_ray_that_is_killed_takes_its_worker_along_and_loses_one_job(
    opening: Open, tmp_path: Path
) -> None:
    executor = opening()
    note = tmp_path / "note"
    executor.submit([job(f"note {note} 600"), job("sleep 1 a")])
    await_true(lambda: note.exists() and note.read_text(), 60)
    worker, rays = map(int, note.read_text().split()[1:3])
    os.kill(rays, signal.SIGKILL)
    reports = collect(executor, 2)
    loss = reports[f"note {note} 600"].loss
    assert loss is not None and loss.state == "crashed" and "WorkerCrashedError" in loss.message
    assert reports["sleep 1 a"].answer == b"a"
    await_true(lambda: not lives(worker))
    executor.submit([job("echo again")])
    assert collect(executor, 1)["echo again"].answer == b"again"


def test_slots_are_what_the_cluster_has_room_for(opening: Open) -> None:
    assert opening(workers=None).slots == 2
    assert opening(workers=1).slots == 1
    assert opening(workers=None, options={"num_cpus": 0.5}).slots == 4
    assert opening(workers=None, options={"num_cpus": 2}).slots == 1


def test_workers_are_warm(opening: Open) -> None:
    executor = opening(workers=1, options={"num_cpus": 2})
    executor.submit([job("pid", str(i)) for i in range(4)])
    assert len({report.answer for report in collect(executor, 4).values()}) == 1


def test_options_are_checked(opening: Open, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ray has no option 'num_gpu'\. Did you mean 'num_gpus'"):
        start("ray", workers=1, folder=tmp_path, options={"num_gpu": 1})
    with pytest.raises(UsageError, match="num_cpus must be above 0"):
        start("ray", workers=1, folder=tmp_path, options={"num_cpus": 0})


def test_an_address_where_nothing_answers_is_told_at_once() -> None:
    pytest.importorskip("ray")
    from ckptflip.campaign.executors.ray_cluster import reach

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach(f"127.0.0.1:{port}")
        reach(f"ray://127.0.0.1:{port}")
    with pytest.raises(CampaignError, match=f"nothing answers at ray://127.0.0.1:{port}"):
        reach(f"ray://127.0.0.1:{port}")
    reach("auto")


def test_a_cluster_of_its_own_is_started_and_ended(tmp_path: Path) -> None:
    """In a process of its own, for the tests' cluster is this one's."""
    script = (
        "import sys; from pathlib import Path\n"
        "from ckptflip.campaign.executors import Job, start\n"
        "from ckptflip.errors import CampaignError\n"
        "try: start('ray', workers=1, folder=Path(sys.argv[1]), options={'num_gpus': 64})\n"
        "except CampaignError as error: print(error)\n"
        "executor = start('ray', workers=1, folder=Path(sys.argv[1]), call='executor_calls:perform')\n"
        "executor.submit([Job('a', b'echo one')]); print(executor.wait()[0].answer, executor.slots)\n"
        "executor.close()\n"
    )
    paths = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    refused, answered = done.stdout.splitlines()
    assert refused.startswith("executor ray: no task with num_cpus 1 and num_gpus 64 fits on this machine")
    assert answered == "b'one' 1"
