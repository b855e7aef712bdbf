"""Fletcher-32: repaired, left alone, wrong already, and after an interruption at every write."""

import os

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints import patch
from ckptflip.checkpoints.fletcher import fletcher32
from ckptflip.checkpoints.hdf5.checksums import _Versions
from ckptflip.errors import RecordError

KINDS = {
    "fletcher32": {"fletcher32": True},
    "shuffle": {"fletcher32": True, "shuffle": True},
    "gzip": {"fletcher32": True, "compression": "gzip"},
}


def build(path, kind="fletcher32", shape=(31,), chunks=(7,)):
    with h5py.File(path, "w") as file:
        data = np.random.default_rng(0).normal(size=shape).astype("f4")
        file.create_dataset("x", data=data, chunks=chunks, **KINDS[kind])
        file["y"] = np.ones(3)
    return path


def reads(path) -> bool:
    with h5py.File(path) as file:
        try:
            file["x"][()]
        except OSError:
            return False
        return True


@pytest.fixture(params=KINDS)
def file(request, tmp_path):
    return build(tmp_path / "a.h5", request.param)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 719, 720, 721, 65536, 131072 + 5, 400_001])
def test_the_checksum_is_the_one_hdf5_computes(tmp_path, size):
    data = np.random.default_rng(size).integers(0, 256, max(size, 1), dtype="u1")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=data, chunks=data.shape, fletcher32=True)
        file.flush()
        stored = file["x"].id.read_direct_chunk((0,))[1]
    assert fletcher32(data.tobytes()) == int.from_bytes(stored[-4:], "little")


@pytest.mark.parametrize(
    "data", [bytes(10), b"\xff" * 64, b"\xff\xff" * 70_000, bytes(70_000) + b"\1", b"\0\1" * 65535]
)
def test_the_checksum_of_extreme_bytes(tmp_path, data):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        words = np.frombuffer(data, "u1")
        file.create_dataset("x", data=words, chunks=words.shape, fletcher32=True)
        file.flush()
        stored = file["x"].id.read_direct_chunk((0,))[1]
    assert fletcher32(data) == int.from_bytes(stored[-4:], "little")


def test_repaired_checksums_let_the_file_be_read(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="x", count=12, seed=1)
    with h5py.File(file) as a, h5py.File(tmp_path / "b.h5") as b:
        words = a["x"][()].view("u4") ^ b["x"][()].view("u4")
    assert int(np.bitwise_count(words).sum()) == record.bits_effective == 12


def test_left_checksums_are_noticed_by_h5py_and_not_by_us(file, tmp_path):
    out = tmp_path / "b.h5"
    record = ckptflip.inject(file, out=out, tensors="x", count=12, seed=1, checksum="leave")
    assert reads(file) and not reads(out)
    rows = {r.tensor: r for r in ckptflip.diff(file, out)}
    assert rows["x"].bits == 12 and rows["y"].status == "same"
    assert ckptflip.scan(out)
    undone = ckptflip.undo(out, record.path)
    assert undone.restored == len(record) and reads(out)
    if "chunked, fletcher32" in record.header.tensors[0].layout:
        assert out.read_bytes() == file.read_bytes() and undone.digest_matches


def test_a_left_checksum_can_be_replayed_as_recorded_or_not(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="x", count=3, seed=1, checksum="leave")
    ckptflip.replay(record, file, out=tmp_path / "c.h5")
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    ckptflip.replay(record, file, out=tmp_path / "d.h5", checksum="repair")
    assert not reads(tmp_path / "c.h5") and reads(tmp_path / "d.h5")


def spoil(path, chunk: int) -> int:
    """Make one chunk's checksum wrong; returns where it lies."""
    with h5py.File(path) as file:
        info = file["x"].id.get_chunk_info(chunk)
    at = info.byte_offset + info.size - 4
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x55
    path.write_bytes(raw)
    return at


