"""`status` as a user meets it, and the pace and rates behind it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from sample_stores import SPEC, attempt, begin, cells, filled, trial

from ckptflip.campaign.progress import _wilson, pace, progress
from ckptflip.campaign.statistics import wilson
from ckptflip.campaign.store import writing
from ckptflip.campaign.store.rows import Attempt
from ckptflip.cli.export import command as export
from ckptflip.cli.merge import command as merge
from ckptflip.cli.status import command as status
from ckptflip.errors import CampaignError, UsageError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = filled(tmp_path / "runs.db")
    with writing(path) as writer:
        writer.put_trial(trial("control", 6, state="hung"), attempt("x", "hung"))
        writer.stop_cell("spec", "enough")
        writer.put_cells(cells(wanted=6)[:1] + cells(wanted=9)[1:])
    return path


def asked(store: Path, *options: str) -> Result:
    found = CliRunner().invoke(status, [str(store), *options], catch_exceptions=False)
    assert found.exit_code == 0
    return found


def test_the_table(store: Path) -> None:
    found = asked(store)
    head, *lines = found.stdout.splitlines()
    assert head.split() == [
        "condition", "workload", "epoch", "trials", "failed", "identical", "masked", "slowed", "degraded",
        "collapsed", "rate", "interval", "stopped",
    ]  # fmt: skip
    assert [line.split() for line in lines] == [
        [
            "cell",
            "spec",
            "digits",
            "2",
            "6/6",
            "0",
            "2",
            "1",
            "1",
            "1",
            "1",
            "0.333",
            "0.097–0.700",
            "enough",
        ],
        ["cell", "control", "digits", "2", "6/9", "1", "2", "1", "1", "1", "1", "0.333", "0.097–0.700", "-"],
        [
            "cell",
            "stratified",
            "digits",
            "2",
            "6/9",
            "0",
            "2",
            "2",
            "2",
            "0",
            "0",
            "-",
            "-",
            "-",
        ],
    ]
    assert found.stderr.startswith("sample: 19 of 24 trials, 1 failed, ")
    assert "per hour" in found.stderr
    assert found.stderr.endswith(" left, not running\n")


def test_for_programs(store: Path) -> None:
    listed = json.loads(asked(store, "--format", "json").stdout)
    assert [json.loads(line) for line in asked(store, "--format", "ndjson").stdout.splitlines()] == listed
    plain = list(csv.DictReader(io.StringIO(asked(store, "--format", "csv").stdout)))
    assert [row["condition"] for row in plain] == [row["condition"] for row in listed]
    first = listed[0]
    assert (first["done"], first["wanted"], first["failed"], first["stopped"]) == (6, 6, 0, "enough")
    assert first["rate"] == pytest.approx(1 / 3)
    assert listed[1]["stopped"] is None


def test_a_stop_rule_names_its_outcomes(store: Path) -> None:
    stop = {"half_width": 0.1, "outcomes": ["masked"], "confidence": 0.9}
    with writing(store) as writer:
        writer.revise({**SPEC, "trials": {"stop": stop}}, "f" * 64, "x", {}, {})
    found = progress(store)
    low, high = wilson(1, 6, 0.9)
    cell = found.cells[0]
    assert (found.bad, found.confidence) == (("masked",), 0.9)
    assert (cell.rate, cell.low, cell.high) == (1 / 6, pytest.approx(float(low)), pytest.approx(float(high)))
    assert "19 of at most 24 trials" in asked(store).stderr


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999)
)
def test_wilson_is_that_of_the_statistics(counts: tuple[int, int], confidence: float) -> None:
    low, high = wilson(*counts, confidence)
    assert _wilson(*counts, confidence) == pytest.approx((float(low), float(high)), abs=1e-12)


def ended(*ends: tuple[float, float]) -> list[Attempt]:
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        Attempt(
            id=i, task="t", trial=i, state="done", executor="local", seconds=seconds,
            ended=(begun + timedelta(seconds=end)).isoformat(timespec="milliseconds"),
        )
        for i, (end, seconds) in enumerate(ends)
    ]  # fmt: skip


def test_the_pace() -> None:
    assert pace([]) is None
    assert pace(ended((10, 10))) == pytest.approx(360)
    two_workers = [(10.0 * (i // 2 + 1), 10.0) for i in range(20)]
    assert pace(ended(*two_workers)) == pytest.approx(720)
    night = [(end + 50_000, seconds) for end, seconds in two_workers]
    assert pace(ended(*two_workers, *night)) == pytest.approx(720), "a pause is none of the pace"
    slow_start = [(15.0 * (i + 1), 10.0) for i in range(10)]
    assert pace(ended(*slow_start)) == pytest.approx(10 / 145 * 3600)
    assert pace(ended((5, 0.0))) is None


def test_complete(tmp_path: Path) -> None:
    path = filled(tmp_path / "runs.db")
    found = progress(path)
    assert (found.trials, found.left, found.seconds_left) == (18, 0, 0.0)
    assert "18 of 18 trials, 0 failed" in asked(path).stderr
    assert asked(path).stderr.endswith("complete, not running\n")
    watched = asked(path, "--watch")
    # Where no terminal is: the table as it is without --watch, each line whole.
    assert watched.stdout == asked(path).stdout
    assert watched.stderr.endswith("complete, not running\n")


def test_watch_ends_where_nothing_runs(store: Path) -> None:
    """A shard that is complete, or a campaign that was interrupted: there is nothing to wait for."""
    found = CliRunner().invoke(status, [str(store), "--watch"], catch_exceptions=False)
    assert found.exit_code == 0 and "not running" in found.output


def test_watch_ends_when_the_campaign_does(store: Path) -> None:
    code = """if True:
        import sys
        from ckptflip.cli import status
        status._EVERY = 0.05
        status.command([sys.argv[1], "--watch"])
    """
    environment = {**os.environ, "COLUMNS": "200", "FORCE_COLOR": "1", "TERM": "xterm"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code, str(store)]
    with (
        writing(store) as writer,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        while "left" not in process.stdout.readline():
            assert process.poll() is None
        for key in ("control", "stratified"):
            writer.stop_cell(key, "enough")
        shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "complete" in shown


def test_a_running_driver_is_named(store: Path) -> None:
    with writing(store):
        assert f"run by process {os.getpid()} on " in asked(store).stderr


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    with writing(tmp_path / "runs.db") as writer:
        begin(writer)
        evil = msgspec.structs.replace(cells()[0], label="\x1b[31mred", wanted=0)
        writer.put_cells([evil])
    for options in ((), ("--format", "csv"), ("--watch",)):
        assert "\x1b[31m" not in asked(tmp_path / "runs.db", *options).output


def test_errors(store: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    with pytest.raises(CampaignError, match="does not exist"):
        run(status, [str(tmp_path / "no.db")], catch_exceptions=False)
    with pytest.raises(UsageError, match="--watch draws a table"):
        run(status, [str(store), "--watch", "--format", "json"], catch_exceptions=False)
    with writing(tmp_path / "begun.db"):
        pass
    with pytest.raises(CampaignError, match="has no campaign yet: `ckptflip run` was ended before it began"):
        run(status, [str(tmp_path / "begun.db")], catch_exceptions=False)


def test_merge_and_export_as_commands(tmp_path: Path) -> None:
    shards = [str(filled(tmp_path / f"{i}.db", (i, 2))) for i in range(2)]
    out, table = str(tmp_path / "all.db"), str(tmp_path / "x.csv")
    run = CliRunner().invoke
    done = run(merge, [*shards, "-o", out], catch_exceptions=False)
    assert done.stderr.endswith("3 cells, 18 trials (0 failed, 0 in several stores)\n")
    done = run(export, [out, "-o", table, "--table", "trials"], catch_exceptions=False)
    assert done.stderr.endswith("x.csv: 18 rows\n")
    with pytest.raises(UsageError, match="--overwrite"):
        run(export, [out, "-o", table], catch_exceptions=False)
    run(export, [out, "-o", table, "--overwrite"], catch_exceptions=False)
    assert len(Path(table).read_text().splitlines()) == 18 * 7 + 1


def test_what_status_imports(store: Path) -> None:
    code = (
        "import sys; from ckptflip.cli.status import command; command([sys.argv[1]], standalone_mode=False); "
        "found = {'scipy', 'rich', 'pyarrow', 'torch', 'h5py', 'matplotlib'} & sys.modules.keys(); "
        "sys.exit(str(found) if found else 0)"
    )
    with writing(store) as writer:
        writer.put_cells(cells()[:2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
