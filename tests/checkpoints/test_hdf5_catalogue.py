"""What the HDF5 walker finds: every layout, type and link, by storage."""

import h5py
import hdf5_zoo as zoo
import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints.hdf5 import walker
from ckptflip.errors import CheckpointError, SelectionError

FORMS = {
    "earliest": {"libver": "earliest"},
    "latest": {"libver": "latest"},
    "user block": {"libver": "latest", "userblock_size": 1024},
    "creation order": {"track_order": True},
}


@pytest.fixture(params=FORMS, ids=lambda name: name.replace(" ", "-"))
def file(request, tmp_path):
    return zoo.build(tmp_path / "zoo.h5", **FORMS[request.param])


def catalogue(path):
    with ckptflip.opened(path) as target:
        return {t.name: t for t in target.tensors}, {s.name: s.reason for s in target.skipped}


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return path


def test_every_tensor_is_found_with_shape_dtype_and_layout(file):
    tensors, _ = catalogue(file)
    assert {n: (t.shape, t.dtype, t.layout) for n, t in tensors.items()} == zoo.TENSORS


def test_everything_else_is_left_out_with_the_reason(file):
    _, skipped = catalogue(file)
    assert {n: n in skipped and zoo.SKIPPED[n] in skipped[n] for n in zoo.SKIPPED} == dict.fromkeys(
        zoo.SKIPPED, True
    )
    assert set(skipped) == set(zoo.SKIPPED)


def test_every_name_of_a_storage_is_one_tensor(tmp_path):
    tensors, _ = catalogue(zoo.build(tmp_path / "zoo.h5"))
    assert {n: set(t.aliases) for n, t in tensors.items() if t.aliases} == zoo.ALIASES


def test_offsets_point_at_the_first_byte(file):
    tensors, _ = catalogue(file)
    with h5py.File(file) as opened:
        raw = file.read_bytes()
        flat = [t for t in tensors.values() if t.offset is not None]
        for tensor in flat:
            name, field = zoo._dataset_of(opened, tensor.name)
            if not field:
                stored = zoo.raw_bytes(opened[name].id)
                assert raw[tensor.offset : tensor.offset + len(stored)] == stored, tensor.name
    assert {t.layout for t in flat} == {"contiguous"}
    assert len(flat) > 20


def test_reading_every_word_gives_what_h5py_reads(file):
    with ckptflip.opened(file) as target, h5py.File(file, locking=False) as opened:
        for i, tensor in enumerate(target.tensors):
            name, field = zoo._dataset_of(opened, tensor.name)
            raw = np.frombuffer(zoo.raw_bytes(opened[name].id), opened[name].dtype)
            for part in field.split(".") if field else ():
                raw = raw[part]
            words = np.ascontiguousarray(raw).view(f"{tensor.order}u{tensor.number.word_size}").reshape(-1)
            every = target.read(i, np.arange(tensor.words))
            assert every.dtype.isnative and every.tolist() == words.tolist(), tensor.name
            blocks = [b.tolist() for b in target.blocks(i)]
            assert [w for b in blocks for w in b] == words.tolist(), tensor.name


@pytest.mark.parametrize("block", [16, 100, 4096])
def test_blocks_of_any_size_give_the_same_words(tmp_path, monkeypatch, block):
    path = zoo.build(tmp_path / "zoo.h5")
    monkeypatch.setattr("ckptflip.checkpoints.hdf5.target._BLOCK_BYTES", block)
    with ckptflip.opened(path) as target:
        for i, tensor in enumerate(target.tensors):
            whole = target.read(i, np.arange(tensor.words)).tolist()
            assert [w for b in target.blocks(i) for w in b.tolist()] == whole, tensor.name


def test_a_field_and_a_dataset_of_the_same_name_are_told_apart(tmp_path):
    path = write(tmp_path / "a.h5", **{"c": np.zeros(4, [("a", "f4")]), "c.a": np.ones(9, "f4")})
    tensors, _ = catalogue(path)
    assert {n: t.shape for n, t in tensors.items()} == {"c.a": (9,), "c.a~2": (4,)}
    record = ckptflip.inject(path, in_place=True, count=40, seed=1)
    assert {e.name for e in record.header.tensors} == {"c.a", "c.a~2"}
    assert ckptflip.undo(path, record.path).digest_matches


