"""Nothing is lost: kills, full disks, locks, damaged files. One clear message, and nothing altered."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints import files, patch
from ckptflip.errors import (
    CheckpointError,
    CkptflipError,
    InUseError,
    PartlyAlteredError,
    RecordError,
    SelectionError,
    UsageError,
)

ROOT = Path(ckptflip.__file__).parent.parent


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as opened:
        opened["layer1/weight"] = rng.normal(size=(64, 32)).astype("f4")
        opened["layer1/bias"] = rng.normal(size=64).astype("f4")
        data = rng.normal(size=(64, 8))
        opened.create_dataset("packed", data=data, chunks=(4, 8), compression="gzip", fletcher32=True)
    return path


@pytest.fixture
def untouched(file):
    """Fails the test when the file or its folder changed."""
    before = state(file.parent)
    yield file
    assert state(file.parent) == before


def state(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def run_python(code: str, *arguments: object, timeout=120, **options) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that can import this package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, **options
    )


KILLS = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import h5py, numpy as np
import ckptflip
from ckptflip import record_files
from ckptflip.checkpoints import patch
import ckptflip.alter, ckptflip.checkpoints.hdf5.target, ckptflip.faults.draw, ml_dtypes

folder, mode, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
patch._GAP = 0  # every word is a write of its own
options = {"chunks": (64, 16), **({"compression": "gzip"} if mode == "gzip" else {"fletcher32": True})}
source, out = folder / "a.h5", folder / "b.h5"
with h5py.File(source, "w") as f:
    rng = np.random.default_rng(0)
    f["flat"] = rng.normal(size=(300, 256)).astype("f4")
    f.create_dataset("x", data=rng.normal(size=(256, 64)).astype("f4"), **options)
original = source.read_bytes()
where = {"out": out} if mode == "out" else {"in_place": True}
record = folder / ("b.h5.flips.jsonl" if mode == "out" else "a.h5.flips.jsonl")

def act():
    ckptflip.inject(source, count=1500, seed=seed, **where)

def values(path):
    with h5py.File(path) as f:
        return {n: f[n][()].tobytes() for n in f}

def clean():
    for p in folder.iterdir():
        if p != source:
            p.unlink()
    source.write_bytes(original)

def in_child():
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child

wanted, spent = values(source), []
act()
finished = out.read_bytes() if mode == "out" else None
clean()
for _ in range(3):
    start = time.perf_counter()
    child = in_child()
    assert os.waitpid(child, 0)[1] == 0
    spent.append(time.perf_counter() - start)
    clean()
rng, found = random.Random(seed), {"before": 0, "midway": 0, "after": 0}
for k in range(kills):
    child = in_child()
    time.sleep((k + rng.random()) / kills * 1.05 * max(spent))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    now = source.read_bytes()
    whole = os.WIFEXITED(status)
    found["after" if whole else "before" if now == original and not record.exists() else "midway"] += 1
    if mode == "out":
        assert now == original, "the source was touched"
        assert not out.exists() or out.read_bytes() == finished, "half an output under its final name"
        assert not whole or out.exists()
    elif not record.exists():
        assert now == original, "altered without a record"
    else:
        assert not whole or now != original
        record_files.read(record)  # whole, or not there
        ckptflip.undo(source, record)
        if mode == "gzip":
            assert values(source) == wanted
        else:
            assert source.read_bytes() == original
    if record.exists():
        record_files.read(record)
    clean()
print(json.dumps(found))
"""


@pytest.mark.parametrize(("mode", "kills"), [("in-place", 80), ("out", 60), ("gzip", 60)])
def test_a_kill_at_any_moment_loses_nothing(tmp_path, mode, kills):
    done = run_python(KILLS, tmp_path, mode, kills, 11)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found.values()) == kills
    assert found["before"] + found["midway"] > kills // 4, found


HOLD = """
import sys, h5py
with h5py.File(sys.argv[1], sys.argv[2]) as file:
    print("open", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds a file open with h5py."""

    def __init__(self, path: Path, mode: str) -> None:
        command = [sys.executable, "-c", HOLD, str(path), mode]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        assert self.process.stdout.readline() == "open\n"
        return self

    def __exit__(self, *_):
        self.process.communicate("")


