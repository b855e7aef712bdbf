"""`ckptflip sample-size`: numbers, strata of a checkpoint, forms, refusals, and what it imports."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.campaign.statistics.eligible import Stratum, strata
from ckptflip.campaign.statistics.sample_size import no_event_size, sample_size
from ckptflip.cli.main import COMMANDS, run
from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy

pytestmark = pytest.mark.skipif("sample-size" not in COMMANDS, reason="the command is not in cli/main.py yet")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with h5py.File("a.h5", "w") as file:
        file["conv1/weight"] = np.ones((8, 4), "f4")
        file["conv1/bias"] = np.ones(8, "f2")
        file["fc[0]/weight"] = np.ones((5, 10), "f4")
        file["optimizer/step"] = np.int64(7)
    return Path("a.h5")


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, object]]:
    assert run(["sample-size", *options, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert isinstance(rows, list)
    return rows


@pytest.mark.parametrize(
    "options", [("--upper-bound", "1e-320"), ("--margin", "1e-300"), ("--margin", "1e-320")]
)
def test_what_no_campaign_reaches(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    assert run(["sample-size", *options]) == 2
    assert "is so small that no campaign reaches it; ask for a wider one" in capsys.readouterr().err


def test_small_margins_of_a_population_need_all_of_it() -> None:
    assert sample_size(1e-300, population=1000) == no_event_size(1e-320, population=1000) == 1000
    assert sample_size(0.5, p=1e-320, population=1000) == 1
    with pytest.raises(UsageError, match="margin is so small"):
        sample_size(1e-300)


def test_numbers_alone(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = answer(capsys, "--margin", "0.01", "--upper-bound", "0.001")
    assert row == {
        "layer": None,
        "bits": None,
        "population": None,
        "trials": 9604,
        "exact_trials": 9701,
        "no_event_trials": 2995,
    }
    (row,) = answer(capsys, "--margin", "0.05", "--population", "1000", "--p", "0.1", "--confidence", "0.9")
    assert (row["population"], row["trials"], row["no_event_trials"]) == (1000, 89, None)


def test_the_population_is_what_the_options_select(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    (row,) = answer(capsys, "--checkpoint", "a.h5")
    assert row["population"] == 32 * 32 + 8 * 16 + 50 * 32 + 64
    (row,) = answer(
        capsys, "--checkpoint", "a.h5", "--roles", "model", "--bits", "all,!critical", "--rows", "0-3"
    )
    assert row["population"] == 16 * 31 + 4 * 15 + 40 * 31
    (row,) = answer(capsys, "--checkpoint", "a.h5", "--tensors", "*/weight", "--fault", "burst:4")
    assert row["population"] == 82 * 29
    assert row["trials"] <= row["population"]


def test_each_layer_and_field_alone(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    rows = answer(capsys, "--checkpoint", "a.h5", "--roles", "model", "--per-layer", "--by", "field")
    assert [(r["layer"], r["bits"], r["population"]) for r in rows] == [
        ("conv1", "sign", 40),
        ("conv1", "critical", 40),
        ("conv1", "exponent,!critical", 32 * 7 + 8 * 4),
        ("conv1", "mantissa", 32 * 23 + 8 * 10),
        ("fc[0]", "sign", 50),
        ("fc[0]", "critical", 50),
        ("fc[0]", "exponent,!critical", 350),
        ("fc[0]", "mantissa", 1150),
    ]


@pytest.mark.parametrize("policy", [Policy(), Policy(bits="20-40"), Policy(rows="2-3"), Policy(fault="set1")])
@pytest.mark.parametrize("per_layer", [True, False])
def test_strata_add_up_to_the_population(checkpoint: Path, policy: Policy, per_layer: bool) -> None:
    (every,) = strata(checkpoint, policy)
    layers = strata(checkpoint, policy, per_layer=True)
    bits = strata(checkpoint, policy, per_layer=per_layer, by="bit")
    assert sum(s.population for s in layers) == sum(s.population for s in bits) == every.population
    assert {s.layer for s in layers} == {"conv1", "fc[0]", "optimizer/step"} - (
        {"optimizer/step"} if policy.rows else set()
    )
    assert len({(s.layer, s.bits) for s in bits}) == len(bits)


def test_bits_of_a_narrow_format_are_its_own(checkpoint: Path) -> None:
    found = strata(checkpoint, Policy(tensors=("conv1/bias",), bits="14-30"), by="bit")
    assert found == [Stratum("", "14", 8), Stratum("", "15", 8)]


def test_tables_leave_out_what_was_not_asked_for(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    assert run(["sample-size"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == ["trials", "exact_trials", "9604", "9701"]
    assert err == "± 0.01 with 0.95 confidence\n"
    assert run(["sample-size", "--checkpoint", "a.h5", "--per-layer", "--margin", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:4] == ["layer", "population", "trials", "exact_trials"]
    assert "for each of 3, 219 trials in all" in err
    assert run(["sample-size", "--checkpoint", "a.h5", "--per-layer", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["layer"] for r in rows] == ["conv1", "fc[0]", "optimizer/step"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--margin", "0"], "margin must be a number above 0"),
        (["--margin", "x"], "margin"),
        (["--confidence", "95"], "confidence must be a number above 0 and below 1, not 95"),
        (["--upper-bound", "1"], "upper bound must be"),
        (["--population", "-3"], "population must be a whole number of at least 1, not -3"),
        (["--per-layer"], "--per-layer selects in a checkpoint; name it with --checkpoint"),
        (["--bits", "sign"], "--bits selects in a checkpoint"),
        (["--checkpoint", "a.h5", "--population", "5"], "both given"),
        (["--checkpoint", "a.h5", "--layers", "conv2"], "did you mean 'conv1'"),
        (["--checkpoint", "a.h5", "--by", "bit", "--fault", "burst:2"], "hits more than one bit"),
        (["--checkpoint", "a.h5", "--ranks", "2 of 8"], "drawn anew by each seed"),
        (["--checkpoint", "none.h5"], "none.h5"),
    ],
)
def test_refusals_say_what_and_why(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, options: list[str], said: str
) -> None:
    assert run(["sample-size", *options]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_an_unknown_grouping_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="by 'byte' is not one of none, bit, field"):
        strata(checkpoint, Policy(), by="byte")


def test_nothing_large_is_imported_for_the_module_or_the_help() -> None:
    code = (
        "import sys, ckptflip.campaign.statistics\n"
        "from ckptflip.cli.main import run\n"
        "run(['sample-size', '--help'])\n"
        "print([m for m in ('scipy', 'torch', 'keras', 'matplotlib', 'h5py') if m in sys.modules])"
    )
    root = Path(ckptflip.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
