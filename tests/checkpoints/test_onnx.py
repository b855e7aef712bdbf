"""ONNX models: every data type in every way of storing it, wherever a tensor may be; files that lie."""

import os
import shutil
import struct

import numpy as np
import pytest
from hostile import all_words, check, damaged
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.bits import lookup
from ckptflip.checkpoints.onnx.opening import open_checkpoint, relocated
from ckptflip.checkpoints.onnx.varints import parsed
from ckptflip.errors import CheckpointError, UsageError

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

# What onnx knows and no array can be made of.
NO_NUMBERS = {"UNDEFINED", "STRING"}
KINDS = {name: kind for name, kind in TensorProto.DataType.items() if name not in NO_NUMBERS}
SHAPE = (3, 5)


def field(number, data):
    """A length-delimited field, made by hand."""
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


# graph { initializer { dims: 2 data_type: FLOAT name: "w" raw_data } initializer { dims: 2 data_type: INT32
# int32_data: 5, -1 name: "b" } }
WEIGHT = b"\x08\2\x10\1" + field(8, b"w") + field(9, struct.pack("<2f", 1.0, -2.0))
BIAS = b"\x08\2\x10\6" + field(5, b"\5" + b"\xff" * 9 + b"\1") + field(8, b"b")
GOLDEN = b"\x08\x0a" + field(7, field(5, WEIGHT) + field(5, BIAS))


