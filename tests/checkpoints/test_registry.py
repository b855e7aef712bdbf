"""Which format a name stands for; formats of other packages; what is said of what is none."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import ckptflip
from ckptflip.bits import lookup
from ckptflip.checkpoints.epochs import is_many, pick
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.pieces import contiguous
from ckptflip.checkpoints.registry import find
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor
from ckptflip.testing import CheckpointContract


class Mine:
    """A format of another package: eight letters, then float32 numbers."""

    @staticmethod
    def recognises(path: Path, head: bytes) -> bool:
        return head.startswith(b"MYFORMAT")

    @staticmethod
    def open_checkpoint(path: Path) -> LaidOut:
        number = lookup("float32")
        shape = ((path.stat().st_size - 8) // 4,)
        return LaidOut(path, "mine", [path], [Tensor("w", shape, number)], [contiguous(0, 8, number, shape)])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somebodys_package")
    module.FORMAT = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    entry = importlib.metadata.EntryPoint("mine", "somebodys_package:FORMAT", "ckptflip.formats")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == "ckptflip.formats" else []
    )


@pytest.mark.usefixtures("registered")
class TestAFormatOfAnotherPackage(CheckpointContract):
    def write(self, folder: Path) -> Path:
        data = np.random.default_rng(0).standard_normal(50).astype("<f4")
        (folder / "model.mine").write_bytes(b"MYFORMAT" + data.tobytes())
        return folder / "model.mine"

    def load(self, path: Path):  # type: ignore[no-untyped-def]
        return {"w": np.frombuffer(path.read_bytes()[8:], "<u4")}


def test_an_entry_point_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("broken", "no_such_package:FORMAT", "ckptflip.formats")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    (tmp_path / "a").write_bytes(b"MYFORMAT")
    with pytest.raises(CheckpointError, match="'broken' cannot be loaded: No module named"):
        find(tmp_path / "a")


def zipped(path: Path, *names: str) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return path


def test_zips_are_told_apart_by_their_members(tmp_path: Path) -> None:
    for name, format_name in (
        ("model.weights.h5", "keras"),
        ("archive/data.pkl", "pytorch"),
        ("w.npy", "npz"),
    ):
        assert find(zipped(tmp_path / "any.zip", name, "other")).name == format_name
    with pytest.raises(CheckpointError, match="a zip that no framework wrote"):
        find(zipped(tmp_path / "any.zip", "letter.txt"))


@pytest.mark.parametrize(
    ("name", "data", "hint"),
    [
        ("a.pt", b"\x80\x02}q\x00.", "a plain pickle"),
        ("__0_0.distcp", b"PK", "name its folder"),
        (".metadata", b"\x80\x02}.", "name its folder"),
        ("ckpt-1.data-00000-of-00001", b"\0" * 99, "name its index, .*ckpt-1.index"),
        ("a.h5", b"\0" * 99, "named like HDF5"),
        ("a.bin", b"", "is empty"),
        ("a.txt", b"some words", "looks like text"),
        ("a.json", b"{}", "looks like text"),
        ("a.index", b"\0" * 99, "tell nothing"),
    ],
)
def test_what_is_said_of_no_checkpoint(tmp_path: Path, name: str, data: bytes, hint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=hint):
        find(tmp_path / name)


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    for path, hint in (
        (tmp_path / "no.pt", "does not exist"),
        (tmp_path, "is a folder, and no checkpoint itself"),
        (Path("/dev/null"), "is not a plain file"),
    ):
        with pytest.raises(CheckpointError, match=hint):
            find(path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(CheckpointError, match="SavedModel without variables"):
        find(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.pt").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        find(tmp_path / "a.pt")


def test_epochs_of_any_format(tmp_path: Path) -> None:
    for name in ("epoch_001.pt", "epoch_002.weights.h5", "model-3.safetensors.index.json", "ckpt-5.index"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "ckpt-5.data-00000-of-00001").write_bytes(b"")
    (tmp_path / "step_4").mkdir()
    (tmp_path / "step_4" / ".metadata").write_bytes(b"")
    (tmp_path / "logs_6").mkdir()
    assert [pick(tmp_path, n).name for n in (1, 2, 3, 4, 5)] == [
        "epoch_001.pt",
        "epoch_002.weights.h5",
        "model-3.safetensors.index.json",
        "step_4",
        "ckpt-5.index",
    ]
    with pytest.raises(CheckpointError, match="there are epochs 1-5"):
        pick(tmp_path, 6)
    assert is_many(tmp_path) and not is_many(tmp_path / "step_4")
    assert pick(tmp_path / "ckpt-{epoch}", 5) == tmp_path / "ckpt-5"
    assert ckptflip.opened  # the verbs take what `pick` gives
