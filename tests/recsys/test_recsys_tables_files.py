"""Row-wise quantised tables in files: fields are drawn, recorded, replayed and undone like tensors."""

import shutil
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip import record_files
from ckptflip.cli.main import cli
from ckptflip.errors import CkptflipError, RecordError, SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.recsys.tables import dequantise, quantise
from ckptflip.recsys.tables.views import as_asked

LAYOUTS = ("int8", "int4", "int2", "int8-tbe", "int4-tbe", "int2-tbe")
ROWS, DIM = 50, 12


def table_bytes(layout, seed=0):
    return quantise(np.random.default_rng(seed).standard_normal((ROWS, DIM)), layout)


def write_hdf5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)


def write_gzip(path, arrays):
    write_hdf5(path, arrays, chunks=(7, 3), compression="gzip")


def write_npz(path, arrays):
    np.savez(path, **arrays)


def write_safetensors(path, arrays):
    pytest.importorskip("safetensors.numpy").save_file(arrays, path)


def write_torch(path, arrays):
    torch = pytest.importorskip("torch")
    torch.save({n: torch.from_numpy(a) for n, a in arrays.items()}, path)


def write_distributed(path, arrays):
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({n: torch.from_numpy(a) for n, a in arrays.items()}, checkpoint_id=path, no_dist=True)


WRITERS = {
    "m.h5": write_hdf5,
    "gzip.h5": write_gzip,
    "m.npz": write_npz,
    "m.safetensors": write_safetensors,
    "m.pt": write_torch,
    "step-1": write_distributed,
}


def stored(path, name):
    """The bytes of a table as they are in a checkpoint."""
    with ckptflip.opened(path) as target:
        at = next(i for i, t in enumerate(target.tensors) if name in (t.name, *t.aliases))
        return np.concatenate(list(target.blocks(at))).reshape(target.tensors[at].shape)


def files_of(path):
    return {f.name: f.read_bytes() for f in ([path] if path.is_file() else sorted(path.iterdir()))}


@pytest.fixture(params=WRITERS)
def checkpoint(request, tmp_path):
    path = tmp_path / request.param
    arrays = {"emb.weight": table_bytes("int4"), "top.weight": np.ones((9, 3), np.float32)}
    WRITERS[request.param](path, arrays)
    return path


def inject(path, **options):
    return ckptflip.inject(path, tensors="emb", rowwise="int4", seed=5, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_every_format(checkpoint, tmp_path):
    before, files = stored(checkpoint, "emb.weight"), files_of(checkpoint)
    record = inject(checkpoint, count=40, in_place=True, record=tmp_path / "r.jsonl")
    hit = {t.name: (t.shape, t.dtype) for t in record.header.tensors}
    assert hit == {
        "emb.weight.code": ((ROWS, DIM), "uint4"),
        "emb.weight.scale": ((ROWS,), "float16"),
        "emb.weight.bias": ((ROWS,), "float16"),
    }
    after = stored(checkpoint, "emb.weight")
    assert np.bitwise_count(before ^ after).sum() == 40 == record.bits_effective
    # All of them taken back in a copy, and there once more.
    copy = tmp_path / f"copy-{checkpoint.name}"
    shutil.copytree(checkpoint, copy) if checkpoint.is_dir() else shutil.copy(checkpoint, copy)
    undone = ckptflip.undo(copy, tmp_path / "r.jsonl")
    assert undone.restored == len(record)
    assert np.array_equal(stored(copy, "emb.weight"), before)
    if checkpoint.name != "gzip.h5":
        assert list(files_of(copy).values()) == list(files.values())
    replayed = ckptflip.replay(tmp_path / "r.jsonl", copy, in_place=True, new_record=tmp_path / "again.jsonl")
    assert np.array_equal(stored(copy, "emb.weight"), after)
    assert replayed.header.tensors == record.header.tensors
    # A replay's record has no policies: what it hit tells how.
    ckptflip.undo(copy, tmp_path / "again.jsonl")
    assert np.array_equal(stored(copy, "emb.weight"), before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", ["code", "scale", "bias"])
def test_a_fault_is_where_its_record_says(tmp_path, layout, field):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes(layout)})
    before = table_bytes(layout)
    record = ckptflip.inject(path, tensors="emb", rowwise=layout, fields=field, count=30, seed=1)
    (entry,) = record.header.tensors
    assert entry.name == f"emb.{field}"
    after = stored(tmp_path / "m.flipped.h5", "emb")
    lines = list(record_files.lines(record))
    rows = sorted({line.index[0] for line in lines})
    assert rows == np.flatnonzero((before != after).any(axis=1)).tolist()
    old, new = dequantise(before, layout), dequantise(after, layout)
    bits = int(layout[3])
    codes_at = 4 if layout.endswith("tbe") else 0
    for line in lines:
        if field != "code":
            continue
        row, column = line.index
        byte, low = codes_at + column * bits // 8, column * bits % 8
        assert before[row, byte] >> low & (2**bits - 1) == line.value_before
        assert after[row, byte] >> low & (2**bits - 1) == line.value_after
        assert set(line.bits) <= set(range(bits))
    if field == "code":
        hit = {tuple(line.index) for line in lines}
        assert {tuple(i) for i in np.argwhere(old != new).tolist()} == hit
    else:
        wide = {line.index[0]: line for line in lines}
        kind = "<f4" if layout == "int8" else "<f2"
        size = int(kind[-1])
        at = {"scale": 0, "bias": size}[field] + (0 if codes_at else before.shape[1] - 2 * size)
        for row, line in wide.items():
            assert before[row, at : at + size].tobytes() == int(line.before, 16).to_bytes(size, "little")
            assert after[row, at : at + size].tobytes() == int(line.after, 16).to_bytes(size, "little")