def test_a_file_that_another_process_reads_cannot_be_altered_and_can_be_copied(file):
    before = state(file.parent)
    with Holder(file, "r"):
        with pytest.raises(InUseError, match="open in another process"):
            ckptflip.inject(file, in_place=True, seed=1)
        assert state(file.parent) == before
        assert ckptflip.inject(file, seed=1).bits_effective == 1
    assert ckptflip.inject(file, in_place=True, seed=1).bits_effective == 1


def test_a_file_that_another_process_writes_is_refused_altogether(file, tmp_path):
    with Holder(file, "r+"):
        for verb in (
            lambda: ckptflip.inject(file, seed=1),
            lambda: ckptflip.inject(file, in_place=True, seed=1),
            lambda: ckptflip.scan(file),
            lambda: ckptflip.diff(file, file),
        ):
            with pytest.raises(InUseError):
                verb()
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_the_second_of_two_injections_is_refused(file, monkeypatch):
    """While the first is at its first write, the second is started."""
    seen = []
    real = patch.apply_patches

    def apply(patches):
        before = state(file.parent)
        with pytest.raises(InUseError) as refused:
            ckptflip.inject(file, in_place=True, record=file.with_name("second.jsonl"), seed=2)
        seen.append((refused.value.exit_code, state(file.parent) == before))
        real(patches)

    monkeypatch.setattr(patch, "apply_patches", apply)
    record = ckptflip.inject(file, in_place=True, tensors="layer1/*", seed=1)
    assert seen == [(1, True)] and record.bits_effective == 1


def test_a_file_open_in_this_very_process(untouched):
    with h5py.File(untouched, "r+"), pytest.raises(InUseError):
        ckptflip.inject(untouched, in_place=True, seed=1)
    with h5py.File(untouched, "r"), pytest.raises(InUseError):
        ckptflip.inject(untouched, in_place=True, seed=1)
    with h5py.File(untouched, "r"):
        assert ckptflip.inject(untouched, dry_run=True, seed=1).bits_hit == 1


def test_the_lock_is_given_back_after_an_error(file):
    with pytest.raises(SelectionError):
        ckptflip.inject(file, in_place=True, tensors="nothing", seed=1)
    with file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_read_only_file_is_not_altered_in_place(untouched, monkeypatch):
    untouched.chmod(0o444)
    if os.access(untouched, os.W_OK):
        # Root may write anything: say no in the system's place.
        real = os.open

        def refuse(path, flags, *rest, **options):
            if str(path) == str(untouched) and flags & (os.O_RDWR | os.O_WRONLY):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        CheckpointError, match=r"cannot be altered: Permission denied.*write a new file with -o"
    ):
        ckptflip.inject(untouched, in_place=True, seed=1)


def test_a_copy_of_a_read_only_file_is_made_with_its_permissions(file):
    file.chmod(0o440)
    ckptflip.inject(file, out=file.with_name("b.h5"), tensors="packed", seed=1)
    assert file.with_name("b.h5").stat().st_mode & 0o777 == 0o440


