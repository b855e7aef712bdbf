"""Asking loaders: what they say is what is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckptflip.cli.main import run
from ckptflip.loaders import PROBES, Probe, Verdict, ask
from ckptflip.loaders.asking import changed, planned


def by_name(name: str) -> Probe:
    return next(p for p in PROBES if p.name == name)


def test_names_are_unique_and_modules_there() -> None:
    assert len({p.name for p in PROBES}) == len(PROBES)
    folder = Path(__file__).parent.parent / "ckptflip" / "loaders"
    assert {p.calls.partition(":")[0] for p in PROBES} <= {p.stem for p in folder.glob("*.py")}


def test_a_checksum_is_noticed_when_it_was_left() -> None:
    assert ask(by_name("npz")) == Verdict(
        format="npz",
        loader="numpy.load",
        version=by_name("npz").version(),
        covered="CRC-32 of the zip member",
        repair="silent",
        leave="detected",
        error="BadZipFile: Bad CRC-32 for file 'conv.weight.npy'",
    )


def test_what_is_not_installed_is_not_asked() -> None:
    verdict = ask(Probe("none", "nothing", "load", "no_such_package", "arrays:Npz"))
    assert (verdict.repair, verdict.leave) == ("", "")
    assert verdict.error == "no_such_package is not installed"


def test_a_loader_that_ends_its_process_is_no_answer() -> None:
    verdict = ask(Probe("not a known name", "npz", "load", "numpy", "arrays:Npz"))
    assert (verdict.repair, verdict.leave) == ("", "") and verdict.error


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["loaders", "npy", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["loader"], row["repair"], row["leave"]) == ("numpy.load", "silent", "silent")
    assert run(["loaders", "nonesuch"]) == 2
    assert "there are h5py, h5py-fletcher" in capsys.readouterr().err


def test_differences_are_found_for_real(tmp_path: Path) -> None:
    import ckptflip

    calls = by_name("npz").load_calls()
    path = calls.write(tmp_path)
    record = ckptflip.inject(path, out=tmp_path / "b.npz", count=5, seed=1)
    before, after = calls.load(path), calls.load(tmp_path / "b.npz")
    assert changed(before, after) == planned(record) != {}
    assert changed(before, before) == {}
