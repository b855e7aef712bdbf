"""Checkpoints of several files: copied under another name all together, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints import container, files
from ckptflip.checkpoints.container import flipped_name
from ckptflip.errors import CheckpointError, UsageError

zarr = pytest.importorskip("zarr")
safetensors = pytest.importorskip("safetensors.numpy")


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index."""
    where = {}
    for i in (1, 2):
        file = f"model-0000{i}-of-00002.safetensors"
        safetensors.save_file({f"w{i}": np.full(9, i, "f4")}, tmp_path / file)
        where[f"w{i}"] = file
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = zarr.open_group(tmp_path / "m.zarr", mode="w", zarr_format=3)
    root.create_array("w", data=np.ones((4, 4), "f4"), chunks=(2, 4), compressors=None)
    (tmp_path / "m.zarr" / "notes.txt").write_text("kept")
    return tmp_path / "m.zarr"


def test_names_of_altered_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.pt").touch()
    for name, expected in (
        ("a.pt", "a.flipped.pt"),
        ("folder", "folder.flipped"),
        ("ckpt-5", "ckpt-5.flipped"),
        ("ckpt-5.index", "ckpt-5.flipped.index"),
        ("m.weights.json", "m.flipped.weights.json"),
        ("m.safetensors.index.json", "m.flipped.safetensors.index.json"),
    ):
        assert flipped_name(tmp_path / name).name == expected


def test_shards_in_the_same_folder_get_names_of_their_own(shards: Path) -> None:
    before = {p: p.read_bytes() for p in shards.parent.iterdir()}
    record = ckptflip.inject(shards, out=shards.with_name("bad.safetensors.index.json"), count=3, seed=1)
    assert all(p.read_bytes() == data for p, data in before.items())
    assert names(shards.parent) - {p.name for p in before} == {
        "bad-00001-of-00002.safetensors",
        "bad-00002-of-00002.safetensors",
        "bad.safetensors.index.json",
        "bad.safetensors.index.json.flips.jsonl",
    }
    index = json.loads(shards.with_name("bad.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "bad-00001-of-00002.safetensors",
        "bad-00002-of-00002.safetensors",
    }
    assert sum(r.bits for r in ckptflip.diff(shards, shards.with_name("bad.safetensors.index.json"))) == 3
    assert record.header.size == sum(len(d) for d in before.values())


def test_shards_in_another_folder_keep_theirs(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / shards.name
    ckptflip.inject(shards, out=out, count=1, seed=1, record=tmp_path / "r.jsonl")
    assert names(tmp_path / "other") == {p.name for p in shards.parent.iterdir() if "model" in p.name}
    assert out.read_bytes() == shards.read_bytes()


@pytest.mark.parametrize("existing", ["bad-00001-of-00002.safetensors", "bad.safetensors.index.json"])
def test_what_is_in_the_way_is_not_replaced(shards: Path, existing: str) -> None:
    shards.with_name(existing).write_text("mine")
    before = {p: p.read_bytes() for p in shards.parent.iterdir()}
    with pytest.raises(UsageError, match=f"{existing} exists"):
        ckptflip.inject(shards, out=shards.with_name("bad.safetensors.index.json"), seed=1)
    assert {p: p.read_bytes() for p in shards.parent.iterdir()} == before
    ckptflip.inject(shards, out=shards.with_name("bad.safetensors.index.json"), seed=1, overwrite=True)
    assert shards.with_name(existing).read_bytes() != b"mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_files_appear_or_none(
    shards: Path, monkeypatch: pytest.MonkeyPatch, failing: int, overwrite: bool
) -> None:
    """The disk fails when one of the three files gets its name."""
    out = shards.with_name("bad.safetensors.index.json")
    if overwrite:
        ckptflip.inject(shards, out=out, seed=9)
    before = {p: p.read_bytes() for p in shards.parent.iterdir()}
    calls = [0]
    for name in ("_publish", "_replace"):
        real = getattr(files, name)

        def fail(*given, _real=real, **more):
            calls[0] += 1
            if calls[0] == failing + 1:
                raise OSError(5, "Input/output error")
            return _real(*given, **more)

        monkeypatch.setattr(files, name, fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        ckptflip.inject(shards, out=out, seed=1, overwrite=overwrite, record=shards.with_name("r.jsonl"))
    assert {p: p.read_bytes() for p in shards.parent.iterdir()} == before


def test_a_folder_is_copied_whole(folder: Path, tmp_path: Path) -> None:
    ckptflip.inject(folder, out=tmp_path / "bad.zarr", count=2, seed=1)
    assert names(tmp_path / "bad.zarr") == names(folder)
    assert (tmp_path / "bad.zarr" / "notes.txt").read_text() == "kept"
    assert not any(p.name.endswith(".tmp") for p in tmp_path.iterdir())


def test_a_folder_in_the_way(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.zarr").mkdir()
    with pytest.raises(UsageError, match=r"bad\.zarr exists"):
        ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)
    for seed in (1, 2):  # an empty folder, and then an old checkpoint, may be replaced
        record = ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=seed, overwrite=True)
        assert names(tmp_path / "bad.zarr") == names(folder)
        assert [r.bits for r in ckptflip.diff(folder, tmp_path / "bad.zarr")] == [record.bits_effective]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file, and the checkpoint a folder"):
        ckptflip.inject(folder, out=tmp_path / "file", seed=1, overwrite=True)


def test_a_folder_into_itself(folder: Path) -> None:
    before = names(folder)
    for out in (folder / "below", folder):
        with pytest.raises(UsageError):
            ckptflip.inject(folder, out=out, seed=1, overwrite=True)
    assert names(folder) == before


def test_a_folder_of_other_things_is_never_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.tex").write_text("years of work")
    (tmp_path / "runs" / "step.zarr").parent.mkdir()
    folder.rename(tmp_path / "runs" / "step.zarr")
    folder = tmp_path / "runs" / "step.zarr"
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out, hint in (
        (tmp_path / "results", "is a folder, but no checkpoint"),
        (tmp_path / "runs", "holds, or lies in, the checkpoint itself"),
        (tmp_path, "holds, or lies in, the checkpoint itself"),
    ):
        with pytest.raises(UsageError, match=hint):
            ckptflip.inject(folder, out=out, seed=1, overwrite=True, record=tmp_path.parent / "r.jsonl")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    ckptflip.inject(folder, out=tmp_path / "old.zarr", seed=1)
    monkeypatch.chdir(tmp_path / "old.zarr")
    with pytest.raises(UsageError, match="working directory"):
        ckptflip.inject(folder, out=tmp_path / "old.zarr", seed=1, overwrite=True)


def test_a_link_to_a_folder_stays_a_link(folder: Path, tmp_path: Path) -> None:
    coded = zarr.open_group(tmp_path / "coded.zarr", mode="w", zarr_format=3)
    coded.create_array("w", data=np.ones((4, 4), "f4"), chunks=(2, 4))
    for target in (folder, tmp_path / "coded.zarr"):
        link = tmp_path / f"link-{target.name}"
        link.symlink_to(target.name)
        before = ckptflip.scan(target)
        record = ckptflip.inject(link, in_place=True, bits="critical", seed=1)
        assert link.is_symlink() and not target.is_symlink()
        assert ckptflip.scan(target) != before
        assert record.path is not None
        ckptflip.undo(link, record.path)
        assert link.is_symlink() and ckptflip.scan(target) == before


def test_a_folder_that_may_only_be_read_is_copied(folder: Path, tmp_path: Path) -> None:
    for each in (*folder.rglob("*"), folder):
        each.chmod(0o555 if each.is_dir() else 0o444)
    ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)
    modes = {(p.stat().st_mode & 0o777) for p in (tmp_path / "bad.zarr").rglob("*") if p.is_file()}
    assert modes == {0o444}