def tensor_of(kind, name, raw, seed=0):
    """A tensor with random bits, as far as its type allows any."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    number = lookup(dtype)
    rng = np.random.default_rng(seed)
    if kind == TensorProto.BOOL:
        words = rng.integers(0, 2, SHAPE, dtype=np.uint8)
    else:
        words = rng.integers(0, 1 << min(number.part_width, 63), (*SHAPE, number.parts)).astype(
            number.word_dtype
        )
    array = words.reshape(-1).view(dtype).reshape(SHAPE) if number.part_width >= 8 else words.reshape(SHAPE)
    if raw:
        if number.part_width < 8:
            bits = np.unpackbits(array[..., None], axis=-1, count=number.part_width, bitorder="little")
            data = np.packbits(bits.reshape(-1), bitorder="little").tobytes()
        else:
            data = array.tobytes()
        return TensorProto(dims=SHAPE, data_type=kind, name=name, raw_data=data)
    made = TensorProto(dims=SHAPE, data_type=kind, name=name)
    storage = helper.tensor_dtype_to_field(kind)
    if storage in ("float_data", "double_data"):
        getattr(made, storage).extend(
            array.reshape(-1).view("f4" if storage == "float_data" else "f8").tolist()
        )
    elif number.part_width in (2, 4):
        each = 8 // number.part_width
        padded = np.zeros(-(-array.size // each) * each, np.uint8)
        padded[: array.size] = array.reshape(-1)
        getattr(made, storage).extend(
            (padded.reshape(-1, each) << np.arange(0, 8, number.part_width)).sum(1).tolist()
        )
    else:
        signed = array.dtype.kind in "iu"
        getattr(made, storage).extend((array if signed else words).reshape(-1).tolist())
    return made


def words_of(tensor, folder=""):
    array = np.ascontiguousarray(numpy_helper.to_array(tensor, str(folder)))
    number = lookup(array.dtype)
    return array.reshape(-1).view(number.word_dtype) & ((1 << number.part_width) - 1)


def model(initializers=(), nodes=(), **more):
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(initializers), **more))


def initializers(path):
    return {t.name: words_of(t) for t in onnx.load(path).graph.initializer}


def finite(tensor):
    """The same tensor without NaNs: a float as Python has it does not keep all of their bits."""
    if tensor.data_type in (TensorProto.FLOAT, TensorProto.COMPLEX64):
        for i, value in enumerate(tensor.float_data):
            tensor.float_data[i] = value if value == value else 1.5
    return tensor


@pytest.fixture
def opened(tmp_path):
    def make(data):
        path = tmp_path / "model.onnx"
        path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
        return open_checkpoint(path)

    return make


def test_golden_bytes(opened):
    found = opened(GOLDEN)
    assert [(t.name, t.shape, t.dtype, t.layout, t.offset) for t in found.tensors] == [
        ("w", (2,), "float32", "contiguous", 15),
        ("b", (2,), "int32", "varints", None),
    ]
    assert {n: w.tolist() for n, w in all_words(found).items()} == {
        "w": [0x3F800000, 0xC0000000],
        "b": [5, 0xFFFFFFFF],
    }
    assert [words_of(t).tolist() for t in onnx.load_from_string(GOLDEN).graph.initializer] == [
        [0x3F800000, 0xC0000000],
        [5, 0xFFFFFFFF],
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "field"])
def test_words_are_those_that_onnx_reads(opened, name, raw):
    tensor = finite(tensor_of(KINDS[name], "w", raw))
    found = opened(model([tensor]))
    assert [(t.name, t.shape) for t in found.tensors] == [("w", SHAPE)]
    assert found.tensors[0].number == lookup(helper.tensor_dtype_to_np_dtype(KINDS[name]))
    assert all_words(found)["w"].tolist() == words_of(tensor).tolist()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["raw", "field", "external"])
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_onnx_loads_exactly_the_planned_words(tmp_path, name, kind, in_place):
    tensors = [finite(tensor_of(KINDS[name], f"w{i}", kind != "field", i)) for i in range(3)]
    path = tmp_path / "model.onnx"
    onnx.save(model(tensors), path, save_as_external_data=kind == "external", location="w", size_threshold=0)
    original = path.read_bytes()
    before = initializers(path)
    out = path if in_place else tmp_path / "other.onnx"
    record = ckptflip.inject(path, **({"in_place": True} if in_place else {"out": out}), count=15, seed=5)
    after = initializers(out)
    found = {
        (n, int(w)): int(before[n][w] ^ after[n][w])
        for n in before
        for w in np.flatnonzero(before[n] != after[n])
    }
    names = [t.name for t in record.header.tensors]
    plan = record.plan
    columns = (plan.tensor.tolist(), plan.word.tolist(), (plan.before ^ plan.after).tolist())
    assert found == {(names[t], w): m for t, w, m in zip(*columns, strict=True)}
    assert ckptflip.undo(out, record).restored == len(record)
    assert {n: w.tolist() for n, w in initializers(out).items()} == {n: w.tolist() for n, w in before.items()}
    if in_place:
        assert path.read_bytes() == original


def constant(name, array):
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.asarray(array, "f4"), "x")
    )


def test_tensors_wherever_they_are(opened):
    one = numpy_helper.from_array(np.float32([1]), "w")
    inner = helper.make_graph([constant("c", [2])], "inner", [], [], [one])
    loop = helper.make_node("Loop", [], ["y"], body=inner)
    branch = helper.make_graph([loop], "branch", [], [], [one])
    sparse = helper.make_sparse_tensor(numpy_helper.from_array(np.float32([3]), "s"), one_index(), [4])
    unnamed = numpy_helper.from_array(np.float32([4]))
    made = model(
        [one, unnamed],
        [
            helper.make_node("If", [], ["z"], name="choice", then_branch=branch, else_branch=branch),
            constant("k", [5]),
            helper.make_node("Op", [], ["m"], values=[one, one]),
            helper.make_node("Constant", [], ["sp"], sparse_value=sparse),
        ],
        sparse_initializer=[sparse],
    )
    function = helper.make_function("d", "f", [], ["o"], [constant("o", [6])], [])
    made.functions.append(function)
    training = made.training_info.add()
    training.algorithm.CopyFrom(inner)
    found = opened(made)
    words = {
        n: w.view("f4").tolist()[0] if w.dtype == "u4" else w.tolist()[0] for n, w in all_words(found).items()
    }
    assert words == {
        "choice/then_branch/y/body/c": 2,
        "choice/then_branch/y/body/w": 1,
        "choice/then_branch/w": 1,
        "choice/else_branch/y/body/c": 2,
        "choice/else_branch/y/body/w": 1,
        "choice/else_branch/w": 1,
        "k": 5,
        "m/values/0": 1,
        "m/values/1": 1,
        "sp.values": 3,
        "sp.indices": 2,
        "w": 1,
        "initializer/1": 4,
        "s.values": 3,
        "s.indices": 2,
        "training/0/algorithm/c": 2,
        "training/0/algorithm/w": 1,
        "functions/0/o": 6,
    }


def one_index():
    return numpy_helper.from_array(np.array([2]), "i")


def test_what_is_left_out(opened):
    made = model(
        [
            helper.make_tensor("text", TensorProto.STRING, [1], [b"x"]),
            TensorProto(dims=[1], data_type=99, name="new", raw_data=b"x"),
            TensorProto(dims=[2], data_type=1, name="short", raw_data=bytes(7)),
            TensorProto(dims=[2], data_type=1, name="missing"),
            TensorProto(dims=[-2], data_type=1, name="negative", raw_data=b""),
            TensorProto(dims=[1 << 62, 4], data_type=1, name="huge", raw_data=b""),
            TensorProto(dims=[9], data_type=6, name="few", int32_data=[1, 2]),
            TensorProto(dims=[1], data_type=1, name="twice", raw_data=bytes(4)),
            TensorProto(dims=[1], data_type=1, name="twice", raw_data=bytes(4)),
            TensorProto(
                dims=[1],
                data_type=1,
                name="part",
                raw_data=bytes(4),
                segment=TensorProto.Segment(begin=0, end=1),
            ),
            TensorProto(dims=[0], data_type=1, name="none"),
        ]
    )
    found = opened(made)
    assert [t.name for t in found.tensors] == ["twice", "none"]
    assert {s.name: s.reason for s in found.skipped} == {
        "text": "strings",
        "new": "of the data type 99, which is not known",
        "short": "damaged: its shape [2] needs 8 bytes, not 7",
        "missing": "damaged: its numbers are missing",
        "negative": "damaged: its shape [-2] has a negative length",
        "huge": f"damaged: its shape [{1 << 62}, 4] has more elements than any file can hold",
        "few": "damaged: its shape [9] needs 9 numbers",
        "part": "a segment of a larger tensor",
        "twice": "another array has the same name",
    }


def test_numbers_one_by_one_are_left_out(opened):
    unpacked = b"\x08\2\x10\6" + b"\x28\5\x28\6" + field(8, b"b")
    found = opened(field(7, field(5, unpacked)))
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("b", "its numbers are stored one by one; save the model anew")
    ]


def test_a_list_with_another_count_of_numbers(opened):
    found = opened(model([TensorProto(dims=[2], data_type=6, name="w", int32_data=[1, 2, 3])]))
    with pytest.raises(CheckpointError, match="a list of 2 numbers holds 3"):
        found.read(0, np.arange(2))


@given(st.lists(st.integers(0, (1 << 64) - 1)))
def test_varints_are_read_as_protobuf_writes_them(values):
    # After the tag and the length.
    raw = TensorProto(uint64_data=values).SerializeToString()
    packed = np.frombuffer(raw, np.uint8)[-sum(max(1, -(-v.bit_length() // 7)) for v in values) or len(raw) :]
    found, starts = parsed(packed, len(values))
    assert found.tolist() == values and starts.size == len(values)


def test_lengths_of_all_that_holds_a_number_follow_it(tmp_path):
    """A number that grows from one byte to ten, in a list that grows past 127 bytes, five messages deep."""
    path = tmp_path / "model.onnx"
    values = np.zeros(120, "i8")
    inner = helper.make_graph(
        [], "inner", [], [], [TensorProto(dims=[120], data_type=7, name="w", int64_data=values)]
    )
    onnx.save(model([], [helper.make_node("If", [], ["z"], name="if", then_branch=inner)]), path)
    record = ckptflip.inject(path, in_place=True, count=9, bits="63", seed=1)
    loaded = onnx.load(path)
    (tensor,) = loaded.graph.node[0].attribute[0].g.initializer
    expected = values.copy()
    expected[record.plan.word] = np.iinfo("i8").min
    assert numpy_helper.to_array(tensor).tolist() == expected.tolist()
    onnx.checker.check_model(model())


@pytest.fixture
def outside(tmp_path):
    """A model with tensors inside it and in two files beside it, one of them in a folder."""
    folder = tmp_path / "set"
    (folder / "more").mkdir(parents=True)
    made = model([numpy_helper.from_array(np.float32([i] * 300), f"w{i}") for i in range(4)])
    made.graph.initializer.append(TensorProto(dims=[300], data_type=6, name="n", int32_data=range(300)))
    big = np.arange(600, dtype="f4")
    for tensor, location, offset in ((0, "model.data", 0), (1, "model.data", 1200), (2, "more/rest", 0)):
        each = made.graph.initializer[tensor]
        each.ClearField("raw_data")
        each.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": 1200}.items():
            each.external_data.add(key=key, value=str(value))
    (folder / "model.data").write_bytes(big.tobytes())
    (folder / "more" / "rest").write_bytes(big[:300].tobytes())
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def test_external_data(outside):
    found = open_checkpoint(outside)
    assert [(t.name, t.layout, t.offset) for t in found.tensors[:3]] == [
        ("w0", "external", 0),
        ("w1", "external", 1200),
        ("w2", "external", 0),
    ]
    assert [f.name for f in found.files] == ["model.onnx", "model.data", "rest"]
    words = all_words(found)
    assert {n: w.tolist() for n, w in words.items()} == {
        n: w.tolist() for n, w in initializers(outside).items()
    }


@pytest.mark.parametrize("name", ["x.onnx", "a.much.longer.name.onnx"])
def test_a_copy_names_files_of_its_own(outside, name):
    """The numbers inside the model move, since the names in it grow or shrink; all the right ones are hit."""
    before, untouched = initializers(outside), sorted(outside.parent.rglob("*"))
    out = outside.with_name(name)
    record = ckptflip.inject(outside, out=out, count=60, seed=1)
    assert {t.name for t in record.header.tensors} == set(before)
    after = initializers(out)
    bits = sum(int(np.bitwise_count(before[n] ^ after[n]).sum()) for n in before)
    names, plan = [t.name for t in record.header.tensors], record.plan
    for tensor, word, value in zip(
        plan.tensor.tolist(), plan.word.tolist(), plan.after.tolist(), strict=True
    ):
        assert after[names[tensor]][word] == value
    assert bits == record.bits_effective == 60
    stem = name.removesuffix(".onnx")
    new = {p.name for p in outside.parent.rglob("*")} - {p.name for p in untouched}
    assert new == {name, f"{name}.flips.jsonl", f"{stem}.data", f"{stem}-more-rest"}
    ckptflip.undo(out, record)
    assert {n: w.tolist() for n, w in initializers(out).items()} == {n: w.tolist() for n, w in before.items()}


def test_in_another_folder_names_stay(outside, tmp_path):
    shutil.rmtree(outside.parent / "more")
    made = onnx.load(outside, load_external_data=False)
    del made.graph.initializer[2]
    outside.write_bytes(made.SerializeToString())
    out = tmp_path / "other" / "model.onnx"
    out.parent.mkdir()
    ckptflip.inject(outside, out=out, count=1, tensors="w0", seed=1)
    assert out.read_bytes() == outside.read_bytes()
    assert {p.name for p in out.parent.iterdir()} == {"model.onnx", "model.data", "model.onnx.flips.jsonl"}


def test_names_that_would_meet_are_numbered(outside):
    found = open_checkpoint(outside)
    shutil.copy(outside.parent / "model.data", outside.parent / "x")
    names = [n.path.name for n in found.renamed(outside.with_name("model-more-rest.onnx"))]
    assert len(set(names)) == 3
    with pytest.raises(UsageError):
        ckptflip.inject(outside, out=outside.with_name("model.data"), overwrite=True, count=1)


def test_relocated(outside):
    made = onnx.load_from_string(relocated(outside, {"model.data": "n" * 300}))
    locations = [e.value for t in made.graph.initializer for e in t.external_data if e.key == "location"]
    assert locations == ["n" * 300, "n" * 300, "more/rest"]
    assert relocated(outside, {}) == outside.read_bytes()


def test_tensors_that_are_the_same_bytes_are_one(outside):
    made = onnx.load(outside, load_external_data=False)
    for name, kind in (("tied", 1), ("other type", 6)):
        each = made.graph.initializer.add()
        each.CopyFrom(made.graph.initializer[0])
        each.name, each.data_type = name, kind
    outside.write_bytes(made.SerializeToString())
    found = open_checkpoint(outside)
    assert {t.name: t.aliases for t in found.tensors if t.aliases} == {"w0": ("tied",)}
    assert [(s.name, s.reason) for s in found.skipped] == [("other type", "shares bytes with w0")]


@pytest.mark.parametrize(
    "location",
    ["../model.data", "/etc/passwd", "more/../model.data", "..", "", "a\\b", "a\0b", "model.onnx", "link"],
)
def test_files_elsewhere_are_refused(outside, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(1200))
    (outside.parent / "link").symlink_to(tmp_path / "secret")
    outside.write_bytes(relocated(outside, {"model.data": location}))
    with pytest.raises(CheckpointError, match=r"own folder|link to elsewhere|is missing"):
        open_checkpoint(outside)


def test_a_link_beside_its_file_is_that_file(outside):
    (outside.parent / "more" / "link").symlink_to(outside.parent / "model.data")
    outside.write_bytes(relocated(outside, {"more/rest": "more/link"}))
    found = open_checkpoint(outside)
    assert len(found.files) == 2
    assert {t.name: t.aliases for t in found.tensors if t.aliases} == {"w0": ("w2",)}
    before = all_words(found)["w0"].tolist()
    out = outside.with_name("b.onnx")
    ckptflip.inject(outside, out=out, count=1, tensors="w0", seed=1)
    after = initializers(out)
    assert after["w0"].tolist() == after["w2"].tolist() != before


def test_a_missing_file(outside):
    (outside.parent / "model.data").unlink()
    with pytest.raises(CheckpointError, match=r"'model\.data', which is missing"):
        open_checkpoint(outside)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("offset", "-1", "its offset is '-1'"),
        ("offset", "9" * 20, "its offset is"),
        ("offset", "x", "its offset is 'x'"),
        ("length", "1199", "needs 1200 bytes, not 1199"),
        ("length", "", "its length is ''"),
    ],
)
def test_external_data_that_lie(outside, key, value, why):
    made = onnx.load(outside, load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        entry.value = value if entry.key == key else entry.value
    outside.write_bytes(made.SerializeToString())
    assert why in {s.name: s.reason for s in open_checkpoint(outside).skipped}["w0"]


def test_external_data_beyond_the_end_of_its_file(outside):
    with (outside.parent / "model.data").open("r+b") as file:
        file.truncate(2399)
    with pytest.raises(CheckpointError, match="w1 would lie at bytes 1200 to 2400 of a file of 2399"):
        open_checkpoint(outside)


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    onnx.save(model([numpy_helper.from_array(np.zeros(1 << 20, "f4"), f"w{i}") for i in range(3)]), path)
    real, read = os.pread, [0]

    def pread(fd, count, offset):
        read[0] += count
        return real(fd, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert len(open_checkpoint(path).tensors) == 3
    assert read[0] < 1 << 19


def test_graphs_in_graphs_without_end(opened):
    graph = b""
    for _ in range(40):
        # graph { node { attribute { g } } }, with lengths of two bytes.
        for number in (6, 5, 1):
            graph = bytes([number << 3 | 2, len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph
    with pytest.raises(CheckpointError, match="graphs in graphs, more than 32 deep"):
        opened(bytes([7 << 3 | 2, len(graph) & 0x7F | 0x80, len(graph) >> 7]) + graph)


def test_truncated_at_every_byte(tmp_path):
    # After two bytes it is a sound model without a graph.
    path = tmp_path / "a.onnx"
    for length in range(3, len(GOLDEN)):
        path.write_bytes(GOLDEN[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            open_checkpoint(path)


def small():
    tensors = [tensor_of(kind, name, raw) for name, kind in KINDS.items() for raw in (True, False)][:16]
    inner = helper.make_graph([constant("c", [2])], "inner", [], [], tensors[:2])
    return model(tensors[::3], [helper.make_node("If", [], ["z"], then_branch=inner)]).SerializeToString()


def external():
    tensor = TensorProto(dims=[2], data_type=1, name="w", data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "data", "offset": "4", "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    return model([tensor, finite(tensor_of(1, "v", True))]).SerializeToString()


@settings(max_examples=2000)
@given(damaged([GOLDEN, small(), external()]))
def test_damaged_files(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "data").write_bytes(bytes(16))
    check(open_checkpoint, folder / "damaged.onnx", data)
