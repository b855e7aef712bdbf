"""Inputs that are easy to get wrong: each once lost data, hung, gave a traceback or a false answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.cli.main import run
from ckptflip.errors import CheckpointError, CkptflipError, RecordError, SelectionError, UsageError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["conv1/kernel"] = np.ones((8, 3), np.float32)
    return path


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"fletcher32": True}], ids=str)
@pytest.mark.parametrize(
    ("shape", "chunks", "most"),
    [((3, 5), (2, 3), (3, None)), ((7, 9, 4), (2, 4, 3), (7, None, 4)), ((5, 6), (2, 2), (None, 6))],
)
def test_chunks_that_hdf5_misnumbers(tmp_path, shape, chunks, most, options):
    """HDF5 2.0 gives wrong coordinates for extensible-array chunks unless the first axis is unlimited."""
    path, out = tmp_path / "l.h5", tmp_path / "out.h5"
    data = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("w", data=data, chunks=chunks, maxshape=most, **options)
        file["beside"] = np.zeros(3)
    for seed in range(8):
        record = ckptflip.inject(path, out=out, tensors="w", count=3, seed=seed, overwrite=True)
        with h5py.File(out) as file:
            changed = file["w"][()].view(np.uint32).ravel() ^ data.view(np.uint32).ravel()
        assert np.flatnonzero(changed).tolist() == record.plan.word.tolist()
        assert [row.bits for row in ckptflip.diff(path, out, tensors="w")] == [3]
        ckptflip.undo(out, record)
        with h5py.File(out) as file:
            assert np.array_equal(file["w"][()], data)


def test_a_rate_that_hits_nothing(checkpoint):
    record = ckptflip.inject(checkpoint, in_place=True, ber=1e-12, seed=1)
    assert (len(record), record.bits_hit) == (0, 0)
    assert ckptflip.undo(checkpoint, record.path).restored == 0
    assert len(ckptflip.replay(record.path, checkpoint, dry_run=True)) == 0


@pytest.mark.parametrize("option", ["out", "record"])
def test_only_plain_files_are_replaced(checkpoint, tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UsageError, match="not a plain file"):
            ckptflip.inject(checkpoint, **{option: tmp_path / name}, overwrite=True, seed=1)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "folder", "pipe"]


def test_a_link_in_the_way_is_replaced_not_what_it_stands_for(checkpoint, tmp_path):
    target, link = tmp_path / "target.h5", tmp_path / "link.h5"
    target.write_bytes(b"old")
    link.symlink_to(target)
    ckptflip.inject(checkpoint, out=link, overwrite=True, seed=1)
    assert not link.is_symlink() and target.read_bytes() == b"old"
    assert [row.bits for row in ckptflip.diff(checkpoint, link)] == [1]


@pytest.mark.parametrize("name", [".", ""])
def test_names_that_name_no_file(checkpoint, name):
    with pytest.raises(UsageError):
        ckptflip.inject(checkpoint, out=name, overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        ckptflip.inject(name)


def test_closed_output(checkpoint):
    command = f"'{sys.executable}' -m ckptflip inject '{checkpoint}' --seed 1 >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_odd_attributes_are_no_damage(tmp_path):
    path = tmp_path / "odd.h5"
    with h5py.File(path, "w") as file:
        file["g/w"] = np.ones(3, np.uint8)
        file["g/w"].attrs["dtype"] = h5py.Empty("S10")
        file["g"].attrs["name"] = h5py.Empty("S10")
    with ckptflip.opened(path) as target:
        assert [t.dtype for t in target.tensors] == ["uint8"]


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 29), (1 << 40,)])
def test_huge_claims(tmp_path, shape):
    path = tmp_path / "huge.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", shape, np.float32, chunks=(1024,) * len(shape))
    with ckptflip.opened(path) as target:
        assert [s.name for s in target.skipped if "none of which was ever written" in s.reason] == ["w"]
    with pytest.raises(SelectionError):
        ckptflip.inject(path, count=1)


def test_more_faults_than_memory(tmp_path):
    path = tmp_path / "big.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", (1 << 33,), np.uint8, chunks=(1 << 20,))
    with pytest.raises(SelectionError, match="GB of memory"):
        ckptflip.inject(path, fraction=0.9)


def test_views_that_look_at_each_other(tmp_path):
    for name, other in (("x.h5", "y.h5"), ("y.h5", "x.h5")):
        with h5py.File(tmp_path / name, "w") as file:
            layout = h5py.VirtualLayout((4,), np.float32)
            layout[:] = h5py.VirtualSource(other, "v", (4,))
            file.create_virtual_dataset("v", layout)
    with ckptflip.opened(tmp_path / "x.h5") as target:
        assert [(s.name, s.reason.partition(" in ")[0]) for s in target.skipped] == [
            ("v", "a view of a view")
        ]


def test_pipes_are_no_records_and_no_policies(checkpoint, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(RecordError, match="not a plain file"):
        ckptflip.undo(checkpoint, pipe)
    with pytest.raises(UsageError, match="not a plain file"):
        ckptflip.inject(checkpoint, policy=pipe)


def test_a_deeply_nested_policy(checkpoint, tmp_path):
    (tmp_path / "p.toml").write_text("a=" + "[" * 5000)
    with pytest.raises(UsageError, match="not TOML"):
        ckptflip.inject(checkpoint, policy=tmp_path / "p.toml")


def test_other_names_of_a_compressed_file(tmp_path):
    path, other = tmp_path / "g.h5", tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", data=np.ones(100, np.float32), compression="gzip")
    other.hardlink_to(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="other names"):
        ckptflip.inject(path, in_place=True, seed=1)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.h5", "other.h5"]


def test_in_place_again_after_undo(checkpoint):
    first = ckptflip.inject(checkpoint, in_place=True, seed=1)
    with pytest.raises(UsageError, match="still in effect"):
        ckptflip.inject(checkpoint, in_place=True, seed=2, overwrite=True)
    ckptflip.undo(checkpoint, first.path)
    with pytest.raises(UsageError, match="undo it first and add --overwrite"):
        ckptflip.inject(checkpoint, in_place=True, seed=2)
    again = ckptflip.inject(checkpoint, in_place=True, seed=2, overwrite=True)
    assert ckptflip.undo(checkpoint, again.path).restored == 1


def test_diff_says_what_it_leaves_out(checkpoint, tmp_path):
    ckptflip.inject(checkpoint, out=tmp_path / "nan.h5", fault="value:nan", count=2, seed=1)
    [row] = ckptflip.diff(checkpoint, tmp_path / "nan.h5", tensors="conv1")
    assert (row.max_abs, row.note) == (0.0, "2 of them not finite, left out of the distances")


def test_names_are_taken_alike_by_all_verbs(checkpoint):
    record = ckptflip.inject(checkpoint, tensors="conv1", dry_run=True)
    assert len(record) == len(ckptflip.diff(checkpoint, checkpoint, tensors="conv1")) == 1
    assert [row.tensor for row in ckptflip.scan(checkpoint, tensors="conv1")] == ["conv1/kernel"]
    assert "inject" in dir(ckptflip)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    pytest.importorskip("torch")
    from ckptflip.training import harness

    folder = tmp_path_factory.mktemp("clean")
    harness.train("digits-mlp", 2, folder, overwrite=True)
    return folder


def test_messages_that_name_the_way_out(checkpoint, tmp_path, capsys):
    record = ckptflip.inject(checkpoint, seed=np.int64(5), layers="conv1")
    assert run(["show", str(record.path)]) == 0
    assert "1 fault, flip, uniform over layers conv1, bits all" in capsys.readouterr().err
    expected = {
        ("plot", str(record.path)): "is a record of flips, not a track",
        ("show", str(checkpoint)): "no record of flips",
        ("ls", str(tmp_path / "ckpt_*.h5"), "--epoch", "5"): "does not exist",
        ("train", "./mine.py:made", "--epochs", "1", "--save", str(tmp_path / "s")): "as in mine:made",
        ("diff", str(tmp_path), str(checkpoint)): "name a checkpoint in it",
    }
    for command, message in expected.items():
        assert run([*command]) in (1, 2)
        assert message in capsys.readouterr().err


class TestTraining:
    def test_which_record_belongs_to_a_checkpoint(self, clean, tmp_path):
        from ckptflip.training import harness

        altered, record = tmp_path / "c.h5", tmp_path / "elsewhere.jsonl"
        ckptflip.inject(clean / "epoch_001.h5", out=altered, record=record, roles="model", seed=1)
        again = {"overwrite": True}
        assert harness.resume("digits-mlp", altered, 2, **again).header.flips is None
        assert (
            harness.resume("digits-mlp", altered, 2, record=record, **again).header.flips.counts["bits_hit"]
            == 1
        )
        record.rename(tmp_path / "c.h5.flips.jsonl")
        assert harness.resume("digits-mlp", altered, 2, **again).header.flips.record == "c.h5.flips.jsonl"
        ckptflip.undo(altered, tmp_path / "c.h5.flips.jsonl")
        assert harness.resume("digits-mlp", altered, 2, **again).header.flips is None
        with pytest.raises(CkptflipError):
            harness.resume("digits-mlp", altered, 2, record=tmp_path / "none.jsonl", **again)

    def test_a_step_that_an_altered_counter_breaks(self, clean, tmp_path, capsys):
        out = tmp_path / "c.h5"
        ckptflip.inject(clean / "epoch_001.h5", out=out, tensors="step", fault="value:-1e30", fraction=1.0)
        assert run(["resume", "digits-mlp", str(out), "--until", "2"]) == 1
        assert "training epoch 2 failed" in capsys.readouterr().err

    def test_buffers_that_the_state_dict_leaves_out(self, tmp_path):
        torch = pytest.importorskip("torch")
        from ckptflip.training import harness
        from ckptflip.training.pytorch import TorchWorkload

        class Averaging(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = torch.nn.Linear(2, 2)
                self.register_buffer("mean", torch.zeros(2), persistent=False)

            def forward(self, x):
                if self.training:
                    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                return self.inner(x - self.mean)

        def made() -> TorchWorkload:
            x = torch.linspace(-1, 2, 80).reshape(40, 2)
            y = (x[:, 0] > 0).long()
            return TorchWorkload(
                "averaging",
                model=Averaging,
                optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
                loss=torch.nn.CrossEntropyLoss(),
                data=((x, y), (x, y)),
                batch_size=7,
            )

        harness.train(made(), 4, tmp_path / "straight")
        harness.resume(made(), tmp_path / "straight" / "epoch_002.h5", 4, save=tmp_path / "resumed")
        last = [(tmp_path / folder / "epoch_004.h5").read_bytes() for folder in ("straight", "resumed")]
        assert last[0] == last[1]

    def test_a_workload_that_never_advances(self, tmp_path):
        from ckptflip.training import harness

        class Still:
            name, epoch = "still", 0

            def start(self, seed: int) -> None: ...

            def train_epoch(self) -> dict[str, float]:
                return {"loss": 0.0}

            def evaluate(self) -> dict[str, float]:
                return {"accuracy": 1.0}

            def save(self, path: Path) -> None: ...

            def load(self, path: Path) -> None: ...

        with pytest.raises(CkptflipError, match="must count one epoch"):
            harness.train(Still(), 2, tmp_path / "still")

    def test_a_run_that_ends_in_nan_collapsed(self, clean):
        from msgspec.structs import replace

        from ckptflip.training.track import Track, collapsed, read

        track = read(clean)
        last = replace(track.rows[-1], loss=float("nan"))
        assert not collapsed(track, track.rows[-1].accuracy)
        assert collapsed(Track(track.header, (*track.rows[:-1], last)), track.rows[-1].accuracy)
