"""Stores that cannot be used say why, and what to do; nothing that was finished is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sample_stores import attempt, begin, contents, filled, trial

from ckptflip.campaign.store import holder_of, reading, schema, writing
from ckptflip.campaign.store.lock import lock_path
from ckptflip.errors import CampaignError

HERE = Path(__file__).parent


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return filled(tmp_path / "runs.db")


def refused(path: Path) -> str:
    """What both a reader and a writer say."""
    with pytest.raises(CampaignError) as read, reading(path):
        pass
    with pytest.raises(CampaignError) as written, writing(path, create=False):
        pass
    assert not lock_path(path).exists()
    assert str(path) in str(written.value)
    return str(read.value)


def child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """A Python of its own that runs `code` beside these tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


HOLD = """
    import sys
    from ckptflip.campaign.store import writing
    with writing(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def writer_elsewhere(store: Path) -> Iterator[subprocess.Popen[str]]:
    with child(HOLD, store) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_missing(tmp_path: Path) -> None:
    assert "does not exist; `ckptflip run" in refused(tmp_path / "no.db")
    assert "does not exist" in refused(tmp_path / "no" / "no.db")
    with (
        pytest.raises(CampaignError, match="cannot be written: No such file"),
        writing(tmp_path / "no" / "no.db"),
    ):
        pass


def test_a_folder_and_a_pipe(tmp_path: Path) -> None:
    assert "is a folder; name the store in it" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a plain file" in refused(tmp_path / "pipe")


def test_not_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    path.write_text("name = 'not a store'\n" * 100)
    assert "is not the store of a campaign: it is no SQLite file" in refused(path)
    with pytest.raises(CampaignError, match="no SQLite file"), writing(path):
        pass
    assert path.read_text() == "name = 'not a store'\n" * 100


def test_somebody_elses_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE trials (id INTEGER)")
    connection.close()
    before = path.read_bytes()
    assert "is a SQLite file, but not the store of a campaign" in refused(path)
    with pytest.raises(CampaignError, match="not the store of a campaign"), writing(path):
        pass
    assert path.read_bytes() == before


def test_empty_as_after_a_kill_before_the_first_table(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.touch()
    assert "is empty: no campaign was ever begun in it" in refused(path)
    assert contents(filled(path)) == contents(filled(tmp_path / "other.db"))


def test_without_a_campaign(tmp_path: Path) -> None:
    with writing(tmp_path / "runs.db") as writer:
        with pytest.raises(CampaignError, match="has no campaign yet"):
            writer.reader.spec()
        assert (writer.reader.cells(), writer.reader.counts(), len(writer.reader.trials().id)) == ([], {}, 0)


def test_of_a_newer_version(store: Path) -> None:
    connection = sqlite3.connect(store)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    before = store.read_bytes()
    assert (
        f"is a store of version 7, and this ckptflip knows up to {schema.VERSION}: a newer ckptflip wrote "
        "it. Upgrade with pip install -U ckptflip"
    ) in refused(store)
    assert store.read_bytes() == before


def older(store: Path) -> None:
    """Make a store one of version 0, which a made-up step brings to version 1."""
    connection = sqlite3.connect(store)
    connection.executescript(
        "DROP INDEX trials_by_outcome; ALTER TABLE cells RENAME COLUMN stopped TO ended;"
    )
    connection.execute("PRAGMA user_version = 0")
    connection.close()


STEP = {
    0: "ALTER TABLE cells RENAME COLUMN ended TO stopped; "
    "CREATE INDEX trials_by_outcome ON trials (cell, stratum, state, outcome)"
}


def test_an_older_one_is_brought_up_to_date(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = contents(store)
    older(store)
    monkeypatch.setattr(schema, "STEPS", STEP)
    before = store.read_bytes()
    assert contents(store) == values
    assert store.read_bytes() == before, "reading changes nothing"
    with writing(store) as writer:
        assert writer.reader.values() == values
        writer.stop_cell("spec", "enough")
    monkeypatch.setattr(schema, "STEPS", {})
    with reading(store) as reader:
        assert reader.cells()[0].stopped == "enough"


def test_an_older_one_that_nothing_brings_up_to_date(store: Path) -> None:
    older(store)
    assert f"{store} is a store of version 0, which nothing brings to version 1" in refused(store)


def test_of_a_version_that_there_never_was(store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA user_version = -5")
    assert f"{store} is damaged: its version is -5" in refused(store)


def test_a_step_that_fails_changes_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older(store)
    before = store.read_bytes()
    monkeypatch.setattr(schema, "STEPS", {0: "ALTER TABLE cells ADD COLUMN x; DROP TABLE nowhere"})
    with pytest.raises(CampaignError, match="no such table: nowhere"), writing(store):
        pass
    assert store.read_bytes() == before


@pytest.mark.parametrize("kept", [10, 99, 100, 4096, 5000, 20_000, -1])
def test_cut_short(store: Path, kept: int) -> None:
    store.write_bytes(store.read_bytes()[:kept])
    with pytest.raises(CampaignError, match=r"is damaged: .*Restore a copy|its first bytes are damaged"):
        contents(store)


def test_random_damage_gives_a_message_or_nothing(store: Path) -> None:
    whole = store.read_bytes()
    draw = random.Random(5)
    messages = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 10, 200])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        store.write_bytes(damaged)
        try:
            with reading(store) as reader:
                for ask in (
                    reader.revisions, reader.cells, reader.strata, reader.runs, reader.run_states,
                    reader.metrics, reader.trials,
                    reader.flips, reader.tensors, reader.propagation, reader.attempts,
                    reader.counts, reader.values, lambda: reader.curves("loss"),
                ):  # fmt: skip
                    ask()
        except CampaignError as why:
            messages += 1
            assert str(store) in str(why)
    assert messages > 30


def test_in_use_by_another_writer(store: Path, writer_elsewhere: subprocess.Popen[str]) -> None:
    who = rf"in use: process {writer_elsewhere.pid} on \S+, since 20"
    with pytest.raises(CampaignError, match=who), writing(store):
        pass
    link = store.with_name("link.db")
    link.symlink_to(store)
    with pytest.raises(CampaignError, match=who), writing(link):
        pass
    holder = holder_of(store)
    assert holder is not None
    assert holder.pid == writer_elsewhere.pid
    assert len(contents(store)["trials"]) == 18, "readers are let in"


def test_the_lock_goes_with_its_process(store: Path, writer_elsewhere: subprocess.Popen[str]) -> None:
    writer_elsewhere.send_signal(signal.SIGKILL)
    writer_elsewhere.wait()
    assert lock_path(store).exists()
    assert holder_of(store) is None
    with writing(store) as writer:
        writer.put_trial(trial("spec", 9), attempt("x"))
        assert holder_of(store).pid == os.getpid()  # type: ignore[union-attr]
        with pytest.raises(CampaignError, match=f"process {os.getpid()} on"), writing(store):
            pass
    assert [each.name for each in store.parent.iterdir()] == [store.name]


def test_a_forked_worker_that_outlives_the_driver_holds_nothing(store: Path) -> None:
    code = """
        import os, sys
        from ckptflip.campaign.store import writing
        with writing(sys.argv[1]):
            if os.fork() == 0:
                print("forked", flush=True)
                sys.stdin.readline()
                os._exit(0)
            os.kill(os.getpid(), 9)
    """
    with child(code, store) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "forked\n"
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with writing(store) as writer:
            writer.put_trial(trial("spec", 9), attempt("x"))
        process.communicate("\n")


def test_many_who_want_to_write_take_turns(store: Path) -> None:
    code = """
        import sys, time
        from ckptflip.campaign.store import writing
        from ckptflip.errors import CampaignError
        from sample_stores import attempt, trial
        for number in range(5):
            while True:
                try:
                    with writing(sys.argv[1]) as writer:
                        writer.put_trial(trial("spec", 10 * int(sys.argv[2]) + number), attempt("x"))
                    break
                except CampaignError as why:
                    assert "is in use" in str(why), why
    """
    processes = [child(code, store, str(i)) for i in (1, 2, 3)]
    assert [process.communicate()[0] for process in processes] == ["", "", ""]
    with reading(store) as reader:
        assert len(reader.trials().id) == 18 + 15


def test_a_full_disk_loses_nothing(store: Path) -> None:
    values = contents(store)
    with writing(store) as writer:
        (pages,) = writer.reader.connection.execute("PRAGMA page_count").fetchone()
        writer.reader.connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(
            CampaignError, match=r"disk is full.*Every trial that was finished before is kept"
        ):
            for number in range(10, 200):
                writer.put_trial(trial("spec", number), attempt("x"))
        kept = writer.reader.values()
        writer.reader.connection.execute("PRAGMA max_page_count = 100000")
        writer.put_trial(trial("spec", 500), attempt("x"))
    now = contents(store)
    assert set(values["trials"]) <= set(kept["trials"]) < set(now["trials"])
    assert len(now["trial_values"]) == sum(7 for _ in now["trials"])
    assert check(store) == "ok"


def check(store: Path) -> str:
    connection = sqlite3.connect(store)
    (found,) = connection.execute("PRAGMA integrity_check").fetchone()
    broken = connection.execute("PRAGMA foreign_key_check").fetchall()
    connection.close()
    return f"{found}{broken or ''}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=600k", "tmpfs", where], check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = small_disk / "runs.db"
    done = 0
    with (
        pytest.raises(CampaignError, match="Every trial that was finished before is kept; free space"),
        writing(store) as writer,
    ):
        begin(writer)
        for number in range(10_000):
            writer.put_trial(trial("spec", number), attempt("x"))
            done += 1
    assert done > 10
    (small_disk / "runs.db-wal").exists()
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    assert check(store) == "ok"
    with writing(store) as writer:
        assert len(writer.finished()["spec"][None]) == done
        writer.put_trial(trial("spec", done), attempt("x"))


AS_NOBODY = """
    import os, sys
    from ckptflip.campaign.store import reading, writing
    from ckptflip.errors import CampaignError
    os.setgid(65534)
    os.setuid(65534)
    try:
        with reading(sys.argv[1]) as reader:
            print(len(reader.trials().id))
    except CampaignError as why:
        print(why)
    try:
        with writing(sys.argv[1]) as writer:
            pass
    except CampaignError as why:
        print(why)
