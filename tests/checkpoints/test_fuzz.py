"""Damaged and hostile checkpoints of every format: clear errors only, no hang, nothing written.

`CKPTFLIP_FUZZ=10000 pytest tests/checkpoints/test_fuzz.py` runs that many cases per format.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ckptflip
from ckptflip.errors import CkptflipError
from ckptflip.loaders import PROBES, Probe

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = int(os.environ.get("CKPTFLIP_FUZZ", "60"))
# libhdf5 itself can hang or end the process on damaged metadata: HDF5 has tests of its own.
LEFT_OUT = ("h5py", "keras")
FUZZED = [p for p in PROBES if not p.name.startswith(LEFT_OUT)]
SECONDS = 20
_EXTREMES = [
    n.to_bytes(8, order) for n in (0, 1 << 40, (1 << 63) - 1, (1 << 64) - 1) for order in ("little", "big")
]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Ends what hangs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A file's bytes with something wrong, mostly near its ends, where formats keep their index."""
    made = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        near = min(len(made), dice.choice((32, 512, 4096, len(made))))
        at = dice.randrange(near + 1) if dice.random() < 0.5 else len(made) - dice.randrange(near + 1)
        kind = dice.randrange(8)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            made[at : at + 1] = bytes([dice.randrange(256)])
        elif kind == 2 and made:
            made[min(at, len(made) - 1)] ^= 1 << dice.randrange(8)
        elif kind == 3:
            width = dice.choice((1, 2, 4, 8))
            made[at : at + width] = dice.choice(_EXTREMES)[:width]
        elif kind == 4:
            made[at:at] = dice.randbytes(dice.choice((1, 4, 64)))
        elif kind == 5:
            del made[at : at + dice.choice((1, 4, 64))]
        elif kind == 6:
            made[at : at + 64] = made[dice.randrange(len(made) + 1) :][:64]
        else:
            _renumber(made, dice)
    return bytes(made)


def _renumber(made: bytearray, dice: random.Random) -> None:
    """Another number, name or sign in text such as JSON."""
    changes = ((b"1", b"9" * 19), (b"4", b"-4"), (b"0", b"1e99"), (b"[", b"[" * 3000), (b".", b"/"))
    old, new = dice.choice((*changes, (b"w", b"../w")))
    places = [i for i in range(min(len(made), 1 << 16)) if made[i : i + 1] == old]
    if places:
        at = dice.choice(places)
        made[at : at + 1] = new


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("probe", FUZZED, ids=lambda p: p.name)
def test_damage_is_a_clear_error_and_alters_nothing(
    probe: Probe, tmp_path: Path, written: Callable[[Probe], Path]
) -> None:
    missing = probe.missing()
    if missing:
        pytest.skip(f"{missing} is not installed")
    original = written(probe)
    whole = contents(original.parent)
    folder = tmp_path / "damaged"
    shutil.copytree(original.parent, folder)
    dice = random.Random(probe.name)
    accepted = 0
    for case in range(CASES):
        name = dice.choice(sorted(whole))
        target = folder / name
        target.write_bytes(damaged(whole[name], dice))
        before = contents(folder)
        try:
            with limited(SECONDS):
                record = ckptflip.inject(folder / original.name, in_place=True, count=3, seed=case)
                assert record.path is not None
                ckptflip.undo(folder / original.name, record.path)
                Path(record.path).unlink()
            accepted += 1
        except CkptflipError as why:
            assert str(why), f"case {case}"
            assert contents(folder) == before, f"case {case}: {why}"
        except BaseException as why:
            raise AssertionError(f"case {case}, {name}: {type(why).__name__}: {why}") from why
        if probe.exact and contents(folder) != before:
            raise AssertionError(f"case {case}, {name}: undo did not give the bytes back")
        _restore(folder, whole)
    assert accepted < CASES or CASES < 20


def _restore(folder: Path, whole: dict[str, bytes]) -> None:
    for name in set(contents(folder)) - set(whole):
        (folder / name).unlink()
    for name, data in whole.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != data:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
