"""What every checkpoint format must do, as tests to inherit: for this package's formats and other people's.

    class TestMyFormat(CheckpointContract):
        def write(self, folder):
            path = folder / "model.mine"
            mylibrary.save(path, {"w": numpy.ones((3, 4), "float32")})
            return path

        def load(self, path):
            return {name: as_words(array) for name, array in mylibrary.load(path).items()}

Needs pytest: ``pip install 'ckptflip[test]'``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ckptflip
from ckptflip.bits import popcount
from ckptflip.checkpoints import Checkpoint
from ckptflip.errors import InUseError
from ckptflip.faults.record import Record
from ckptflip.loaders.asking import changed, planned
from ckptflip.loaders.probes import Words

SEED = 3
COUNT = 7


class _Killed(BaseException):
    """Stands for a kill: nothing that catches errors sees it."""


class CheckpointContract:
    """Inherit from this, and say how the format's own library writes and reads.

    Attributes:
        leave_error: what the library raises when it reads a file whose stored checksums no longer fit
            (``--checksum leave``); None where it does not notice.
        exact: whether `undo` gives the original byte for byte. False only where words are stored compressed
            by a coder that need not give the same bytes twice.
        patched: whether words can be altered in place, byte for byte.
    """

    leave_error: type[Exception] | None = None
    exact: bool = True
    patched: bool = True

    def write(self, folder: Path) -> Path:
        """Write a small checkpoint with the library itself.

        Args:
            folder: an empty folder, which may hold nothing else afterwards.

        Returns:
            The checkpoint, as the library names it.
        """
        raise NotImplementedError

    def load(self, path: Path) -> Words:
        """The words of its tensors as the library reads them.

        Returns:
            Unsigned words (`ckptflip.bits.as_words`) by tensor name, for every tensor of the catalogue.
        """
        raise NotImplementedError

    def output(self, path: Path, word: str) -> Path:
        """A name of the same kind as `path`, in a new folder beside the checkpoint's."""
        folder = path.parent.with_name(f"{path.parent.name}-{word}")
        folder.mkdir(exist_ok=True)
        return folder / path.name

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        """One checkpoint, alone in its folder."""
        folder = tmp_path / "original"
        folder.mkdir()
        return self.write(folder)

    def test_names_are_unique_and_tensors_sound(self, checkpoint: Path) -> None:
        with ckptflip.opened(checkpoint) as target:
            names = [t.name for t in target.tensors]
            assert names and len(set(names)) == len(names)
            assert all(t.words == t.size * t.number.parts for t in target.tensors)
            assert set(target.files) and all(f.is_file() for f in target.files)

    def test_words_are_what_the_library_reads(self, checkpoint: Path) -> None:
        expected = self.load(checkpoint)
        with ckptflip.opened(checkpoint) as target:
            assert {t.name for t in target.tensors} == set(expected)
            for i, tensor in enumerate(target.tensors):
                words = expected[tensor.name].reshape(-1)
                assert words.size == tensor.words
                np.testing.assert_array_equal(_all_words(target, i), words, tensor.name)
                some = np.unique(np.random.default_rng(i).integers(0, max(tensor.words, 1), 9))
                if tensor.words:
                    np.testing.assert_array_equal(target.read(i, some), words[some], tensor.name)

    def test_the_library_finds_exactly_the_planned_words(self, checkpoint: Path) -> None:
        before, bytes_before = self.load(checkpoint), _contents(checkpoint.parent)
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED)
        assert record.bits_effective == COUNT
        _assert_planned(record, before, self.load(out))
        assert _contents(checkpoint.parent) == bytes_before

    def test_every_tensor_can_be_hit(self, checkpoint: Path) -> None:
        before = self.load(checkpoint)
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=4 * len(before), design="tensor", seed=SEED)
        assert len(record.header.tensors) > len(before) // 2
        _assert_planned(record, before, self.load(out))

    @pytest.mark.parametrize("checksum", ["repair", "leave"])
    def test_no_other_bit_of_any_file_changes(self, checkpoint: Path, checksum: str) -> None:
        if not self.patched:
            pytest.skip("words of this format are stored coded")
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED, checksum=checksum)
        repaired = sum((e.before ^ e.after).bit_count() for e in record.header.checksums)
        assert checksum == "repair" or not repaired
        one, other = _contents(checkpoint.parent), _contents(out.parent)
        one, other = ({k: v for k, v in c.items() if not k.endswith(".jsonl")} for c in (one, other))
        assert set(one) == set(other)
        differing = sum(
            popcount(np.frombuffer(one[k], np.uint8) ^ np.frombuffer(other[k], np.uint8)) for k in one
        )
        assert differing == record.bits_effective + repaired

    def test_what_the_library_says_of_checksums_that_were_left(self, checkpoint: Path) -> None:
        before = self.load(checkpoint)
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED, checksum="leave")
        if self.leave_error is None:
            _assert_planned(record, before, self.load(out))
        else:
            with pytest.raises(self.leave_error):
                self.load(out)

    @pytest.mark.parametrize("checksum", ["repair", "leave"])
    def test_undo_in_place(self, checkpoint: Path, checksum: str) -> None:
        before, words = _contents(checkpoint.parent), self.load(checkpoint)
        record = ckptflip.inject(checkpoint, in_place=True, count=COUNT, seed=SEED, checksum=checksum)
        assert record.path is not None
        done = ckptflip.undo(checkpoint, record.path)
        Path(record.path).unlink()
        assert done.restored == len(record)
        if self.exact:
            assert _contents(checkpoint.parent) == before
        else:
            _assert_planned(None, words, self.load(checkpoint))
            assert set(_contents(checkpoint.parent)) >= set(before)

    def test_undo_into_a_new_checkpoint(self, checkpoint: Path) -> None:
        words = self.load(checkpoint)
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED)
        assert record.path is not None
        restored = self.output(checkpoint, "restored")
        ckptflip.undo(out, record.path, out=restored)
        _assert_planned(None, words, self.load(restored))
        if self.exact:
            assert _contents(restored.parent) == _contents(checkpoint.parent)

    def test_replay_gives_the_same_faults(self, checkpoint: Path) -> None:
        out, again = self.output(checkpoint, "flipped"), self.output(checkpoint, "again")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED)
        ckptflip.replay(record, checkpoint, out=again)
        _assert_planned(None, self.load(out), self.load(again))
        if self.exact:
            one, other = (
                {k: v for k, v in _contents(p.parent).items() if not k.endswith(".jsonl")}
                for p in (out, again)
            )
            assert one == other

    def test_undo_after_a_kill_at_any_write(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not self.patched:
            pytest.skip("this format is altered through a copy, which appears whole or not at all")
        before = _contents(checkpoint.parent)
        real, left, reached = os.pwrite, [0], False
        record = checkpoint.parent.with_name("killed.jsonl")

        def pwrite(fd: int, data: Any, offset: int) -> int:
            if not left[0]:
                raise _Killed
            left[0] -= 1
            return real(fd, data, offset)

        for writes in range(200):
            left[0] = writes
            with monkeypatch.context() as patching:
                patching.setattr(os, "pwrite", pwrite)
                try:
                    ckptflip.inject(
                        checkpoint, in_place=True, count=COUNT, seed=SEED, record=record, overwrite=True
                    )
                    reached = True
                except _Killed:
                    pass
            ckptflip.undo(checkpoint, record)
            assert _contents(checkpoint.parent) == before, f"killed after {writes} writes"
            if reached:
                return
        raise AssertionError("the injection never came to its end")

    def test_diff_says_what_the_record_says(self, checkpoint: Path) -> None:
        out = self.output(checkpoint, "flipped")
        record = ckptflip.inject(checkpoint, out=out, count=COUNT, seed=SEED)
        expected = {
            record.header.tensors[tensor].name: (len(part), part.bits_effective)
            for tensor, rows in record.plan.by_tensor()
            for part in [record.plan.take(rows)]
        }
        rows = ckptflip.diff(checkpoint, out)
        assert {r.tensor: (r.words, r.bits) for r in rows if r.status != "same"} == expected
        assert all(r.status == "same" for r in ckptflip.diff(checkpoint, checkpoint))
        with ckptflip.opened(checkpoint) as target:
            floats = sum(t.number.is_float for t in target.tensors)
        assert len(ckptflip.scan(checkpoint)) == floats

    def test_a_dry_run_writes_nothing(self, checkpoint: Path) -> None:
        before = _contents(checkpoint.parent)
        ckptflip.inject(checkpoint, in_place=True, dry_run=True, count=COUNT, seed=SEED)
        ckptflip.inject(checkpoint, dry_run=True, count=COUNT, seed=SEED)
        assert _contents(checkpoint.parent) == before

    def test_a_checkpoint_in_use_is_refused(self, checkpoint: Path) -> None:
        before = _contents(checkpoint.parent)
        with ckptflip.opened(checkpoint), pytest.raises(InUseError):
            ckptflip.inject(checkpoint, in_place=True, count=COUNT, seed=SEED)
        assert _contents(checkpoint.parent) == before

    def test_the_default_name_and_its_overwriting(self, checkpoint: Path) -> None:
        first = ckptflip.inject(checkpoint, count=COUNT, seed=SEED)
        assert first.path is not None
        flipped = checkpoint.with_name(first.header.output)
        _assert_planned(first, self.load(checkpoint), self.load(flipped))
        second = ckptflip.inject(checkpoint, count=1, seed=SEED, overwrite=True)
        _assert_planned(second, self.load(checkpoint), self.load(flipped))
        assert not [p for p in checkpoint.parent.rglob("*") if p.name.endswith(".tmp")]
        shutil.rmtree(flipped) if flipped.is_dir() else None


def _all_words(target: Checkpoint, tensor: int) -> NDArray[Any]:
    blocks = list(target.blocks(tensor))
    return np.concatenate(blocks) if blocks else np.empty(0, target.tensors[tensor].number.word_dtype)


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _assert_planned(record: Record | None, before: Words, after: Words) -> None:
    """Two loaded checkpoints differ by the record's faults and by nothing else; None: not at all."""
    assert changed(before, after) == ({} if record is None else planned(record))
