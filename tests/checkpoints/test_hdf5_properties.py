"""Over dtypes × layouts × seeds: exactly the planned bits change, undo takes them back, replay repeats them.

Files are read with h5py and as plain bytes, not with ckptflip's own reader.
"""

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import h5py
import hdf5_zoo as zoo
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.errors import CheckpointError

NUMPY = [
    *("<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "<c8", ">c8", "<c16"),
    *("i1", "<i2", "<i4", "<i8", ">i2", ">i4", ">i8", "u1", "<u2", "<u4", "<u8", ">u8", "?"),
]
# (dtype as stored, what the attribute `dtype` says it is)
NAMED = [
    *(
        ("V2", "bfloat16"),
        ("<u2", "bfloat16"),
        (">u2", "bfloat16"),
        ("V1", "float8_e4m3fn"),
        ("u1", "float8_e5m2"),
    ),
    *(("V1", "float4_e2m1fn"), ("u1", "int4"), ("V1", "float8_e8m0fnu")),
]
RAW = ("contiguous", "chunked", "fletcher32", "external")
ENCODED = ("gzip", "lzf", "shuffle", "gzip+fletcher32", "shuffle+fletcher32", "scale-offset")
LIBRARY = ("compact", "unallocated", "partial")
FILTERS = {
    "fletcher32": {"fletcher32": True},
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "shuffle": {"shuffle": True},
    "gzip+fletcher32": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "shuffle+fletcher32": {"shuffle": True, "fletcher32": True},
    "scale-offset": {"scaleoffset": 0},
}


class Case(NamedTuple):
    """One file to be made and what to do to it."""

    dtype: str
    named: str
    layout: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    content: int
    libver: str
    block: int
    bits: str
    fraction: float
    fault: str
    seed: int


@st.composite
def cases(draw, layouts=(*RAW, *ENCODED, *LIBRARY)) -> Case:
    layout = draw(st.sampled_from(layouts))
    if layout == "scale-offset":
        dtype, named = draw(st.sampled_from([d for d in NUMPY if d[-2:-1] in ("i", "u")])), ""
    else:
        dtype, named = draw(st.one_of(st.sampled_from(NUMPY).map(lambda d: (d, "")), st.sampled_from(NAMED)))
    whole = layout in ("contiguous", "compact", "unallocated", "external")
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=not whole, max_size=3)))
    return Case(
        dtype,
        named,
        layout,
        shape,
        tuple(draw(st.integers(1, n)) for n in shape),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from(("earliest", "latest"))),
        draw(st.sampled_from((0, 0, 512, 2048))),
        draw(st.sampled_from(("all", "0", "0,1", "!0"))),
        draw(st.sampled_from((0.01, 0.1, 0.3))),
        draw(st.sampled_from(("flip", "flip", "set1", "set0", "burst:2"))),
        draw(st.integers(0, 2**40)),
    )


def make(case: Case, path: Path) -> None:
    """A file with the case's dataset, neighbours on both sides, and links to it."""
    size = np.dtype(case.dtype).itemsize
    rng = np.random.default_rng(case.content)
    words = rng.integers(0, 256, (*case.shape, size), dtype=np.uint8).view(f"V{size}").reshape(case.shape)
    if case.layout == "scale-offset":
        words = rng.integers(0, 9, case.shape).astype(case.dtype)
    with h5py.File(path, "w", libver=case.libver, userblock_size=case.block) as file:
        file["before"] = rng.normal(size=5)
        dataset = _dataset(case, file, path, words)
        dataset.attrs["kept"] = np.float32(0.1)
        if case.named:
            dataset.attrs["dtype"] = case.named
        file["alias"] = dataset
        file["after"] = rng.normal(size=5)
    if case.block:
        with path.open("r+b") as file:
            file.write(b"user block " * 20)