@pytest.mark.parametrize("writes", [0, 1, 5, 40])
def test_a_disk_that_fills_up_midway_in_place(file, monkeypatch, writes):
    before = state(file.parent)
    left = writes
    real = os.pwrite
    failed = []

    def pwrite(fd, data, offset):
        nonlocal left
        if left == 0 and not failed:
            failed.append(offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(patch, "_GAP", 0)
    monkeypatch.setattr(patch, "_BATCH_BYTES", 64)
    with pytest.raises(CheckpointError, match="No space left"):
        ckptflip.inject(file, in_place=True, tensors="layer1/*", count=100, seed=1)
    assert failed
    assert state(file.parent) == before


def test_a_write_that_ends_early_goes_on(file, monkeypatch):
    """The system may write less than it was asked to."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:1], offset))
    before = file.read_bytes()
    record = ckptflip.inject(file, in_place=True, tensors="layer1/*", count=500, seed=1)
    monkeypatch.undo()
    assert ckptflip.diff(file, ckptflip_copy(file, before))[1].bits <= record.bits_effective
    ckptflip.undo(file, record.path)
    assert file.read_bytes() == before


def ckptflip_copy(file: Path, content: bytes) -> Path:
    copy = file.with_name("copy.h5")
    copy.write_bytes(content)
    return copy


FULL = """
import resource, signal, sys
import ckptflip, ckptflip.alter, ckptflip.checkpoints.hdf5.target, ckptflip.faults.draw
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
options = {"in_place": True} if sys.argv[2] == "in-place" else {"out": sys.argv[1] + ".out.h5"}
try:
    ckptflip.inject(sys.argv[1], seed=1, tensors=sys.argv[4], count=400, **options)
except ckptflip.CkptflipError as why:
    print(type(why).__name__, why)
    sys.exit(9)
"""


@pytest.mark.parametrize("mode", ["out", "in-place"])
@pytest.mark.parametrize("tensors", ["layer1/*", "packed"])
@pytest.mark.parametrize("limit", [0, 3000, 9000])
def test_no_room_for_the_output_or_the_record(file, mode, tensors, limit):
    before = state(file.parent)
    done = run_python(FULL, file, mode, limit, tensors)
    assert done.returncode == 9, done.stderr
    assert "CheckpointError" in done.stdout and "Traceback" not in done.stderr
    assert state(file.parent) == before


def test_a_copy_that_cannot_be_published_leaves_nothing(file, monkeypatch):
    before = state(file.parent)

    def refuse(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(files, "_publish", lambda *_, **__: refuse())
    with pytest.raises(CheckpointError, match="nothing was left behind"):
        ckptflip.inject(file, out=file.with_name("b.h5"), record=file.with_name("r.h5"), seed=1)
    assert state(file.parent) == before


def test_copying_without_the_kernels_help(file, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    record = ckptflip.inject(file, out=file.with_name("b.h5"), count=3, seed=1)
    ckptflip.undo(file.with_name("b.h5"), record.path, out=file.with_name("c.h5"))
    assert file.with_name("c.h5").stat().st_size == file.stat().st_size


def test_no_temporary_file_is_left_after_success(file):
    ckptflip.inject(file, in_place=True, count=20, seed=1)
    ckptflip.undo(file, f"{file}.flips.jsonl")
    assert {p.name for p in file.parent.iterdir()} == {"a.h5", "a.h5.flips.jsonl"}


NOT_CHECKPOINTS = {
    "text": (b"Hello, this is no checkpoint.\n" * 9, "looks like text"),
    "empty": (b"", "is empty"),
    "zip": (b"PK\x03\x04" + bytes(200), "zip"),
    "pickle": (b"\x80\x02}q\x00." + bytes(9), "pickle"),
    "zeros": (bytes(600), "tell nothing"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_what_is_no_hdf5(tmp_path, kind):
    content, hint = NOT_CHECKPOINTS[kind]
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    for verb in (
        ckptflip.scan,
        lambda p: ckptflip.inject(p, seed=1),
        lambda p: ckptflip.inject(p, in_place=True),
    ):
        with pytest.raises(CheckpointError, match=hint):
            verb(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_named_like_hdf5_and_is_none(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"text")
    with pytest.raises(CheckpointError, match="named like HDF5, but its signature is missing"):
        ckptflip.scan(tmp_path / "a.h5")


def test_a_folder_a_pipe_and_nothing_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    for path, hint in (
        (tmp_path, "folder"),
        (tmp_path / "pipe.h5", "not a plain file"),
        (tmp_path / "no.h5", "not exist"),
    ):
        for verb in (ckptflip.scan, lambda p: ckptflip.inject(p, out=tmp_path / "b.h5", seed=1)):
            with pytest.raises(CheckpointError, match=hint):
                verb(path)
    assert not (tmp_path / "b.h5").exists()


def test_truncated_at_any_length(file):
    """Every error is one of ours, and no truncated file is ever altered."""
    whole = file.read_bytes()
    path = file.with_name("cut.h5")
    messages = set()
    for length in [*range(0, 200, 7), *range(200, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:length])
        for options in ({"dry_run": True}, {"in_place": True}):
            with pytest.raises(CheckpointError) as why:
                ckptflip.inject(path, seed=1, count=50, **options)
            messages.add(str(why.value))
        assert path.read_bytes() == whole[:length]
    assert not path.with_name("cut.h5.flips.jsonl").exists()
    assert any("truncated" in m for m in messages) and any("empty" in m for m in messages)


CORRUPT = """
import random, sys
from pathlib import Path
import ckptflip, h5py
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
whole = Path(sys.argv[4]).read_bytes()
rng = random.Random(seed)
path, seen = folder / f"c{seed}.h5", {}
for i in range(count):
    raw = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8, 60))):
        raw[rng.randrange(8, len(raw))] = rng.choice((0, 255, rng.randrange(256), rng.randrange(256)))
    path.write_bytes(raw)
    print(i, file=sys.stderr, flush=True)
    for verb in (
        lambda: ckptflip.scan(path),
        lambda: ckptflip.inject(path, in_place=True, ber=0.01, seed=i),
        lambda: ckptflip.undo(path, str(path) + ".flips.jsonl"),
        lambda: ckptflip.inject(path, ber=0.01, seed=i, overwrite=True),
    ):
        try:
            verb()
            name = "fine"
        except ckptflip.CkptflipError as why:
            name = type(why).__name__
        seen[name] = seen.get(name, 0) + 1
    Path(str(path) + ".flips.jsonl").unlink(missing_ok=True)