def test_the_working_directory_as_the_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    record = ckptflip.inject(".", seed=1)
    assert record.header.output == "m.zarr.flipped" and (tmp_path / "m.zarr.flipped").is_dir()
    assert ckptflip.inject("../m.zarr", in_place=True, seed=1).bits_effective == 1


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a.keras", "a.pt"])
def test_a_name_that_promises_another_format(shards: Path, name: str) -> None:
    source = shards.with_name("model-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match="ckptflip convert"):
        ckptflip.inject(source, out=shards.with_name(name), seed=1)
    assert not shards.with_name(name).exists()
    ckptflip.inject(source, out=shards.with_name("a.weights"), seed=1)


def test_links_that_leave_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "more").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link out of the checkpoint's folder"):
        ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)
    assert not (tmp_path / "bad.zarr").exists()
    (folder / "more").unlink()
    (folder / "more").symlink_to("notes.txt")
    ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)
    assert (tmp_path / "bad.zarr" / "more").readlink() == Path("notes.txt")


def test_a_link_under_the_new_name_is_replaced_not_followed(shards: Path, tmp_path: Path) -> None:
    """As in a cache whose files are known by their contents, and others link to them."""
    source, precious = shards.with_name("model-00001-of-00002.safetensors"), tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out.safetensors").symlink_to(precious)
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "nothing")
    for name in ("out.safetensors", "nowhere.safetensors"):
        with pytest.raises(UsageError, match="exists"):
            ckptflip.inject(source, out=tmp_path / name, seed=1)
        ckptflip.inject(source, out=tmp_path / name, seed=1, overwrite=True)
        assert not (tmp_path / name).is_symlink()
    assert precious.read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_link_to_itself_in_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="or to nothing"):
        ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)


def test_only_a_record_of_ones_own_is_taken_back(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is faster, and writes the record first."""
    record = tmp_path / "bad.safetensors.flips.jsonl"
    real = files.copy

    def copy(*given) -> None:
        record.write_text("theirs")
        real(*given)

    monkeypatch.setattr(container.files, "copy", copy)
    source = shards.with_name("model-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match="exists"):
        ckptflip.inject(source, out=tmp_path / "bad.safetensors", seed=1)
    assert record.read_text() == "theirs" and not (tmp_path / "bad.safetensors").exists()


def test_a_failed_copy_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.files, "copy", full)
    with pytest.raises(CheckpointError, match="No space left"):
        ckptflip.inject(folder, out=tmp_path / "bad.zarr", seed=1)
    assert [p.name for p in tmp_path.iterdir()] == ["m.zarr"]


def test_the_digest_of_several_files_is_that_of_all(shards: Path) -> None:
    record = ckptflip.inject(shards, in_place=True, count=2, seed=1)
    assert record.header.digest_before is not None and record.path is not None
    done = ckptflip.undo(shards, record.path)
    assert done.digest_matches is True
    data = bytearray(shards.with_name("model-00001-of-00002.safetensors").read_bytes())
    ckptflip.inject(shards, in_place=True, count=1, seed=1, overwrite=True, tensors="w2")
    data[-1] ^= 1
    shards.with_name("model-00001-of-00002.safetensors").write_bytes(data)
    assert ckptflip.undo(shards, record.path).digest_matches is False