def _dataset(case: Case, file: h5py.File, path: Path, words: np.ndarray) -> h5py.Dataset:
    if case.layout == "compact":
        zoo.compact(file, "x", words, case.dtype)
        return file["x"]
    if case.layout == "unallocated":
        return file.create_dataset("x", case.shape, case.dtype)
    if case.layout == "external":
        at = (f"{path}.raw", 3, h5py.h5f.UNLIMITED)
        return zoo.write_words(file, "x", words, case.dtype, external=[at])
    if case.layout == "contiguous":
        return zoo.write_words(file, "x", words, case.dtype)
    if case.layout == "partial":
        dataset = file.create_dataset("x", case.shape, case.dtype, chunks=case.chunk)
        first = tuple(slice(c) for c in case.chunk)
        dataset[first] = np.zeros(case.chunk, case.dtype)
        return dataset
    return zoo.write_words(file, "x", words, case.dtype, chunks=case.chunk, **FILTERS.get(case.layout, {}))


def inject(case: Case, path: Path, **where):
    try:
        return ckptflip.inject(
            path,
            tensors="x",
            bits=case.bits,
            fraction=case.fraction,
            fault=case.fault,
            seed=case.seed,
            **where,
        )
    except ckptflip.CkptflipError as why:
        # No room for two bits in a row, or a filter that keeps only so many.
        assert (
            "room for" in str(why)
            or "without overlap" in str(why)
            or (case.layout == "scale-offset" and "cannot store the altered words" in str(why))
        ), why
        assume(False)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@given(cases())
@example(Case("<f4", "", "gzip+fletcher32", (7, 5), (3, 2), 1, "latest", 512, "all", 0.1, "flip", 5))
@example(Case("V2", "bfloat16", "chunked", (9,), (4,), 2, "earliest", 512, "all", 0.1, "flip", 6))
@example(Case("<c16", "", "unallocated", (3,), (1,), 3, "latest", 512, "all", 0.1, "flip", 7))
@example(Case("u1", "", "lzf", (20,), (9,), 4, "latest", 0, "all", 0.1, "flip", 8))
@example(Case("<f4", "", "gzip+fletcher32", (5,), (5,), 4, "earliest", 0, "all", 0.1, "flip", 8))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
def test_exactly_the_planned_bits_change_and_come_back(case):
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a.h5", Path(folder) / "b.h5"
        make(case, path)
        record = inject(case, path, out=out)
        before, after = zoo.snapshot(path), zoo.snapshot(out)
        assert popcount(before, after) == record.bits_effective
        assert after == planned(before, zoo.expected(path, record))
        assert len(record) == record.header.counts.words_hit

        replayed = Path(folder) / "c.h5"
        ckptflip.replay(record.path, path, out=replayed)
        assert replayed.read_bytes() == out.read_bytes()

        placed = Path(folder) / "d.h5"
        shutil.copy(path, placed)
        if case.layout != "external":
            second = inject(case, placed, in_place=True)
            assert zoo.snapshot(placed) == after
            assert placed.read_bytes() == out.read_bytes()
            ckptflip.undo(placed, second.path)
            assert zoo.snapshot(placed) == before

        undone = ckptflip.undo(out, record.path)
        assert undone.restored == record.header.counts.words_effective
        assert zoo.snapshot(out) == before
        if case.layout in RAW and case.layout != "external":
            assert sha(out) == sha(path) and undone.digest_matches


@given(cases(layouts=("contiguous", "chunked", "fletcher32")))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
def test_raw_layouts_differ_at_the_recorded_places_alone(case):
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "a.h5", Path(folder) / "b.h5"
        make(case, path)
        record = inject(case, path, out=out, checksum="leave")
        before, after = path.read_bytes(), out.read_bytes()
        assert zoo.popcount_between(before, after) == record.bits_effective
        entry = record.header.tensors[0]
        if entry.offset is not None:
            wanted = bytearray(before)
            kind = np.dtype(f"{'>' if entry.dtype[0] == '>' else '<'}u{entry.number.word_size}")
            words = np.frombuffer(wanted, kind, entry.number.parts * int(np.prod(entry.shape)), entry.offset)
            words[record.plan.word] ^= (record.plan.before ^ record.plan.after).astype(kind)
            assert after == bytes(wanted)


def popcount(before, after) -> int:
    """Bits that differ in the datasets of two snapshots, every storage once."""
    both = ((before[name], after[name]) for name in (b"before", b"x", b"after"))
    return sum(zoo.popcount_between(a[3], b[3]) for a, b in both)