def test_bits_are_those_of_the_field(tmp_path):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes("int8")})
    record = ckptflip.inject(
        path, tensors="emb", rowwise="int8", bits="critical", count=2 * ROWS, dry_run=True
    )
    assert [t.name for t in record.header.tensors] == ["emb.scale", "emb.bias"]
    assert set(record.plan.hit.tolist()) == {1 << 30}
    top = ckptflip.inject(path, tensors="emb", rowwise="int8", bits="msb", fraction=1.0, dry_run=True)
    assert [(t.name, top.bits_hit) for t in top.header.tensors] == [("emb.code", ROWS * DIM)]


def test_rows_are_those_of_the_table(tmp_path):
    path, counts = tmp_path / "m.h5", tmp_path / "access.npz"
    write_hdf5(path, {"model/emb": table_bytes("int2")})
    np.savez(counts, emb=np.arange(ROWS))
    options = {"tensors": "emb", "rowwise": "int2", "fraction": 1.0, "dry_run": True}
    hot = ckptflip.inject(path, rows="hot:4%", rows_weight=counts, **options)
    assert {i for line in record_files.lines(hot) for i in line.index[:1]} == {ROWS - 2, ROWS - 1}
    assert {t.name for t in hot.header.tensors} == {"model/emb.code", "model/emb.scale", "model/emb.bias"}
    few = ckptflip.inject(path, slice="3,0:2", **options)
    assert {tuple(line.index) for line in record_files.lines(few)} == {(3, 0), (3, 1)}


def test_values_that_faults_set_are_those_of_the_field(tmp_path):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes("int4")})
    ckptflip.inject(
        path,
        tensors="emb",
        rowwise="int4",
        fields="scale",
        fault="value:2",
        count=ROWS,
        out=tmp_path / "o.h5",
    )
    doubled = dequantise(stored(tmp_path / "o.h5", "emb"), "int4")
    codes = (dequantise(table_bytes("int4"), "int4") != 0) & (doubled != 0)
    assert codes.any()
    bias = np.ascontiguousarray(table_bytes("int4")[:, -2:]).view("<f2").astype("f4")
    assert set(np.unique(doubled - bias)) <= set(range(0, 31, 2))


def test_several_tables_and_layouts_in_one_injection(tmp_path):
    path = tmp_path / "m.h5"
    arrays = {"a": table_bytes("int8"), "b": table_bytes("int4"), "top": np.ones(4, np.float32)}
    write_hdf5(path, arrays)
    policies = [
        Policy(tensors=("a",), rowwise="int8", count=3),
        Policy(tensors=("b",), rowwise="int4", fields=("code",), count=3),
        Policy(tensors=("top",), count=2),
        # Tables that another policy names are their fields for all.
        Policy(tensors=("a",), fields=("bias",), count=2),
    ]
    record = ckptflip.inject(path, policy=policies, seed=1, in_place=True)
    assert {t.name.partition(".")[0] for t in record.header.tensors} == {"a", "b", "top"}
    ckptflip.undo(path, f"{path}.flips.jsonl")
    for name, array in arrays.items():
        assert np.array_equal(stored(path, name).view(array.dtype).reshape(array.shape), array)
    with pytest.raises(UsageError, match="a is said to be int8 and int8-tbe"):
        ckptflip.inject(path, policy=[policies[0], Policy(tensors=("a",), rowwise="int8-tbe")], dry_run=True)


