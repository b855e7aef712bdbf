"""What `export` writes is read back by those who will read it: pandas' and others' Parquet, and CSV."""

from __future__ import annotations

import csv
import gzip
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from sample_stores import attempt, cells, filled, trial, trials

from ckptflip.campaign.store import export, writing
from ckptflip.campaign.store.listing import TABLES
from ckptflip.cli.export import TABLES as NAMED
from ckptflip.errors import CampaignError, UsageError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = filled(tmp_path_factory.mktemp("export") / "runs.db")
    with writing(path) as writer:
        writer.put_trial(trial("spec", 6, state="hung"), attempt("x", "hung"))
    return path


def rows(store: Path, out: Path, table: str) -> list[dict[str, Any]]:
    written = export(store, out, table=table)
    if out.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    else:
        with gzip.open(out, "rt", newline="") if out.suffix == ".gz" else out.open(newline="") as file:
            found = list(csv.DictReader(file))
    assert written == len(found)
    return found


def test_a_row_per_trial_epoch_and_metric(store: Path, tmp_path: Path) -> None:
    found = rows(store, tmp_path / "x.parquet", "values")
    expected = []
    clean = {"accuracy": (0.1, 0.5, 0.6, 0.7, 0.75, 0.75), "loss": (None, 2.0, math.nan, 1.0, 0.5, math.inf)}
    for new in trials():
        for metric, column in new.values[1].items():
            for epoch, value in zip(new.values[0], column, strict=True):
                if value is not None:
                    expected.append(
                        {
                            "cell": f"cell {new.cell}", "workload": "digits", "checkpoint_epoch": 2,
                            "count": 10 if new.cell == "spec" else None,
                            "fault": "flip" if new.cell == "spec" else None,
                            "stratum_layer": new.stratum and new.stratum[0],
                            "stratum_field": new.stratum and new.stratum[1], "clean_seed": new.number % 2,
                            "trial": new.number, "seed": new.seed, "state": "done", "outcome": new.outcome,
                            "metric": metric, "epoch": epoch, "value": float(value),
                            "clean_value": clean[metric][epoch],
                        }
                    )  # fmt: skip
    assert list(found[0]) == list(expected[0])
    assert sorted(map(str, found)) == sorted(map(str, expected))
    order = [(r["cell"], r["trial"]) for r in found if r["cell"] != "cell stratified"]
    assert order == sorted(order, key=lambda each: (each[0] != "cell spec", each[1]))


@pytest.mark.parametrize("table", TABLES)
def test_csv_says_the_same_as_parquet(store: Path, tmp_path: Path, table: str) -> None:
    exact = rows(store, tmp_path / "x.parquet", table)
    plain = rows(store, tmp_path / "x.csv", table)
    assert rows(store, tmp_path / "x.csv.gz", table) == plain
    assert exact
    for one, other in zip(exact, plain, strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            assert other[name] == shown(value), name


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def test_other_tables(store: Path, tmp_path: Path) -> None:
    of_trials = rows(store, tmp_path / "t.parquet", "trials")
    assert len(of_trials) == 19
    assert [r["trial"] for r in of_trials if r["state"] == "hung"] == [6]
    assert of_trials[6]["signal"] == 9
    assert of_trials[6]["bits_hit"] is None
    assert of_trials[0]["flips_kept"] is True
    words = rows(store, tmp_path / "f.parquet", "flips")
    assert len(words) == 12 * 5
    assert all(r["before"] ^ r["hit"] == r["after"] for r in words)
    assert max(r["before"] for r in words) > 2**63
    of_cells = rows(store, tmp_path / "c.parquet", "cells")
    assert [(r["cell"], r["done"], r["hung"], r["masked"]) for r in of_cells] == [
        ("cell spec", 6, 1, 1), ("cell control", 6, 0, 1), ("cell stratified", 6, 0, 2),
    ]  # fmt: skip
    spread = rows(store, tmp_path / "p.parquet", "propagation")
    assert len(spread) == 18
    assert math.isnan(spread[0]["mean"])
    assert (spread[0]["layer"], spread[0]["maximum"]) == ("conv1", math.inf)
    clean = rows(store, tmp_path / "r.parquet", "clean")
    assert len(clean) == 2 * 11
    assert clean[0] == {
        "workload": "digits", "clean_seed": 0, "exact_resume": True, "metric": "accuracy", "epoch": 0,
        "value": 0.1,
    }  # fmt: skip


def test_awkward_names_and_values(tmp_path: Path) -> None:
    path = filled(tmp_path / "runs.db")
    named = [
        msgspec.structs.replace(cells()[0], label='a "b", c\nd\r', swept={"epoch": 1.5, "bits": ["a", "b"]}),
        msgspec.structs.replace(cells()[1], swept={"epoch": 2}),
    ]
    with writing(path) as writer:
        writer.put_cells(named)
    for out in (tmp_path / "x.csv", tmp_path / "x.parquet"):
        found = rows(path, out, "values")
        assert {r["cell"] for r in found} == {'a "b", c\nd\r', "cell control"}, "cells of the spec alone"
        assert {str(r["swept_epoch"]) for r in found} == {"1.5", "2.0"}
        assert found[0]["bits"] == '["a", "b"]'


def test_without_trials(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with writing(path) as writer:
        writer.put_cells(cells())
    for table in TABLES:
        for suffix in ("csv", "parquet"):
            assert len(rows(path, tmp_path / f"{table}.{suffix}", table)) == (3 if table == "cells" else 0)


def test_a_clean_run_that_is_shorter_leaves_a_gap(tmp_path: Path) -> None:
    path = filled(tmp_path / "runs.db")
    longer = msgspec.structs.replace(trial("spec", 7), values=((5, 6), {"accuracy": (0.5, math.nan)}))
    with writing(path) as writer:
        writer.put_trial(longer, attempt("x"))
    found = [r for r in rows(path, tmp_path / "x.parquet", "values") if r["trial"] == 7]
    assert [r["clean_value"] for r in found] == [0.75, None]
    assert math.isnan(found[1]["value"])


def test_the_same_store_gives_the_same_file(store: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "csv.gz", "parquet"):
        one, other = tmp_path / f"one.{suffix}", tmp_path / f"other.{suffix}"
        export(store, one)
        export(store, other)
        assert one.read_bytes() == other.read_bytes()


def test_errors(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.parquet, \.csv or \.csv\.gz"):
        export(store, tmp_path / "x.xlsx")
    with pytest.raises(UsageError, match="there is no table 'rows'; there are values, trials"):
        export(store, tmp_path / "x.csv", table="rows")
    with pytest.raises(CampaignError, match="does not exist"):
        export(tmp_path / "no.db", tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("mine")
    with pytest.raises(UsageError, match="--overwrite"):
        export(store, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "mine"
    export(store, tmp_path / "x.csv", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["x.csv"]


def test_without_pyarrow(store: Path, tmp_path: Path) -> None:
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("raise ImportError")
    code = "import sys; from ckptflip.campaign.store import export; export(sys.argv[1], 'x.parquet')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert (
        b"writing Parquet needs pyarrow, which is not installed: pip install 'ckptflip[parquet]'"
        in done.stderr
    )


def test_the_command_knows_the_tables() -> None:
    assert list(TABLES) == list(NAMED)