def test_a_soft_link_through_an_external_link_is_no_alias(tmp_path):
    """Both files are laid out alike, so that the two datasets have the same address."""
    write(tmp_path / "other.h5", x=np.ones(9, "f4"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(9, "f4")
        file["out"] = h5py.ExternalLink("other.h5", "/x")
        file["s"] = h5py.SoftLink("/out")
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert tensors["x"].aliases == ()
    assert set(skipped) == {"out", "s"}


def test_compounds_with_variable_length_text_are_left_alone(tmp_path):
    """The library says where their fields lie in memory; on disk they lie elsewhere."""
    data = np.empty(3, [("v", "f4"), ("s", h5py.string_dtype()), ("w", "f4")])
    data["v"], data["s"], data["w"] = [1, 2, 3], ["a", "bb", "c"], [4, 5, 6]
    write(tmp_path / "a.h5", c=data, x=np.ones(3))
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert set(tensors) == {"x"} and "variable-length" in skipped["c"]


def test_object_references_in_compounds_survive(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["t"] = 1.0
        data = np.empty(3, [("v", "f4"), ("r", h5py.ref_dtype)])
        data["v"], data["r"] = [1, 2, 3], file["t"].ref
        file.create_dataset("c", data=data, chunks=(2,), compression="gzip")
    record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "b.h5", tensors="c", count=5, seed=1)
    with h5py.File(tmp_path / "b.h5") as file:
        assert [file[r].name for r in file["c"]["r"]] == ["/t"] * 3
        words = file["c"]["v"].astype("f4").view("u4").tolist()
    before = np.array([1, 2, 3], "f4").view("u4").tolist()
    assert sum((a ^ b).bit_count() for a, b in zip(before, words, strict=True)) == record.bits_effective == 5


def test_groups_that_hold_each_other_end(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/x"] = np.ones(2)
        file["b/y"] = np.ones(2)
        file["a/b"], file["b/a"], file["a/root"] = file["b"], file["a"], file["/"]
    tensors, _ = catalogue(tmp_path / "a.h5")
    assert len(tensors) == 2
    assert len({n for t in tensors.values() for n in (t.name, *t.aliases)}) >= 3


def test_a_soft_link_in_a_circle_is_dangling(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(2)
        file["p"], file["q"] = h5py.SoftLink("/q"), h5py.SoftLink("/p")
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert set(tensors) == {"x"} and skipped == {"p": "a dangling link", "q": "a dangling link"}


def test_too_many_aliases_are_cut_short_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(walker, "_MOST_ALIAS_VISITS", 50)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["g0/x"] = np.ones(2)
        for i in range(1, 8):
            for name in "ab":
                file[f"g{i}/{name}"] = file[f"g{i - 1}"]
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert len(tensors) == 1
    assert any("more aliases than can be listed" in reason for reason in skipped.values())


def test_very_deep_groups_are_cut_off_and_said(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["/".join("g" * 210) + "/x"] = 1.0
        file["y"] = 1.0
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert set(tensors) == {"y"}
    assert ["nested more than" in r for r in skipped.values()] == [True]


def test_wide_floats_and_odd_integers_are_left_out(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if np.finfo(np.longdouble).bits > 64:
            file["long"] = np.ones(2, np.longdouble)
        kind = h5py.h5t.STD_I32LE.copy()
        kind.set_precision(20)
        h5py.h5d.create(file.id, b"narrow", kind, h5py.h5s.create_simple((3,)))
    tensors, skipped = catalogue(tmp_path / "a.h5")
    assert tensors == {}
    assert ("unusual width" in skipped["narrow"]) and "no IEEE layout" in skipped.get(
        "long", "no IEEE layout"
    )


def test_an_attribute_that_names_another_width_is_not_believed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["u4"] = np.zeros(3, "u4")
        file["i2"] = np.zeros(3, "i2")
        file["u2"] = np.zeros(3, "u2")
        for name, claim in (("u4", "bfloat16"), ("i2", "bfloat16"), ("u2", "nonsense")):
            file[name].attrs["dtype"] = claim
    tensors, _ = catalogue(tmp_path / "a.h5")
    assert {n: t.dtype for n, t in tensors.items()} == {"u4": "uint32", "i2": "int16", "u2": "uint16"}


def test_external_data_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    outside = tmp_path / "outside.raw"
    with h5py.File(tmp_path / "in" / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(4, dtype="f4"), external=[(str(outside), 0, 16)])
    before = outside.read_bytes()
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        ckptflip.inject(tmp_path / "in" / "a.h5", in_place=True, seed=1)
    assert outside.read_bytes() == before
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["a.h5"]


def test_an_element_across_two_external_files_is_refused(tmp_path):
    files = [tmp_path / "1.raw", tmp_path / "2.raw"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        segments = [(str(files[0]), 0, 6), (str(files[1]), 0, 18)]
        file.create_dataset("x", data=np.arange(6, dtype="f4"), external=segments)
    with files[0].open("ab") as file:
        file.write(b"not of this dataset")
    before = [f.read_bytes() for f in files]
    with pytest.raises(CheckpointError, match="two external files"):
        ckptflip.inject(tmp_path / "a.h5", in_place=True, count=192, seed=1)
    assert [f.read_bytes() for f in files] == before


def test_external_data_that_is_missing_is_said(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", shape=(6,), dtype="f4", external=[(str(tmp_path / "gone.raw"), 0, 24)])
    with pytest.raises(CheckpointError, match=r"x cannot be read: .*gone\.raw|gone\.raw cannot be read"):
        ckptflip.inject(tmp_path / "a.h5", in_place=True, seed=1)


def test_external_in_place_alters_the_external_files_and_a_copy_holds_the_data(tmp_path):
    raw = tmp_path / "x.raw"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(6, dtype="f4"), external=[(str(raw), 0, 24)])
        file["x"].attrs["unit"] = "m"
        file["other/name"] = file["x"]
    before, h5_before = raw.read_bytes(), (tmp_path / "a.h5").read_bytes()
    copied = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / "b.h5", count=9, seed=3)
    assert raw.read_bytes() == before
    with h5py.File(tmp_path / "b.h5") as file:
        inside = file["x"][()].tobytes()
        assert file["x"].external is None and file["x"].attrs["unit"] == "m"
        assert file["other/name"][()].tobytes() == inside
    assert zoo.popcount_between(inside, before) == 9
    placed = ckptflip.inject(tmp_path / "a.h5", in_place=True, count=9, seed=3)
    assert raw.read_bytes() == inside and (tmp_path / "a.h5").read_bytes() == h5_before
    assert placed.bits_effective == copied.bits_effective == 9
    ckptflip.undo(tmp_path / "a.h5", placed.path)
    ckptflip.undo(tmp_path / "b.h5", copied.path)
    assert raw.read_bytes() == before
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["x"][()].tobytes() == before


def test_data_said_to_lie_beyond_the_end_is_never_altered(tmp_path):
    """An offset in the file's index points past its end. Newer HDF5 refuses the file, older do not look."""
    path = write(tmp_path / "a.h5", x=np.arange(64, dtype="f8"), y=np.ones(2))
    with h5py.File(path) as file:
        offset = file["x"].id.get_offset()
    raw = bytearray(path.read_bytes())
    at = raw.index(offset.to_bytes(8, "little"))
    raw[at : at + 8] = (len(raw) - 100).to_bytes(8, "little")
    path.write_bytes(raw)
    try:
        tensors, skipped = catalogue(path)
        assert set(tensors) == {"y"} and "damaged: its data would end at byte" in skipped["x"]
    except CheckpointError as why:
        assert "damaged HDF5" in str(why)
    with pytest.raises((CheckpointError, SelectionError)):
        ckptflip.inject(path, in_place=True, tensors="x", seed=1)
    assert path.read_bytes() == raw