def test_a_checksum_that_was_wrong_stays_wrong(file, tmp_path):
    at = spoil(file, 2)
    before = file.read_bytes()
    assert not reads(file)
    out = tmp_path / "b.h5"
    record = ckptflip.inject(file, out=out, tensors="x", bits="0", fraction=1.0, seed=1)
    assert not reads(out)
    ckptflip.undo(out, record.path)
    assert not reads(out)
    if record.header.tensors[0].layout == "chunked, fletcher32":
        assert out.read_bytes() == before
        assert out.read_bytes()[at : at + 4] == before[at : at + 4]


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_undo_after_an_interruption_at_every_write(tmp_path, monkeypatch, libver):
    """Many small chunks; words and checksums written one by one; the process ends after each in turn."""
    file = tmp_path / "a.h5"
    with h5py.File(file, "w", libver=libver) as opened:
        data = np.random.default_rng(0).normal(size=40).astype("f4")
        opened.create_dataset("x", data=data, chunks=(7,), fletcher32=True)
        opened.create_dataset("z", data=data.astype("f8"), chunks=(3,), fletcher32=True)
    original = file.read_bytes()
    monkeypatch.setattr(patch, "_GAP", 0)
    ways = set()
    for stop in range(200):
        finished = _killed_after(
            monkeypatch, stop, lambda: ckptflip.inject(file, in_place=True, count=25, seed=4)
        )
        record = tmp_path / "a.h5.flips.jsonl"
        ways.add(finished)
        half = file.read_bytes()
        assert half != original or stop == 0
        # The undo is interrupted as well, and done again.
        _killed_after(monkeypatch, stop // 2, lambda: ckptflip.undo(file, record))  # noqa: B023
        ckptflip.undo(file, record)
        assert file.read_bytes() == original, stop
        record.unlink()
        if finished:
            break
    assert ways == {True, False} and stop > 30


def _killed_after(monkeypatch, writes: int, action) -> bool:
    left = writes

    def pwrite(fd, data, offset):
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        return real(fd, data, offset)

    real = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        try:
            action()
        except KilledError:
            return False
    return True


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_word_and_a_checksum_torn_at_a_page_are_put_right(tmp_path, cut):
    """A write that is killed may end where a page of the file ends, in the middle of a word."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pad"] = np.zeros(1000 + cut, "u1")
        file.create_dataset("x", data=np.zeros(3000, "f4"), chunks=(100,), fletcher32=True)
    original = (tmp_path / "a.h5").read_bytes()
    record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "b.h5", tensors="x", fraction=1.0, seed=1)
    altered = (tmp_path / "b.h5").read_bytes()
    torn = 0
    for page in range(512, len(original), 512):
        if original[page - 4 : page + 4] != altered[page - 4 : page + 4]:
            (tmp_path / "c.h5").write_bytes(altered[:page] + original[page:])
            ckptflip.undo(tmp_path / "c.h5", record.path)
            assert (tmp_path / "c.h5").read_bytes() == original
            torn += 1
    assert torn > 5


def test_torn_checksums_are_known_only_where_a_sector_ends():
    payload = bytes(range(64))
    right = fletcher32(payload).to_bytes(4, "little")
    torn = right[:2] + b"\0\0"
    for offset, mends in ((510, True), (1022, True), (512, False), (509, False), (4, False)):
        versions = _Versions(payload + torn, offset)
        versions.faulty[:] = 0  # its checksum is 0
        assert (versions.mask() != 0) is mends, offset


def test_a_foreign_word_is_refused_and_nothing_is_altered(tmp_path):
    file = build(tmp_path / "a.h5")
    record = ckptflip.inject(file, in_place=True, tensors="x", count=9, seed=1)
    again = ckptflip.inject(
        file, in_place=True, tensors="x", count=200, seed=2, record=tmp_path / "second.jsonl"
    )
    before = file.read_bytes()
    with pytest.raises(RecordError, match="neither what the record says") as refused:
        ckptflip.undo(file, record.path)
    assert file.read_bytes() == before
    assert "Nothing was altered" in str(refused.value)
    ckptflip.undo(file, again.path)
    assert ckptflip.undo(file, record.path).digest_matches