def planned(before, changed):
    """A snapshot with other bytes in the datasets that were hit, under each of their names."""
    made = dict(before)
    # The tensor goes by the first of its names.
    assert set(changed) <= {"alias"}
    for raw in changed.values():
        for name in (b"x", b"alias"):
            made[name] = (*made[name][:3], raw, *made[name][4:])
    return made


@pytest.fixture
def file(tmp_path):
    return zoo.build(tmp_path / "zoo.h5", libver="latest")


def zoo_planned(file: Path, record):
    """The snapshot that the zoo must have after a record's faults."""
    made, changed = zoo.snapshot(file), zoo.expected(file, record)
    aliases = {name: t.aliases for t in record.header.tensors for name in [t.name]}
    for name, raw in changed.items():
        stored = name if isinstance(name, bytes) else name.encode()
        for each in (stored, *(a.encode() for a in aliases.get(str(name), ()))):
            if each in made and made[each][0] == "dataset":
                made[each] = (*made[each][:3], raw, *made[each][4:])
    if "contiguous" in changed:
        made[b"view"] = (*made[b"view"][:3], changed["contiguous"], *made[b"view"][4:])
    return made


@pytest.mark.parametrize("seed", range(4))
def test_every_layout_at_once(file, tmp_path, seed):
    out = tmp_path / "b.h5"
    before, digest = zoo.snapshot(file), sha(file)
    record = ckptflip.inject(file, out=out, ber=0.02, seed=seed)
    assert record.header.counts.tensors > 20
    assert zoo.snapshot(out) == zoo_planned(file, record)
    assert zoo.snapshot(file) == before and sha(file) == digest
    changed = zoo.expected(file, record)
    with h5py.File(file) as opened:
        total = sum(zoo.popcount_between(zoo.raw_bytes(opened[n].id), raw) for n, raw in changed.items())
    assert total == record.bits_effective == record.bits_hit
    again = tmp_path / "c.h5"
    ckptflip.replay(record, file, out=again)
    assert again.read_bytes() == out.read_bytes()
    ckptflip.undo(out, record.path)
    assert zoo.snapshot(out) == before


def test_every_layout_in_place(file):
    before = zoo.snapshot(file)
    record = ckptflip.inject(file, in_place=True, tensors="!external", ber=0.02, seed=5)
    assert zoo.snapshot(file) != before
    ckptflip.undo(file, record.path)
    assert zoo.snapshot(file) == before


def test_same_seed_same_file_and_another_seed_another(file, tmp_path):
    made = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ckptflip.inject(file, out=tmp_path / f"{name}.h5", count=50, seed=seed)
        made[name] = (tmp_path / f"{name}.h5").read_bytes()
    assert made["a"] == made["b"] != made["c"]


def test_only_touched_chunks_are_encoded_again(tmp_path):
    """gzip: all other chunks keep their stored bytes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = np.random.default_rng(0).normal(size=(40, 8)).astype("f4")
        file.create_dataset("x", data=data, chunks=(4, 8), compression="gzip", compression_opts=1)
    record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "b.h5", count=2, seed=1)
    hit = {int(w) // 32 for w in record.plan.word}

    def stored(path):
        with h5py.File(path) as file:
            return [file["x"].id.read_direct_chunk((4 * i, 0)) for i in range(10)]

    a, b = stored(tmp_path / "a.h5"), stored(tmp_path / "b.h5")
    assert {i for i in range(10) if a[i] != b[i]} == hit


def test_signalling_nans_survive_and_can_be_made(tmp_path):
    """A quiet NaN would have bit 22 set as well: a second, unasked flip."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        zoo.write_words(file, "raw", zoo.SIGNALLING, "<f4")
        zoo.write_words(file, "gz", zoo.SIGNALLING, "<f4", chunks=(2,), compression="gzip")
        zoo.write_words(file, "big", zoo.SIGNALLING.byteswap(), ">f4", chunks=(2,), shuffle=True)
        zoo.compact(file, "compact", zoo.SIGNALLING, "<f4")
    for bits in ("0", "sign", "8"):
        out = tmp_path / f"{bits}.h5"
        record = ckptflip.inject(tmp_path / "a.h5", out=out, bits=bits, fraction=1.0, seed=1)
        assert record.bits_effective == 16
        mask = {"0": 1, "sign": 1 << 31, "8": 1 << 8}[bits]
        with h5py.File(out) as file:
            for name, kind in (("raw", "<u4"), ("gz", "<u4"), ("big", ">u4"), ("compact", "<u4")):
                words = np.frombuffer(zoo.raw_bytes(file[name].id), kind)
                assert (words ^ mask).tolist() == zoo.SIGNALLING.tolist(), (name, bits)


