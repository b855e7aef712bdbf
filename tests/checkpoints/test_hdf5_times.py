"""No time of day gets into an altered copy: replays a second apart give the identical file."""

import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints.hdf5.times import kept_times, lookup3

# How a file is made, and whether its objects record times in the first place.
MADE = {
    "old headers": {"libver": "earliest"},
    "new headers": {"libver": "latest"},
    "new headers behind a user block": {"libver": "latest", "userblock_size": 1024},
    "old headers behind a user block": {"libver": "earliest", "userblock_size": 512},
    "paged": {"libver": "latest", "fs_strategy": "page", "fs_persist": True},
}


def build(path: Path, **options) -> Path:
    values = np.random.default_rng(0).normal(size=(20, 4)).astype("f4")
    with h5py.File(path, "w", **options) as file:
        group = file.create_group("layer/inner")
        for name in ("gzip", "many"):
            group.create_dataset(name, data=values, chunks=(7, 3), compression="gzip", track_times=True)
        group["gzip"].attrs["note"] = 1.5
        # So many attributes that a header of version 1 goes on elsewhere.
        for i in range(12):
            group["many"].attrs[f"note{i}"] = np.full(20, i)
        group.create_dataset("unallocated", (9,), "f4", track_times=True)
        raw = path.with_suffix(".raw")
        group.create_dataset("external", data=values, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
        file["alias"] = group["external"]
    return path


def a_second_later() -> None:
    now = int(time.time())
    while int(time.time()) == now:
        time.sleep(0.01)


@pytest.mark.parametrize("made", MADE)
def test_replays_are_identical_byte_for_byte_whenever_they_are_made(tmp_path, made):
    source = build(tmp_path / "a.h5", **MADE[made])
    with h5py.File(source, "r") as file:
        assert file["layer/inner/gzip"].id.get_create_plist().get_obj_track_times()
    a_second_later()
    record = ckptflip.inject(source, out=tmp_path / "b.h5", tensors="layer*", ber=0.1, seed=1)
    assert record.header.counts.tensors == 4
    a_second_later()
    ckptflip.replay(record, source, out=tmp_path / "c.h5")
    assert (tmp_path / "c.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "c.h5", "r") as file:  # the checksums of its headers are right
        assert len(file["layer/inner/many"].attrs) == 12 and file["alias"].shape == (20, 4)


@pytest.mark.parametrize("made", MADE)
def test_without_keeping_them_times_would_change(tmp_path, made):
    """What the other test would miss if the library stamped nothing."""
    seen = set()
    for keep in (True, False):
        path = build(tmp_path / f"{keep}.h5", **MADE[made])
        before = path.read_bytes()
        a_second_later()
        if keep:
            with kept_times(path, [b"layer/inner/gzip"]):
                write_the_same(path)
        else:
            write_the_same(path)
        seen.add((keep, path.read_bytes() == before))
    assert (False, True) not in seen
    assert made == "paged" or (True, True) in seen


def write_the_same(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        dataset = file["layer/inner/gzip"]
        dataset[...] = dataset[...]
        dataset.attrs["note"] = dataset.attrs["note"]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [(b"", 0xDEADBEEF), (b"Four score and seven years ago", 0x17770551)],
)
def test_lookup3_of_its_authors_examples(data, wanted):
    assert lookup3(data) == wanted


@pytest.mark.parametrize("length", [1, 11, 12, 13, 24, 25, 200])
def test_lookup3_is_what_the_library_stores(tmp_path, length):
    with h5py.File(tmp_path / "a.h5", "w", libver="latest") as file:
        file.create_dataset("x" * length, data=np.arange(length))
    raw = (tmp_path / "a.h5").read_bytes()
    # The superblock of version 3: 44 bytes and their checksum.
    assert lookup3(raw[:44]) == int.from_bytes(raw[44:48], "little")
    at, found = -1, 0
    while (at := raw.find(b"OHDR\x02", at + 1)) >= 0:
        flags = raw[at + 5]
        size = at + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        end = size + (1 << (flags & 3)) + int.from_bytes(raw[size : size + (1 << (flags & 3))], "little")
        assert lookup3(raw[at:end]) == int.from_bytes(raw[end : end + 4], "little")
        found += 1
    assert found == 2
