"""The verbs inject, replay and undo from Python: what they write, what they return."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest

import ckptflip
import ckptflip.checkpoints.files
from ckptflip import record_files
from ckptflip.errors import CheckpointError, RecordError, UsageError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as opened:
        opened["conv1/weight"] = rng.normal(size=(8, 4)).astype("f4")
        opened["conv1/bias"] = rng.normal(size=8).astype("f4")
        opened["conv10/weight"] = rng.normal(size=(8, 4)).astype("f4")
        opened["steps"] = np.int64(7)
        opened.create_dataset("gz", data=rng.normal(size=(8, 4)), chunks=(2, 4), compression="gzip")
    return path


def sha(path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_new_file_by_default(file, tmp_path):
    before = sha(file)
    record = ckptflip.inject(file, count=5, seed=1)
    out = tmp_path / "a.flipped.h5"
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5", "a.flipped.h5", "a.flipped.h5.flips.jsonl"}
    assert sha(file) == before != sha(out)
    header = record.header
    assert (header.checkpoint, header.output, header.format) == ("a.h5", "a.flipped.h5", "hdf5")
    assert (header.digest_before, header.digest_after, header.size) == (before, sha(out), file.stat().st_size)
    assert (header.seed, header.checksum, header.replay_of) == (1, "repair", None)
    assert record.path == str(tmp_path / "a.flipped.h5.flips.jsonl")


@pytest.mark.parametrize("name", ["r.jsonl", "r.h5", "r.txt"])
def test_the_record_on_disk_is_the_one_returned(file, tmp_path, name):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", count=9, seed=3, record=tmp_path / name)
    read = record_files.read(tmp_path / name)
    assert read.header == record.header and read.path == record.path
    for column in ("tensor", "word", "hit", "before", "after", "policies"):
        assert getattr(read.plan, column).tolist() == getattr(record.plan, column).tolist()
    assert h5py.is_hdf5(tmp_path / name) is name.endswith(".h5")
    assert ckptflip.undo(tmp_path / "b.h5", tmp_path / name).restored == record.header.counts.words_effective


def test_words_before_and_after_are_those_of_the_files(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="conv1/weight", count=20, seed=1)
    with h5py.File(file) as a, h5py.File(tmp_path / "b.h5") as b:
        before, after = (f["conv1/weight"][()].reshape(-1).view("u4")[record.plan.word] for f in (a, b))
    assert record.plan.before.tolist() == before.tolist()
    assert record.plan.after.tolist() == after.tolist()


def test_in_place(file, tmp_path):
    before = sha(file)
    record = ckptflip.inject(file, in_place=True, count=5, seed=1)
    assert {p.name for p in tmp_path.iterdir()} == {"a.h5", "a.h5.flips.jsonl"}
    assert record.header.output == record.header.checkpoint == "a.h5"
    assert record.header.digest_before == before != sha(file)
    undone = ckptflip.undo(file, record)
    assert (undone.restored, undone.already) == (record.header.counts.words_effective, 0)


def test_in_place_and_a_copy_give_the_same_file(file, tmp_path):
    ckptflip.inject(file, out=tmp_path / "b.h5", count=40, seed=9)
    ckptflip.inject(file, in_place=True, count=40, seed=9)
    assert sha(file) == sha(tmp_path / "b.h5")


def test_in_place_through_a_link_alters_the_file_it_stands_for(file, tmp_path):
    link = tmp_path / "link.h5"
    link.symlink_to(file)
    before = sha(file)
    for tensors in ("conv1", "gz"):
        record = ckptflip.inject(link, in_place=True, tensors=tensors, seed=1)
        assert link.is_symlink() and sha(file) != before
        assert ckptflip.undo(link, record.path).restored == 1
        assert link.is_symlink()
        (tmp_path / "link.h5.flips.jsonl").unlink()


def test_a_dry_run_writes_nothing_and_says_the_same(file, tmp_path):
    for options in ({}, {"in_place": True}, {"out": tmp_path / "b.h5"}):
        planned = ckptflip.inject(file, dry_run=True, count=5, seed=1, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
        assert planned.path is None
    done = ckptflip.inject(file, count=5, seed=1)
    assert planned.plan.word.tolist() == done.plan.word.tolist()
    replayed = ckptflip.replay(done, file, dry_run=True, in_place=True)
    assert (
        replayed.plan.after.tolist() == done.plan.after.tolist()
        and not (tmp_path / "a.h5.flips.jsonl").exists()
    )


def test_a_dry_run_may_look_at_a_file_that_others_read(file):
    with h5py.File(file, "r"):
        assert ckptflip.inject(file, dry_run=True, in_place=True, seed=1).bits_hit == 1


def test_without_a_seed_one_is_drawn_and_recorded(file):
    first = ckptflip.inject(file, dry_run=True, count=20)
    second = ckptflip.inject(file, dry_run=True, count=20)
    assert first.header.seed != second.header.seed
    again = ckptflip.inject(file, dry_run=True, count=20, seed=first.header.seed)
    assert again.plan.word.tolist() == first.plan.word.tolist()


def test_a_name_is_no_prefix(file):
    """`conv1` must not hit `conv10`, as a prefix match would."""
    record = ckptflip.inject(file, dry_run=True, tensors="conv1", fraction=1.0)
    assert {e.name for e in record.header.tensors} == {"conv1/weight", "conv1/bias"}


def test_a_small_tensor_is_hit_as_often_as_its_bits_ask(tmp_path):
    """Drawing the tensor first would hit one bias as often as a kernel 4096 times its size."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kernel"], file["bias"] = np.ones((64, 64), "f4"), np.ones(1, "f4")
    seeds = range(200)
    hits = {
        design: sum(
            ckptflip.inject(tmp_path / "a.h5", dry_run=True, seed=s, design=design).header.tensors[0].name
            == "bias"
            for s in seeds
        )
        for design in ("uniform", "tensor")
    }
    assert hits["uniform"] <= 2 and 70 <= hits["tensor"] <= 130


