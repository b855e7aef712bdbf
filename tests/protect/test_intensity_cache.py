"""Measured times on disk: found again, for this device alone; damage is ignored with a warning."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import torch

from ckptflip.protect.intensity import cache, times
from ckptflip.protect.intensity.cache import CacheWarning, load, path_of, store, this_device
from ckptflip.protect.intensity.roofline import Balance
from ckptflip.protect.intensity.times import Times

DEVICE = this_device(torch.device("cpu"), torch.float32)
BALANCE = Balance(1e11, 1e10)
KNOWN = {(8, 4, 2, True): {"none": 1e-6, "row": 2e-6}, (1, 4, 2, False): {"none": 1e-6}}


def test_what_was_stored_is_loaded(tmp_path):
    store(DEVICE, BALANCE, KNOWN, tmp_path)
    assert load(DEVICE, tmp_path) == (BALANCE, KNOWN)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_nothing_is_known_at_first(tmp_path):
    assert load(DEVICE, tmp_path / "none yet") == (None, {})


def test_the_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert path_of(DEVICE).parent == tmp_path / "ckptflip" / "intensity"
    for unset in ("", "relative/is/ignored"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert path_of(DEVICE).parent == Path.home() / ".cache" / "ckptflip" / "intensity"


@pytest.mark.parametrize("field", ["name", "torch", "ckptflip", "kernels", "dtype", "threads"])
def test_another_device_or_version_is_another_file(field):
    other = msgspec.structs.replace(DEVICE, **{field: 77 if field == "threads" else "other"})
    assert path_of(other) != path_of(DEVICE)


DAMAGE = {
    "empty": b"",
    "half": None,
    "no JSON": b"\xff\xfe",
    "another schema": b'"schema": 2',
    "a time of zero": b'"none": 1e-6->"none": 0.0',
    "a negative size": b'"rows": 8->"rows": -8',
    "an unknown field": b'"schema"->"x": 1, "schema"',
    "of another device": b'"float32"->"float64"',
    "without the unchecked layer": b'"none"->"node"',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_ignored_with_a_warning(kind, tmp_path):
    store(DEVICE, BALANCE, KNOWN, tmp_path)
    path = path_of(DEVICE, tmp_path)
    whole, damage = path.read_bytes(), DAMAGE[kind]
    if damage is None:
        damaged = whole[: len(whole) // 2]
    elif b"->" in damage:
        old, _, new = damage.partition(b"->")
        assert old in whole
        damaged = whole.replace(old, new)
    elif kind == "another schema":
        damaged = whole.replace(b'"schema": 1', damage)
    else:
        damaged = damage
    path.write_bytes(damaged)
    with pytest.warns(CacheWarning, match=r"cannot be used and are measured anew"):
        assert load(DEVICE, tmp_path) == (None, {})


def test_a_folder_in_its_place_is_ignored_with_a_warning(tmp_path):
    path_of(DEVICE, tmp_path).mkdir()
    with pytest.warns(CacheWarning):
        assert load(DEVICE, tmp_path) == (None, {})
    with pytest.warns(CacheWarning, match="cannot be kept"):
        store(DEVICE, BALANCE, KNOWN, tmp_path)
    assert not list(path_of(DEVICE, tmp_path).iterdir())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.warns(CacheWarning, match="cannot be kept"):
        store(DEVICE, BALANCE, KNOWN, tmp_path)


@pytest.fixture
def counted(monkeypatch):
    """Measuring that counts and costs nothing."""
    asked = []

    def measured(weight, bias, rows, schemes):
        asked.append(rows)
        return {"none": 1.0, "row": 1.5}

    monkeypatch.setattr(times, "measured", measured)
    monkeypatch.setattr(times, "measured_balance", lambda device, dtype: BALANCE)
    return asked


def test_what_is_known_is_not_measured_again(tmp_path, counted):
    weight = torch.ones(3, 2)
    for expected in ([4, 8], [4, 8, 16]):
        book = Times(folder=tmp_path)
        for rows in expected:
            assert book.of(weight, None, rows) == {"none": 1.0, "row": 1.5}
            assert book.of(weight, None, rows) == {"none": 1.0, "row": 1.5}
        assert book.balance(weight) == BALANCE
        book.keep()
        assert counted == expected


def test_remeasure_measures_once_more_and_keeps_the_rest(tmp_path, counted):
    weight = torch.ones(3, 2)
    for remeasure in (False, True):
        book = Times(remeasure, tmp_path)
        for _ in range(2):
            book.of(weight, None, 4)
        if not remeasure:
            book.of(weight, None, 64)
        book.keep()
    assert counted == [4, 64, 4]
    assert sorted(key[0] for key in load(cache.this_device(weight.device, weight.dtype), tmp_path)[1]) == [
        4,
        64,
    ]
