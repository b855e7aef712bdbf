"""The demo: it runs twice in one folder, and its conclusions follow the data."""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import h5py
import numpy as np

import ckptflip
from ckptflip import demo
from ckptflip.demo import BUT_CRITICAL, CRITICAL, Findings, Trial
from ckptflip.errors import UsageError, WorkloadError


def stand_in(path, *, out, roles, bits, count, seed, overwrite):
    """Flip `count` bits of one layer, as the real verb would of all."""
    assert (roles, overwrite) == (["model"], True)
    shutil.copy(path, out)
    with h5py.File(out, "r+") as file:
        words = file["model/fc2.weight"][...].view(np.uint32)
        words.flat[seed : seed + count] ^= np.uint32(1 << (30 if bits == "critical" else 3))
        file["model/fc2.weight"][...] = words.view(np.float32)
    out.with_name(f"{out.name}.flips.jsonl").write_text(json.dumps({"counts": {"bits_hit": count}}) + "\n")
    return SimpleNamespace(bits_hit=count, bits_effective=count)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "WORKLOAD", "digits-mlp")
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(demo, "FLIP_EPOCH", 1)


def test_it_runs_twice_in_one_folder(short, monkeypatch, tmp_path):
    monkeypatch.setattr(ckptflip, "inject", stand_in, raising=False)
    said = []
    first = demo.run(tmp_path, seeds=2, progress=said.append)
    assert demo.run(tmp_path, seeds=2) == first
    assert len(first.trials) == 2 * len(demo.CONDITIONS)
    assert first.figure.read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "altered").glob("*.track.jsonl"))) == len(first.trials)
    assert any("bit for bit" in line for line in said)
    assert {t.effective for t in first.trials} == {1, 10, 100, 1000}


def test_it_runs_with_the_real_verb(short, tmp_path):
    found = demo.run(tmp_path, seeds=1)
    assert [trial.effective for trial in found.trials] == [1, 10, 100, 1000, 1, 10]


def test_a_resume_that_differs_stops_it(short, monkeypatch, tmp_path):
    resume = demo.harness.resume

    def other(*args, save, **options):
        made = resume(*args, save=save, **options)
        (save / "epoch_003.h5").write_bytes(b"other")
        return made

    monkeypatch.setattr(demo.harness, "resume", other)
    with pytest.raises(WorkloadError, match="differs from the uninterrupted run"):
        demo.run(tmp_path, seeds=1)


def found(*trials):
    return Findings(0.9, 0.98, tuple(trials), None)


def trial(count, bits, final):
    return Trial(count, bits, 1, count, 0.9, final, final < 0.49)


def test_conclusions_follow_the_data():
    fine, bad = trial(100, BUT_CRITICAL, 0.975), trial(1, CRITICAL, 0.1)
    others, critical = found(fine, bad).conclusions()
    assert others.startswith("Training absorbed up to 100 flips")
    assert critical == (
        "1 flip of the critical bit was enough to make every one of 1 runs collapse "
        "(final accuracy 10.0 %, clean 98.0 %)."
    )
    others, critical = found(fine, trial(10, BUT_CRITICAL, 0.2), trial(1, CRITICAL, 0.98)).conclusions()
    assert others.startswith("Training did not absorb all flips")
    assert "1 of 2 runs" in others
    assert "the worst, with 10 flips, ended at 20.0 %" in others
    assert "made none of 1 runs collapse, against what is usually reported" in critical
    _, critical = found(fine, bad, trial(1, CRITICAL, 0.98)).conclusions()
    assert "1 of 2 runs collapse; the others survived it (final accuracy 10.0 % to 98.0 %" in critical


def test_the_table_has_a_line_per_condition():
    lines = found(trial(100, BUT_CRITICAL, 0.975), trial(1, CRITICAL, 0.1), trial(1, CRITICAL, 0.3)).table()
    head, clean, others, critical = (line.split() for line in lines.splitlines())
    assert head[:3] == ["flips", "bits", "seeds"]
    assert clean[:6] == ["0", "-", "1", "0", "90.0", "98.0"]
    assert others[:6] == ["100", "others", "1", "100", "90.0", "97.5"]
    assert critical == [
        "1",
        "critical",
        "2",
        "1",
        "90.0",
        "20.0",
        "10.0",
        "to",
        "30.0",
        "-78.0",
        "2",
        "of",
        "2",
    ]


def test_seeds_must_make_sense(tmp_path):
    with pytest.raises(UsageError, match="seeds"):
        demo.run(tmp_path, seeds=0)