def test_compared_by_field(tmp_path):
    path, other = tmp_path / "m.h5", tmp_path / "n.h5"
    write_hdf5(path, {"emb": table_bytes("int4"), "top": np.ones(4, np.float32)})
    ckptflip.inject(path, tensors="emb", rowwise="int4", fields="bias", bits="sign", count=1, out=other)
    rows = {r.tensor: (r.status, r.bits) for r in ckptflip.diff(path, other, tensors="emb", rowwise="int4")}
    assert rows == {"emb.code": ("same", 0), "emb.scale": ("same", 0), "emb.bias": ("differs", 1)}
    assert [(r.tensor, r.words) for r in ckptflip.diff(path, other)] == [("emb", 1), ("top", 0)]
    with pytest.raises(SelectionError, match="top is no row-wise int4 table: it is float32"):
        ckptflip.diff(path, other, rowwise="int4")


def test_blocks_are_the_words_in_order(tmp_path):
    path = tmp_path / "m.h5"
    write_gzip(path, {"emb": table_bytes("int2")})
    with ckptflip.opened(path) as target:
        view = as_asked(target, [Policy(rowwise="int2")])
        for i, tensor in enumerate(view.tensors):
            words = view.read(i, np.arange(tensor.words))
            assert np.array_equal(np.concatenate(list(view.blocks(i))), words)
            assert words.dtype == tensor.number.word_dtype


def test_an_old_record_of_another_view_is_still_respected(tmp_path):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes("int8")})
    ckptflip.inject(path, tensors="emb", rowwise="int8", seed=1, in_place=True)
    for rowwise in (None, "int8", "int8-tbe"):
        with pytest.raises(UsageError, match="is still in effect"):
            ckptflip.inject(path, tensors="emb", rowwise=rowwise, seed=2, in_place=True, overwrite=True)


def test_a_record_on_another_checkpoint(tmp_path):
    path, other = tmp_path / "m.h5", tmp_path / "n.h5"
    write_hdf5(path, {"emb": table_bytes("int8")})
    record = ckptflip.inject(path, tensors="emb", rowwise="int8", fields="code", seed=1)
    write_hdf5(other, {"emb": np.ones((ROWS, DIM), np.float32)})
    with pytest.raises(RecordError, match=r"no tensor 'emb.code', which the record hits"):
        ckptflip.replay(record, other)
    write_hdf5(other, {"emb": table_bytes("int8")[:9]})
    with pytest.raises(
        RecordError, match=r"emb.code is uint8 \(9, 12\) in .*, uint8 \(50, 12\) in the record"
    ):
        ckptflip.replay(record, other)


REFUSED = [
    ({"rowwise": "int8"}, "top.weight is no row-wise int8 table: it is float32"),
    ({"rowwise": "int8", "tensors": "emb"}, "its rows have 10 bytes, and 2 columns|is no row-wise"),
    ({"rowwise": "int9", "tensors": "emb"}, "rowwise 'int9' is not a layout"),
    (
        {"rowwise": "int4", "tensors": "emb", "fields": "codes"},
        "fields 'codes' is not one of code, scale, bias",
    ),
    ({"tensors": "emb", "fields": "code"}, "and none is selected; say how the tables are stored"),
    ({"rowwise": "int4", "tensors": "nothing"}, "tensors 'nothing' matches nothing"),
    ({"rowwise": "int4", "tensors": "emb.weight.bias", "fields": "code"}, "no field code is among"),
    ({"rowwise": "int4", "tensors": "emb", "rows": "50"}, "rows '50' lies outside every selected tensor"),
    ({"rowwise": "int4:21", "tensors": "emb"}, "rows have 10 bytes, and 21 columns take 15"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_what_is_refused(tmp_path, options, text):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb.weight": table_bytes("int4"), "top.weight": np.ones((3, 3), np.float32)})
    if options.get("rowwise") == "int8" and "tensors" in options:
        write_hdf5(path, {"emb.weight": table_bytes("int4")[:, :8]})
    with pytest.raises(CkptflipError, match=text):
        ckptflip.inject(path, **options)
    assert not (tmp_path / "m.flipped.h5").exists()


def test_a_name_that_is_taken(tmp_path):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes("int8"), "emb.scale": np.ones(3, np.float32)})
    with pytest.raises(SelectionError, match="there is a tensor of that name"):
        ckptflip.inject(path, tensors=["emb", "!emb.scale"], rowwise="int8")


