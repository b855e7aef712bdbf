"""Locks, new files, copies, epochs, formats, and words at byte offsets."""

import fcntl
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.checkpoints import files, patch
from ckptflip.checkpoints.epochs import is_many, pick
from ckptflip.checkpoints.registry import HDF5_SIGNATURE, find
from ckptflip.errors import CheckpointError, InUseError, UsageError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_readers_share_a_lock_and_writers_do_not(path):
    with files.locked(path, exclusive=False):
        with files.locked(path, exclusive=False):
            pass
        with pytest.raises(InUseError), files.locked(path, exclusive=True):
            pass
    with files.locked(path, exclusive=True), pytest.raises(InUseError), files.locked(path, exclusive=False):
        pass


def test_a_file_system_without_locks(path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.locked(path, exclusive=True):
        pass


def test_a_new_file_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with files.new_file(out, overwrite=False) as temporary:
        temporary.write_text("new")
        assert not out.exists()
    assert out.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), files.new_file(out, overwrite=True) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert out.read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_a_new_file_has_the_usual_permissions_or_those_of_another(tmp_path):
    mask = os.umask(0o027)
    try:
        with files.new_file(tmp_path / "plain", overwrite=False):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o640
    (tmp_path / "model").write_text("")
    (tmp_path / "model").chmod(0o604)
    with files.new_file(tmp_path / "like", overwrite=False, like=tmp_path / "model"):
        pass
    assert (tmp_path / "like").stat().st_mode & 0o777 == 0o604


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with files.new_file(tmp_path / "out", overwrite=False) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "out").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [0, 1, 1000, 5000])
def test_a_copy_is_the_same_and_tells_its_progress(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "_COPY_STEP", 999)
    (tmp_path / "a").write_bytes(os.urandom(size))
    told = []
    files.copy(tmp_path / "a", tmp_path / "b", told.append)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert sum(told) == size and len(told) == -(-size // 999)


def test_digests_of_large_files_are_left_out(path):
    assert files.digest(path, limit=10) is None
    assert files.digest(path) == files.digest(path, limit=None)
    assert str(files.digest(path)).startswith("sha256:")


@pytest.mark.parametrize("at", [0, 512, 1024, 65536])
def test_hdf5_is_found_behind_a_user_block(tmp_path, at):
    path = tmp_path / "named.pt"
    path.write_bytes(b"#" * at + HDF5_SIGNATURE + bytes(100))
    assert find(path).name == "hdf5"
    path.write_bytes(b"#" * (at + 1) + HDF5_SIGNATURE + bytes(100))
    with pytest.raises(CheckpointError):
        find(path)


class TestEpochs:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in (
            "epoch_001.h5",
            "epoch_002.h5",
            "epoch_010.h5",
            "notes.txt",
            "epoch_003.flipped.h5",
            "model.h5",
        ):
            (tmp_path / name).write_text("")
        (tmp_path / "epoch_002.h5.flips.jsonl").write_text("")
        return tmp_path

    def test_from_a_folder(self, folder):
        assert pick(folder, 2) == folder / "epoch_002.h5"
        assert pick(folder, 10) == folder / "epoch_010.h5"

    @pytest.mark.parametrize(
        "pattern", ["epoch_{epoch:03d}.h5", "epoch_{epoch:3d}.h5", "{epoch}.h5", "{epoch:d}/{epoch}"]
    )
    def test_from_a_pattern(self, tmp_path, pattern):
        path = tmp_path / pattern.format(epoch=7)
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        assert is_many(tmp_path / pattern)
        assert pick(tmp_path / pattern, 7) == path

    @pytest.mark.parametrize(
        ("epoch", "error", "message"),
        [
            (None, UsageError, r"--epoch N \(there are epochs 1-2, 10\)"),
            (-1, UsageError, "0 or more"),
            (3, CheckpointError, "no checkpoint of epoch 3; there are epochs 1-2, 10"),
        ],
    )
    def test_what_cannot_be_picked(self, folder, epoch, error, message):
        with pytest.raises(error, match=message):
            pick(folder, epoch)

    def test_two_of_one_epoch(self, folder):
        (folder / "other-2.keras").write_text("")
        with pytest.raises(CheckpointError, match=r"several of epoch 2 \(epoch_002.h5, other-2.keras\)"):
            pick(folder, 2)

    def test_a_folder_without_any(self, tmp_path):
        with pytest.raises(CheckpointError, match="nothing in it is named after an epoch"):
            pick(tmp_path, 1)

    def test_a_pattern_without_an_epoch_and_with_a_missing_one(self, tmp_path):
        with pytest.raises(UsageError, match="is a pattern: say which epoch"):
            pick(tmp_path / "e{epoch}.h5", None)
        with pytest.raises(CheckpointError, match=r"e5\.h5 does not exist"):
            pick(tmp_path / "e{epoch}.h5", 5)

    def test_a_plain_file_is_not_many(self, folder):
        assert not is_many(folder / "model.h5") and is_many(folder)


@given(st.data())
def test_words_at_any_offsets(tmp_path_factory, data):
    """Against the plain definition, for any gaps between words and any size of batches."""
    size = data.draw(st.sampled_from((1, 2, 4, 8)))
    order = data.draw(st.sampled_from("<>"))
    steps = data.draw(st.lists(st.integers(size, 60), min_size=1, max_size=30))
    offsets = np.cumsum([data.draw(st.integers(0, 50)), *steps[1:]]).astype(np.int64)
    masks = np.array([data.draw(st.integers(0, 256**size - 1)) for _ in offsets], np.uint64)
    path = tmp_path_factory.mktemp("words") / "a"
    content = np.random.default_rng(size).integers(0, 256, 2000, dtype="u1").tobytes()
    path.write_bytes(content)
    wanted = bytearray(content)
    for at, mask in zip(offsets.tolist(), masks.tolist(), strict=True):
        name = "little" if order == "<" else "big"
        word = int.from_bytes(wanted[at : at + size], name) ^ mask
        wanted[at : at + size] = word.to_bytes(size, name)
    kind = np.dtype(f"{order}u{size}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch, "_GAP", data.draw(st.sampled_from((0, 20, 4096))))
        patched.setattr(patch, "_SPAN_LIMIT", data.draw(st.sampled_from((64, 1 << 22))))
        patched.setattr(patch, "_BATCH_BYTES", data.draw(st.sampled_from((16, 1 << 24))))
        fd = os.open(path, os.O_RDWR)
        before = patch.read_words(fd, kind, offsets)
        patch.xor_words(fd, kind, offsets, masks)
        after = patch.read_words(fd, kind, offsets)
        os.close(fd)
    assert path.read_bytes() == bytes(wanted)
    assert after.dtype.isnative and (before ^ after).tolist() == masks.tolist()


def test_words_beyond_the_end_or_on_top_of_each_other(path):
    size = path.stat().st_size
    before = path.read_bytes()
    kind = np.dtype("<u4")
    fd = os.open(path, os.O_RDWR)
    for offsets, message in (
        ([0, size - 3], "beyond the end of the file"),
        ([size + 10_000_000], "beyond the end of the file"),
        ([8, 10], "overlapping"),
        ([-4], "negative"),
    ):
        with pytest.raises(CheckpointError, match=message):
            patch.xor_words(fd, kind, np.array(offsets, np.int64), np.ones(len(offsets), np.uint64))
    os.close(fd)
    assert path.read_bytes() == before


def test_all_patches_or_none(path, tmp_path):
    other = tmp_path / "b.bin"
    other.write_bytes(bytes(100))
    fine = patch.Patch(str(path), np.dtype("u1"), np.array([5, 900], np.int64), np.array([1, 2], np.uint8))
    for broken in (
        patch.Patch(str(other), np.dtype("u1"), np.array([5, 900], np.int64), np.array([1, 2], np.uint8)),
        patch.Patch(str(tmp_path / "gone"), np.dtype("u1"), np.array([5], np.int64), np.array([1], np.uint8)),
    ):
        before = path.read_bytes(), other.read_bytes()
        with pytest.raises(CheckpointError):
            patch.apply_patches([fine, broken])
        assert (path.read_bytes(), other.read_bytes()) == before