def test_a_tied_storage_is_one_target_under_any_of_its_names(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["encoder/weight"] = np.ones(8, "f4")
        file["decoder/weight"] = file["encoder/weight"]
        file["soft"] = h5py.SoftLink("/encoder/weight")
        file["other"] = np.ones(8, "f4")
    made = []
    for i, name in enumerate(("encoder/weight", "decoder/weight", "soft")):
        record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / f"{i}.h5", tensors=name, count=200, seed=2)
        (entry,) = record.header.tensors
        assert {entry.name, *entry.aliases} == {"encoder/weight", "decoder/weight", "soft"}
        made.append((tmp_path / f"{i}.h5").read_bytes())
    assert made[0] == made[1] == made[2]
    with h5py.File(tmp_path / "0.h5") as file:
        assert np.array_equal(file["encoder/weight"][()], file["decoder/weight"][()], equal_nan=True)
        assert (file["other"][()] == 1).all()
    everything = ckptflip.inject(tmp_path / "a.h5", dry_run=True, fraction=1.0, seed=1)
    assert everything.bits_hit == 2 * 8 * 32


def test_a_record_of_one_name_fits_a_file_that_knows_another(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["w"] = np.ones(8, "f4")
        file["v"] = file["w"]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["w"] = np.ones(8, "f4")
    record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "c.h5", tensors="v", count=3, seed=1)
    assert ckptflip.replay(record, tmp_path / "b.h5", out=tmp_path / "d.h5").bits_effective == 3
    with h5py.File(tmp_path / "c.h5") as c, h5py.File(tmp_path / "d.h5") as d:
        assert c["v"][()].tobytes() == d["w"][()].tobytes()


def test_a_record_of_two_tensors_is_refused_where_they_are_one(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["v"], file["w"] = np.ones(2, "f4"), np.ones(2, "f4")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["w"] = np.ones(2, "f4")
        file["v"] = file["w"]
    before = (tmp_path / "b.h5").read_bytes()
    record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "c.h5", fraction=1.0, seed=1)
    with pytest.raises(ckptflip.CkptflipError, match="under two names"):
        ckptflip.replay(record, tmp_path / "b.h5", in_place=True)
    assert (tmp_path / "b.h5").read_bytes() == before


def test_a_filter_that_cannot_keep_an_altered_word_is_found_out(tmp_path):
    """scale-offset keeps as many bits as a chunk's range needs; what it cannot give back is not written."""
    data = np.array([np.iinfo("i8").min, np.iinfo("i8").max, 0, 1], "i8")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(4, dtype="i8"), chunks=(4,), scaleoffset=0)
        file.create_dataset("y", data=data, chunks=(4,), scaleoffset=0)
    for name in "xy":
        for bit in (0, 31, 62, 63):
            out = tmp_path / f"{name}{bit}.h5"
            try:
                record = ckptflip.inject(
                    tmp_path / "a.h5", out=out, tensors=name, bits=str(bit), count=2, seed=1
                )
            except CheckpointError as why:
                # HDF5 1.14 cannot even read what it wrote of the whole range.
                assert re.search(
                    "cannot store the altered words exactly|y: a chunk cannot be decoded", str(why)
                )
                assert not out.exists()
                continue
            with h5py.File(tmp_path / "a.h5") as a, h5py.File(out) as b:
                assert int(np.bitwise_count(a[name][()] ^ b[name][()]).sum()) == record.bits_effective == 2


def test_lossy_filters_are_left_alone(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(8, dtype="i4"), chunks=(8,), scaleoffset=4)
        file.create_dataset("y", data=np.arange(8, dtype="f4"), chunks=(8,), scaleoffset=2)
    with ckptflip.opened(tmp_path / "a.h5") as target:
        assert {s.name for s in target.skipped} == {"x", "y"} and not target.tensors
