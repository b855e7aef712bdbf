"""Seals of every format: what an injection altered is what `verify` names, and `repair` undoes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ckptflip
from ckptflip.bits.formats import lookup_name
from ckptflip.faults.record import Record
from ckptflip.loaders import PROBES, Probe

pytestmark = pytest.mark.filterwarnings("ignore")  # frameworks warn of their own future


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hit(record: Record) -> set[tuple[str, int, int]]:
    """Tensor, element and bit of every effective flip."""
    found = set()
    plan = record.plan
    masks = plan.before ^ plan.after
    for tensor, word, mask in zip(plan.tensor.tolist(), plan.word.tolist(), masks.tolist(), strict=True):
        entry = record.header.tensors[tensor]
        number = lookup_name(entry.dtype.removeprefix(">"))
        element, part = divmod(word, number.parts)
        bits = (b for b in range(64) if mask >> b & 1)
        found |= {(entry.name, element, part * number.part_width + b) for b in bits}
    return found


@pytest.fixture(params=PROBES, ids=lambda p: p.name)
def probe(request: pytest.FixtureRequest) -> Probe:
    missing = request.param.missing()
    if missing:
        pytest.skip(f"{missing} is not installed")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def checkpoint(probe: Probe, tmp_path: Path, written: Callable[[Probe], Path]) -> Path:
    path = written(probe)
    shutil.copytree(path.parent, tmp_path / "original")
    return tmp_path / "original" / path.name


def test_verify_names_what_inject_did_and_repair_undoes_it(checkpoint: Path, probe: Probe) -> None:
    before = contents(checkpoint.parent)
    sealed = ckptflip.seal(checkpoint, repair=1.0)
    assert ckptflip.verify(checkpoint).intact
    record = ckptflip.inject(checkpoint, in_place=True, count=7, seed=3)
    assert record.path is not None
    found = ckptflip.verify(checkpoint)
    assert not found.intact
    flips = {(d.tensor, d.element, d.bit) for d in found.damage if d.what == "flip" and d.element is not None}
    if probe.patched:
        assert flips == hit(record)
        assert all(d.tensor or d.part for d in found.damage)
    else:
        assert found.damage
    done = ckptflip.repair(checkpoint, in_place=True, partial=True)
    if probe.patched:
        assert done.found.damage == found.damage and not done.found.unnamed
    if done.whole:
        Path(record.path).unlink()
        sealed.path.unlink()
        # Files that the injection made in a store of its own are told, and left alone.
        extra = {d.file for d in found.damage if d.what == "extra"}
        now = contents(checkpoint.parent)
        assert {n for n in now if n not in before} == {f"{checkpoint.name}/{n}" for n in extra}
        assert {n: now[n] for n in before} == before
    else:
        assert not probe.patched


def test_a_single_flip_needs_no_shares(checkpoint: Path, probe: Probe) -> None:
    if not probe.patched:
        pytest.skip("words of this format are stored coded")
    before = contents(checkpoint.parent)
    sealed = ckptflip.seal(checkpoint)
    record = ckptflip.inject(checkpoint, in_place=True, count=1, seed=5, checksum="leave")
    found = ckptflip.verify(checkpoint)
    assert {(d.tensor, d.element, d.bit) for d in found.damage} == hit(record)
    assert found.mendable
    out = checkpoint.parent.with_name("mended")
    out.mkdir()
    target = out / checkpoint.name
    done = ckptflip.repair(checkpoint, out=target)
    assert done.whole and done.out == target
    sealed.path.unlink()
    assert record.path is not None
    Path(record.path).unlink()
    now = contents(target if target.is_dir() and not checkpoint.is_dir() else out)
    assert now == before


@pytest.mark.parametrize("share", [None, 1.0])
def test_every_byte_of_every_file_counts(checkpoint: Path, share: float | None) -> None:
    """A flip anywhere, in headers and indices too, is found, and mended."""
    before = contents(checkpoint.parent)
    sealed = ckptflip.seal(checkpoint, repair=share)
    rng = np.random.default_rng(1)
    files = [p for p in checkpoint.parent.rglob("*") if p.is_file() and p != sealed.path and p.stat().st_size]
    covered = 0
    for path in files:
        data = bytearray(path.read_bytes())
        at, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        found = ckptflip.verify(checkpoint)
        if found.intact:  # a file that is no part of the checkpoint
            data[at] ^= 1 << bit
            path.write_bytes(data)
            continue
        covered += 1
        assert [(d.start, d.bits) for d in found.damage] == [(at, 1)]
        assert ckptflip.repair(checkpoint, in_place=True).whole
    assert covered
    sealed.path.unlink()
    assert contents(checkpoint.parent) == before