print(seen)
"""


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_corrupt_files_give_our_errors_or_succeed(tmp_path, libver):
    """Random bytes changed anywhere. The HDF5 library itself may crash or hang, so another process tries."""
    with h5py.File(tmp_path / "small.h5", "w", libver=libver) as file:
        file["g/x"] = np.arange(20, dtype="f4")
        file["g/x"].attrs["dtype"] = "float32"
        file.create_dataset("g/y", data=np.arange(40.0), chunks=(9,), compression="gzip", fletcher32=True)
        file.create_dataset("z", data=np.arange(40.0), chunks=(9,))
        file["c"] = np.zeros(3, [("a", "f4"), ("b", "i2", (2,))])
        file["s"] = "text"
    crashes = 0
    for seed in range(2):
        try:
            done = run_python(CORRUPT, tmp_path, seed, 60, tmp_path / "small.h5", timeout=30)
        except subprocess.TimeoutExpired:
            crashes += 1
            continue
        if done.returncode < 0:
            crashes += 1  # a signal: the library's own fault
            assert "Traceback" not in done.stderr
            continue
        assert done.returncode == 0, done.stderr
        assert "fine" in done.stdout and "CheckpointError" in done.stdout
    assert crashes < 2


CONTRADICTIONS = {
    "out and in place": {"out": "b.h5", "in_place": True},
    "count and ber": {"count": 1, "ber": 0.1},
    "count and fraction": {"count": 1, "fraction": 0.1},
    "rows and slice": {"rows": "0", "slice": "0"},
    "value and bits": {"fault": "value:0", "bits": "sign"},
    "ber and design": {"ber": 0.1, "design": "tensor"},
    "count 0": {"count": 0},
    "count below 0": {"count": -3},
    "ber 0": {"ber": 0.0},
    "ber 2": {"ber": 2.0},
    "fraction nan": {"fraction": float("nan")},
    "negative seed": {"seed": -1},
    "seed beyond 64 bits": {"seed": 2**64},
    "unknown bits": {"bits": "exponnt"},
    "unknown role": {"roles": "wieght"},
    "unknown fault": {"fault": "flop"},
    "unknown design": {"design": "fair"},
    "unknown guard": {"forbid": "nans"},
    "unknown checksum": {"checksum": "fix"},
    "more than there is": {"tensors": "layer1/bias", "count": 64 * 32 + 1},
    "matches nothing": {"tensors": "layr1/wieght"},
    "rows outside": {"rows": "1000"},
    "no such bits": {"bits": "63", "tensors": "layer1"},
    "record is the checkpoint": {"record": "a.h5", "overwrite": True},
    "record is the output": {"out": "b.h5", "record": "b.h5"},
    "output is the checkpoint": {"out": "./a.h5", "overwrite": True},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_usage_errors_and_alter_nothing(untouched, monkeypatch, name):
    monkeypatch.chdir(untouched.parent)
    with pytest.raises(UsageError) as why:
        ckptflip.inject("a.h5", **CONTRADICTIONS[name])
    assert why.value.exit_code == 2 and str(why.value)


def test_suggestions(untouched):
    for options, hint in (
        ({"tensors": "layer1/wieght"}, r"did you mean 'layer1/weight'"),
        ({"layers": "layr1"}, r"did you mean 'layer1'"),
        ({"bits": "exponnt"}, r"did you mean 'exponent'"),
        ({"roles": "wieght"}, r"did you mean 'weight'"),
        ({"tensors": "zzz"}, r"there are layer1/bias, layer1/weight"),
        ({"tensors": "layer1/bias", "count": 9999}, r"larger than the 2048 eligible bits"),
    ):
        with pytest.raises(UsageError, match=hint):
            ckptflip.inject(untouched, in_place=True, **options)


def test_existing_files_are_kept(file):
    ckptflip.inject(file, seed=1)
    before = state(file.parent)
    with pytest.raises(UsageError, match="exists"):
        ckptflip.inject(file, seed=2)
    file.with_name("a.flipped.h5").rename(file.with_name("kept.h5"))
    with pytest.raises(UsageError, match=r"the record .* exists"):
        ckptflip.inject(file, seed=2)
    file.with_name("kept.h5").rename(file.with_name("a.flipped.h5"))
    assert state(file.parent) == before
    ckptflip.inject(file, seed=2, overwrite=True)
    after = state(file.parent)
    assert {n for n in before if before[n] != after[n]} == {"a.flipped.h5", "a.flipped.h5.flips.jsonl"}


def test_in_place_never_replaces_a_record(file):
    """The old record is the only way back."""
    ckptflip.inject(file, in_place=True, seed=1)
    before = state(file.parent)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="undo it first"):
            ckptflip.inject(file, in_place=True, seed=2, overwrite=overwrite)
    assert state(file.parent) == before


def test_an_output_that_appears_meanwhile_is_kept(file, monkeypatch):
    out = file.with_name("b.h5")
    real = files.copy

    def copy(source, target, progress=None):
        out.write_bytes(b"somebody else's")
        real(source, target, progress)

    monkeypatch.setattr(files, "copy", copy)
    with pytest.raises(UsageError, match="created by another process meanwhile"):
        ckptflip.inject(file, out=out, seed=1)
    assert out.read_bytes() == b"somebody else's"


def test_a_missing_folder(untouched):
    gone = untouched.parent / "no" / "b.h5"
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        ckptflip.inject(untouched, out=gone, seed=1)
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        ckptflip.inject(untouched, in_place=True, record=gone, seed=1)
    with pytest.raises(CheckpointError, match="cannot be written"):
        ckptflip.inject(untouched, out=untouched.parent / "b.h5", record=gone, seed=1)


def test_huge_seeds(file):
    made = [
        ckptflip.inject(file, seed=s, dry_run=True, count=5).plan.word.tolist() for s in (2**64 - 1, 2**63, 0)
    ]
    assert made[0] != made[1] != made[2]
    record = ckptflip.inject(file, seed=2**64 - 1, count=5)
    assert record.plan.word.tolist() == made[0]
    assert ckptflip.undo(file.with_name("a.flipped.h5"), record.path).restored == 5


@pytest.mark.parametrize(
    "what", ["another file", "another shape", "missing tensor", "no record", "cut record"]
)
def test_undo_with_the_wrong_record_alters_nothing(file, tmp_path, what):
    record = ckptflip.inject(file, out=tmp_path / "b.h5", tensors="layer1/*", count=30, seed=1)
    path = Path(record.path)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        shape = (64, 32) if what != "another shape" else (32, 64)
        other["layer1/weight"] = np.random.default_rng(5).normal(size=shape).astype("f4")
        if what != "missing tensor":
            other["layer1/bias"] = np.random.default_rng(6).normal(size=64).astype("f4")
    if what == "no record":
        path.write_text("nothing of the kind\n")
    if what == "cut record":
        path.write_bytes(path.read_bytes()[:-40])
    before = state(tmp_path)
    with pytest.raises(RecordError):
        ckptflip.undo(tmp_path / "other.h5", path)
    assert state(tmp_path) == before


def test_all_errors_are_ours():
    assert all(issubclass(e, CkptflipError) for e in (CheckpointError, InUseError, RecordError, UsageError))


def test_a_file_that_cannot_be_put_back_keeps_its_record(tmp_path, monkeypatch):
    """When the disk fails for good in the middle, the record is the only way back and must not go."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["w"] = np.ones(1 << 20, np.float32)
    before = path.read_bytes()
    real, left = os.pwrite, iter(range(20))

    def pwrite(fd, data, offset):
        if next(left, None) is None:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(PartlyAlteredError, match="partly altered"):
        ckptflip.inject(path, in_place=True, count=200, seed=1)
    monkeypatch.undo()
    assert path.read_bytes() != before
    assert 0 < ckptflip.undo(path, f"{path}.flips.jsonl").restored < 200
    assert path.read_bytes() == before
