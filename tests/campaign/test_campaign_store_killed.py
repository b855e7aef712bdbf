"""A driver that is killed at any moment leaves whole trials, and the next one goes on."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from sample_stores import cells, contents, filled

from ckptflip.campaign.store import reading
from ckptflip.errors import CampaignError

HERE = Path(__file__).parent
WANTED = 60
# As `run` does: what is missing is put in, in an order of its own each time.
DRIVER = """
    import random, sys
    from ckptflip.campaign.store import writing
    from sample_stores import attempt, begin, trials
    print("begun", flush=True)
    with writing(sys.argv[1]) as writer:
        begin(writer, wanted=int(sys.argv[3]))
        done = writer.finished()
        left = [
            new for new in trials(wanted=int(sys.argv[3]))
            if new.number not in done.get(new.cell, {}).get(new.stratum, {})
        ]
        random.Random(int(sys.argv[2])).shuffle(left)
        for new in left:
            writer.put_trial(new, attempt(f"{new.cell}-{new.stratum}-{new.number}"))
            print("one more", flush=True)
"""


def driver(store: Path, seed: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(store), str(seed), str(WANTED)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def whole(store: Path) -> int:
    """Check that there are no half trials; how many there are."""
    connection = sqlite3.connect(store)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    with reading(store) as reader:
        held, attempts = reader.trials(), reader.attempts()
        curves, flips, spread = reader.curves("loss"), reader.flips(), reader.propagation()
        control = {cell.id for cell in reader.cells() if cell.key == "control"}
    for number, cell in zip(held.id, held.cell, strict=True):
        assert (curves.owner == number).sum() == 3
        assert (flips.trial == number).sum() == (0 if cell in control else 5)
        assert sum(row.trial == number for row in spread) == 1
    assert sorted(a.trial for a in attempts if a.trial) == sorted(held.id)
    return len(held.id)


def test_killed_again_and_again(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    draw = random.Random(1)
    found = [0]
    for seed in range(12):
        process = driver(store, seed)
        assert process.stdout is not None
        for _ in range(draw.randint(0, 12)):
            process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.004))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        try:
            found.append(whole(store))
        except CampaignError as why:
            assert not store.exists() or "is empty" in str(why)
    assert found == sorted(found), "no trial is ever lost"
    assert len(set(found)) > 6, "the kills hit drivers at work"
    last = driver(store, 99)
    last.communicate()
    assert last.returncode == 0
    assert whole(store) == 3 * WANTED
    assert len(cells()) == 3
    assert contents(store) == contents(filled(tmp_path / "undisturbed.db", wanted=WANTED))


def test_readers_beside_a_writer_see_whole_trials_alone(tmp_path: Path) -> None:
    store = filled(tmp_path / "runs.db", (0, 30), wanted=WANTED)
    process = driver(store, 0)
    looks: list[int] = []
    while process.poll() is None:
        looks.append(whole(store))
    process.communicate()
    assert process.returncode == 0
    assert looks == sorted(looks)
    assert whole(store) == 3 * WANTED