"""


@pytest.fixture
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that others can reach, with a store in it, that only root may write."""
    if os.geteuid() != 0:
        pytest.skip("playing another user needs root")
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield filled(Path(name) / "runs.db")


def asked(store: Path) -> list[str]:
    with child(AS_NOBODY, store) as process:
        return process.communicate()[0].splitlines()


def test_a_folder_that_cannot_be_written_can_be_read(public: Path) -> None:
    read, written = asked(public)
    assert read == "18"
    assert "cannot be written: Permission denied" in written
    assert [each.name for each in public.parent.iterdir()] == [public.name]


def test_a_store_that_cannot_be_read(public: Path) -> None:
    public.chmod(0o600)
    assert "cannot be read: permission denied; ask its owner" in asked(public)[0]


def test_a_store_that_cannot_be_written_in_a_folder_that_can(public: Path) -> None:
    public.chmod(0o444)
    public.parent.chmod(0o777)
    read, written = asked(public)
    assert read == "18"
    assert "cannot be" in written


def test_trials_that_a_killed_run_left_in_the_log_of_a_folder_that_cannot_be_written(public: Path) -> None:
    code = """
        import os, sys
        from ckptflip.campaign.store import writing
        from sample_stores import attempt, trial
        with writing(sys.argv[1]) as writer:
            writer.put_trial(trial("spec", 9), attempt("x"))
            os.kill(os.getpid(), 9)
    """
    child(code, public).communicate()
    public.with_name("runs.db-shm").unlink()
    assert "has trials in runs.db-wal that a killed run left there" in asked(public)[0]
    assert len(contents(public)["trials"]) == 19


def test_a_new_store_is_never_met_half_made(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    code = "import sys; from ckptflip.campaign.store import writing\nwith writing(sys.argv[1]): pass"
    for _ in range(5):
        store.unlink(missing_ok=True)
        process = child(code, store)
        while not store.exists():
            assert process.poll() is None
        with reading(store) as reader:
            assert reader.revisions() == []
        assert process.communicate()[0] == ""
    assert [each.name for each in tmp_path.iterdir()] == ["runs.db"]