def test_faults_without_effect_are_counted_apart(tmp_path):
    """What is counted as effective is what changed in the file."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros(10, "u1")
    nothing = ckptflip.inject(tmp_path / "a.h5", in_place=True, fault="set0", fraction=1.0)
    assert (nothing.bits_hit, nothing.bits_effective) == (80, 0)
    assert ckptflip.undo(tmp_path / "a.h5", nothing.path).restored == 0
    half = ckptflip.inject(tmp_path / "a.h5", fault="set1", bits="0-3", fraction=1.0)
    assert (half.bits_hit, half.bits_effective) == (40, 40)
    with h5py.File(tmp_path / "a.flipped.h5") as file:
        assert file["x"][()].tolist() == [15] * 10


def test_several_policies_from_a_file(file, tmp_path):
    (tmp_path / "p.toml").write_text(
        'seed = 5\n[[policy]]\ntensors = ["conv1/*"]\nbits = "sign"\ncount = 3\n'
        '[[policy]]\ntensors = ["gz"]\nfault = "value:0"\ncount = 2\n'
    )
    record = ckptflip.inject(file, policy=tmp_path / "p.toml")
    assert record.header.seed == 5 and len(record.header.policies) == 2
    rows = {e.name: (record.plan.tensor == i).sum() for i, e in enumerate(record.header.tensors)}
    assert rows["gz"] == 2 and sum(rows.values()) == 5
    with h5py.File(tmp_path / "a.flipped.h5") as out:
        assert (out["gz"][()] == 0).sum() == 2
    assert ckptflip.inject(file, policy=tmp_path / "p.toml", seed=6, dry_run=True).header.seed == 6
    with pytest.raises(UsageError, match="a policy was given and bits, count too"):
        ckptflip.inject(file, policy=tmp_path / "p.toml", bits="sign", count=1)
    policy = ckptflip.Policy(tensors=("gz",), count=4)
    assert ckptflip.inject(file, policy=[policy, policy], seed=1, dry_run=True).bits_hit <= 8


def test_replay_on_the_original_gives_the_identical_file(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", count=30, seed=1)
    again = ckptflip.replay(tmp_path / "b.h5.flips.jsonl", file, out=tmp_path / "c.h5")
    assert sha(tmp_path / "b.h5") == sha(tmp_path / "c.h5") == record.header.digest_after
    assert (again.header.replay_of, again.header.seed) == ("b.h5.flips.jsonl", None)
    ckptflip.replay(record, file, in_place=True)
    assert sha(file) == sha(tmp_path / "b.h5")
    assert ckptflip.undo(file, tmp_path / "a.h5.flips.jsonl").restored == record.header.counts.words_effective


def test_replay_on_another_checkpoint_inverts_the_same_bits(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="conv1/weight", count=9, seed=1)
    with h5py.File(tmp_path / "later.h5", "w") as later:
        later.create_dataset("conv1/weight", data=np.ones((8, 4), ">f4"), chunks=(3, 3), shuffle=True)
    made = ckptflip.replay(record, tmp_path / "later.h5", out=tmp_path / "d.h5")
    assert (made.plan.before ^ made.plan.after).tolist() == (record.plan.before ^ record.plan.after).tolist()
    with h5py.File(tmp_path / "d.h5") as out:
        words = out["conv1/weight"][()].astype("f4", copy=False).view("u4") ^ np.float32(1).view("u4")
    assert int(np.bitwise_count(words).sum()) == record.bits_effective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.create_dataset("other", data=1.0), "has no tensor 'conv1/weight'"),
        (
            lambda f: f.create_dataset("conv1/weight", data=np.ones((4, 8), "f4")),
            "float32 .8, 4. in the record",
        ),
        (lambda f: f.create_dataset("conv1/weight", data=np.ones((8, 4), "f8")), "is float64"),
    ],
)
def test_replay_where_the_tensor_does_not_fit(file, tmp_path, make, message):
    record = ckptflip.inject(file, dry_run=True, tensors="conv1/weight", seed=1)
    with h5py.File(tmp_path / "b.h5", "w") as other:
        make(other)
    with pytest.raises(RecordError, match=message):
        ckptflip.replay(record, tmp_path / "b.h5", out=tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()


def test_undo_into_a_new_file(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="conv*", count=9, seed=1)
    altered = sha(tmp_path / "b.h5")
    undone = ckptflip.undo(tmp_path / "b.h5", record, out=tmp_path / "c.h5")
    assert undone.digest_matches and sha(tmp_path / "c.h5") == sha(file) and sha(tmp_path / "b.h5") == altered
    with pytest.raises(UsageError, match="exists"):
        ckptflip.undo(tmp_path / "b.h5", record, out=tmp_path / "c.h5")
    ckptflip.undo(tmp_path / "b.h5", record, out=tmp_path / "c.h5", overwrite=True)
    with pytest.raises(UsageError, match="different files"):
        ckptflip.undo(tmp_path / "b.h5", record, out=tmp_path / "b.h5", overwrite=True)


def test_undo_twice_and_of_a_file_that_was_never_altered(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="conv*", count=9, seed=1)
    words = record.header.counts.words_effective
    assert ckptflip.undo(tmp_path / "b.h5", record).restored == words
    for path in (tmp_path / "b.h5", file):
        undone = ckptflip.undo(path, record)
        assert (undone.restored, undone.already, undone.digest_matches) == (0, words, True)


def test_undo_says_when_other_bytes_differ(file, tmp_path):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="conv1/weight", count=9, seed=1)
    with h5py.File(tmp_path / "b.h5", "r+") as other:
        other["steps"][()] = 8
    undone = ckptflip.undo(tmp_path / "b.h5", record)
    assert undone.restored == record.header.counts.words_effective and undone.digest_matches is False


def test_large_files_have_no_digest(file, monkeypatch):
    monkeypatch.setattr(ckptflip.checkpoints.files, "digest", lambda *_, **__: None)
    record = ckptflip.inject(file, in_place=True, seed=1)
    assert record.header.digest_before is None
    assert ckptflip.undo(file, record).digest_matches is None


def test_progress_counts_the_copied_bytes(file):
    told = []
    ckptflip.inject(file, seed=1, progress=told.append)
    assert sum(told) == file.stat().st_size


def test_a_failed_in_place_injection_takes_its_record_back(file, monkeypatch):
    def refuse(*_):
        raise CheckpointError("as if the disk had failed")

    monkeypatch.setattr("ckptflip.checkpoints.patch.apply_patches", refuse)
    with pytest.raises(CheckpointError, match="as if"):
        ckptflip.inject(file, in_place=True, seed=1)
    assert [p.name for p in file.parent.iterdir()] == ["a.h5"]


def test_the_record_is_on_disk_before_the_first_byte_changes(file, monkeypatch):
    seen = []

    def look(patches):
        record = record_files.read(file.with_name("a.h5.flips.jsonl"))
        seen.append((len(record), sha(file) == record.header.digest_before))
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptflip.checkpoints.patch.apply_patches", look)
    with pytest.raises(KeyboardInterrupt):
        ckptflip.inject(file, in_place=True, tensors="conv*", bits="sign", count=7, seed=1)
    assert seen == [(7, True)]
    assert file.with_name("a.h5.flips.jsonl").exists()


def test_a_record_of_the_same_words_in_a_file_saved_anew(tmp_path):
    """Its checksums lie elsewhere: they are worked out, as across formats."""
    words = np.arange(50, dtype="f4")
    np.savez(tmp_path / "a.npz", w=words)
    record = ckptflip.inject(tmp_path / "a.npz", out=tmp_path / "b.npz", count=3, seed=1)
    with np.load(tmp_path / "b.npz") as flipped:
        np.savez(tmp_path / "c.npz", more=np.ones(3), w=flipped["w"])
    assert ckptflip.undo(tmp_path / "c.npz", record.path).restored == 3
    with np.load(tmp_path / "c.npz") as found:
        assert found["w"].tolist() == words.tolist()


@pytest.mark.parametrize(
    ("old", "new"), [('"before":', '"before":1180591620717411303424,"x":'), ('"repair"', '"../x"')]
)
def test_records_with_impossible_checksums(tmp_path, old, new):
    np.savez(tmp_path / "a.npz", w=np.ones(50))
    record = ckptflip.inject(tmp_path / "a.npz", in_place=True, count=3, seed=1)
    text = Path(record.path).read_text()
    head, rest = text.split("\n", 1)
    at = head.index('"checksums"') if "before" in old else 0
    Path(record.path).write_text(head[:at] + head[at:].replace(old, new, 1) + "\n" + rest)
    before = (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ckptflip.CkptflipError):
        ckptflip.undo(tmp_path / "a.npz", record.path)
    assert (tmp_path / "a.npz").read_bytes() == before