def test_a_field_left_out(tmp_path):
    path = tmp_path / "m.h5"
    write_hdf5(path, {"emb": table_bytes("int8"), "emb2": table_bytes("int8")})
    options = {"rowwise": "int8", "ber": 0.9, "dry_run": True}
    record = ckptflip.inject(path, tensors=["emb", "!emb.code"], **options)
    assert [t.name for t in record.header.tensors] == ["emb.scale", "emb.bias"]
    record = ckptflip.inject(path, tensors=["emb*", "!emb"], **options)
    assert [t.name for t in record.header.tensors] == ["emb2.code", "emb2.scale", "emb2.bias"]
    record = ckptflip.inject(path, tensors="emb.bias", **options)
    assert [t.name for t in record.header.tensors] == ["emb.bias"]


def test_on_the_command_line(tmp_path, capsys):
    path, counts = tmp_path / "m.h5", tmp_path / "access.npy"
    write_hdf5(path, {"emb": table_bytes("int8")})
    np.save(counts, np.arange(ROWS))
    options = [
        "--rowwise",
        "int8",
        "--fields",
        "scale,bias",
        "--rows",
        "cold:2",
        "--rows-weight",
        str(counts),
    ]
    cli(
        ["inject", str(path), *options, "--ber", "0.5", "--seed", "1", "--format", "csv"],
        standalone_mode=False,
    )
    printed = capsys.readouterr().out
    assert "emb.scale" in printed and "emb.bias" in printed and "emb.code" not in printed
    out = str(tmp_path / "m.flipped.h5")
    cli(["diff", str(path), out, "--rowwise", "int8", "--format", "csv"], standalone_mode=False)
    assert "emb.scale,differs" in capsys.readouterr().out
    cli(["show", f"{out}.flips.jsonl", "--flips", "--format", "csv"], standalone_mode=False)
    assert {line.split(",")[0] for line in capsys.readouterr().out.split()[1:]} == {"emb.scale", "emb.bias"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A distributed checkpoint of tables that two processes wrote."""
    pytest.importorskip("torch.distributed.checkpoint")
    import socket
    from pathlib import Path

    folder = tmp_path_factory.mktemp("dcp") / "step-1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("tables_process.py")
    commands = [[sys.executable, str(script), str(rank), "2", port, str(folder)] for rank in range(2)]
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for c in commands]
    try:
        for process in running:
            text, _ = process.communicate(timeout=120)
            assert process.returncode == 0, text
    finally:
        for process in running:
            process.kill()
    return folder


BAGS = "model/sparse_arch/embedding_bag_collection/embedding_bags"


def bag(name):
    return f"*t_{name}.weight"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "columns", "of_rank_0", "of_rank_1"])
def test_sharded_tables_are_one(sharded, tmp_path, name):
    counts = tmp_path / "access.npy"
    np.save(counts, np.array([0, 9, 0, 0, 0, 0, 0, 0, 8, 0]))
    record = ckptflip.inject(
        sharded, tensors=bag(name), rows="hot:2", rows_weight=counts, ber=0.5, out=tmp_path / "out", seed=1
    )
    (entry,) = record.header.tensors
    assert entry.shape == (10, 4)
    assert {line.index[0] for line in record_files.lines(record)} == {1, 8}
    ckptflip.undo(tmp_path / "out", record)
    assert files_of(tmp_path / "out") == files_of(sharded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int8_columns"])
def test_sharded_quantised_tables_are_one(sharded, tmp_path, name):
    options = {"tensors": bag(name), "rowwise": "int8", "out": tmp_path / "out", "seed": 1, "ber": 0.3}
    record = ckptflip.inject(sharded, **options)
    shapes = {t.name.rpartition(".")[2]: t.shape for t in record.header.tensors}
    assert shapes == {"code": (10, 4), "scale": (10,), "bias": (10,)}
    ckptflip.undo(tmp_path / "out", record)
    assert files_of(tmp_path / "out") == files_of(sharded)


@pytest.mark.slow
def test_ranks_of_quantised_tables(sharded, tmp_path):
    options = {"rowwise": "int8", "ranks": "1", "ber": 0.9, "dry_run": True}
    record = ckptflip.inject(sharded, tensors=bag("int8"), **options)
    assert {line.index[0] for line in record_files.lines(record)} == {5, 6, 7, 8, 9}
    with pytest.raises(SelectionError):
        ckptflip.inject(sharded, tensors=bag("int8_columns"), **options)
