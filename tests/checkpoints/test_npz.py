"""numpy's files: every dtype and layout as numpy has it, archives of all kinds, headers that lie."""

import contextlib
import io
import struct
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from hostile import all_words, check, check_truncated, damaged
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.checkpoints import zip_rewrite
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.npz.literals import literal
from ckptflip.checkpoints.npz.opening import open_checkpoint
from ckptflip.errors import CheckpointError

# Two elements of two axes in Fortran order, made by hand from the format's description.
TEXT = b"{'descr': '>i2', 'fortran_order': True, 'shape': (2, 2), }\n"
DATA = struct.pack(">4h", 1, 2, 3, 4)
GOLDEN = b"\x93NUMPY\1\0" + struct.pack("<H", len(TEXT)) + TEXT + DATA
NUMBERS = [
    f"{o}{k}" for o in "<>" for k in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
]
STRUCTURE = np.dtype(
    [
        ("x", "<f4"),
        ("y", ">i2", (2, 3)),
        ("z", [("p", "u1"), ("q", "<c8", (2,))], (2,)),
        (("title", "t"), "|b1"),
        ("s", "S3"),
    ]
)


def npy(descr="'<f4'", shape="(2,)", fortran="False", data=bytes(8), version=(1, 0), text=None):
    text = text or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"
    raw = text.encode("utf-8" if version == (3, 0) else "latin-1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    return b"\x93NUMPY" + bytes(version) + length + raw + data


def saved(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.fixture
def opened(tmp_path):
    def make(data):
        path = tmp_path / "model.npz"
        path.write_bytes(data)
        return open_checkpoint(path)

    return make


def random(dtype, shape):
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(0).bytes(dtype.itemsize * int(np.prod(shape)))
    return np.frombuffer(raw, dtype).reshape(shape)


def words(array, part):
    return np.ascontiguousarray(array).reshape(-1).view(f"{array.dtype.byteorder}u{part}").tolist()


def test_golden_bytes(opened):
    found = opened(GOLDEN)
    (tensor,) = found.tensors
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.offset) == (
        "array",
        (2, 2),
        ">int16",
        len(GOLDEN) - 8,
    )
    assert tensor.layout == "contiguous, Fortran order"
    assert all_words(found)["array"].tolist() == [1, 3, 2, 4]
    assert np.load(io.BytesIO(GOLDEN)).tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("dtype", [*NUMBERS, "?", "i1", "u1"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_words_are_those_that_numpy_reads(opened, dtype, shape, order):
    array = np.array(random(dtype, shape), order=order)
    found = opened(saved(array))
    (tensor,) = found.tensors
    assert (tensor.shape, tensor.number.name) == (shape, array.dtype.name)
    assert all_words(found)["array"].tolist() == words(array, tensor.number.word_size)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(opened, version):
    out = io.BytesIO()
    array = random([("ü" if version == (3, 0) else "u", "<f4")], (3,))
    np.lib.format.write_array(out, array, version)
    found = all_words(opened(out.getvalue()))
    assert [w.tolist() for w in found.values()] == [words(array[array.dtype.names[0]], 4)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float4_e2m1fn", "int4"])
def test_of_most_types_of_ml_dtypes_a_file_keeps_only_the_size(opened, dtype):
    array = np.arange(4).astype(getattr(ml_dtypes, dtype))
    found = opened(saved(array))
    (tensor,) = found.tensors
    assert tensor.dtype == f"uint{8 * array.itemsize}"
    assert tensor.layout == "contiguous, type not stored"
    assert all_words(found)["array"].tolist() == words(array.view(f"u{array.itemsize}"), array.itemsize)


def test_float8_e5m2_has_a_name_that_numpy_writes_and_cannot_read(opened):
    array = np.arange(4).astype(ml_dtypes.float8_e5m2)
    assert [t.dtype for t in opened(saved(array)).tensors] == ["float8_e5m2"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_fields_of_structures(opened, order):
    array = np.array(random(STRUCTURE, (2, 2)), order=order)
    found = opened(saved(array))
    assert {t.name: (t.shape, t.dtype) for t in found.tensors} == {
        "array.x": ((2, 2), "float32"),
        "array.y": ((2, 2, 2, 3), ">int16"),
        "array.z.p": ((2, 2, 2), "uint8"),
        "array.z.q": ((2, 2, 2, 2), "complex64"),
        "array.t": ((2, 2), "bool"),
    }
    assert {n: w.tolist() for n, w in all_words(found).items()} == {
        "array.x": words(array["x"], 4),
        "array.y": words(array["y"], 2),
        "array.z.p": words(array["z"]["p"], 1),
        "array.z.q": words(array["z"]["q"], 4),
        "array.t": words(array["t"], 1),
    }
    assert [(s.name, s.reason) for s in found.skipped] == [("array.s", "strings")]


def test_padding_between_fields_is_no_field(opened):
    array = random(np.dtype([("a", "u1"), ("b", "<f8"), ("c", "<u2")], align=True), (3,))
    found = opened(saved(array))
    assert {n: w.tolist() for n, w in all_words(found).items()} == {
        "array.a": words(array["a"], 1),
        "array.b": words(array["b"], 8),
        "array.c": words(array["c"], 2),
    }


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([{}], object), "pickled Python objects, which are never loaded"),
        (np.array([(1, None)], [("a", "i4"), ("b", "O")]), "pickled Python objects, which are never loaded"),
        (np.array(["ab"]), "strings"),
        (np.array([b"ab"]), "strings"),
        (np.array(["2020-01-01"], "M8[D]"), "dates"),
        (np.array([3], "m8[s]"), "time spans"),
        (np.zeros(2, "V5"), "raw bytes of no stated type"),
        (np.zeros(2, np.longdouble), "of the dtype <f16, which has no IEEE layout"),
        (np.zeros(2, np.clongdouble), "of the dtype <c32, which has no IEEE layout"),
    ],
)
def test_what_is_left_out(opened, array, reason):
    found = opened(saved(array))
    assert [(s.name, s.reason) for s in found.skipped] == [("array", reason)]
    assert not found.tensors


def test_a_header_of_python_2(opened):
    text = "{'descr': [(u'a', '<i4'), ('b', '<i4')], 'fortran_order': False, 'shape': (1L,), }"
    assert {
        n: w.tolist() for n, w in all_words(opened(npy(text=text, data=struct.pack("<2i", 5, 6)))).items()
    } == {
        "array.a": [5],
        "array.b": [6],
    }


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (npy(shape="(3,)"), "needs 12 bytes; 8 follow"),
        (npy(shape="(-1,)"), "negative"),
        (npy(shape="(4611686018427387904, 4)"), "more elements"),
        (npy(shape="(0, 4611686018427387904)"), "more elements"),
        (npy(shape="2"), "its shape 2"),
        (npy(shape="(2.0,)"), "no literal"),
        (npy(shape="(True,)"), "its shape"),
        (npy(fortran="0"), "its order 0"),
        (npy(descr="'<x9'", data=b""), "needs 18 bytes"),
        (npy(descr="'float'"), "its dtype 'float' is none"),
        (npy(descr="'<f4' * 2"), "no literal"),
        (npy(descr="__import__('os').system('true')"), "no literal"),
        (npy(descr="7"), "its dtype 7 is none"),
        (npy(descr="[('a',)]"), "the member"),
        (npy(descr="[('a', '<f4', -1)]"), "negative"),
        (npy(descr="[('a', '<f4'), ('a', '<i4')]"), "two fields named 'a'"),
        (npy(descr="[('a', '<f4', (9999999999, 9999999999))]"), "more elements"),
        (npy(text="[" * 5000), "no literal"),
        (npy(text="{'descr': '<f4'}"), "no dict of"),
        (npy(text="{'a': 1, 'a': 2}"), "'a' twice"),
        (npy(text="('<f4', False, (2,)) x"), "no literal"),
        (npy(text="('<f4', False, (2,)) 1"), "goes on after"),
        (npy(text="['a' 'b']"), "lacks a comma"),
        (npy(text="{'a', 'b'}"), "lacks a colon"),
        (npy(text="'\\U99999999'"), "the character"),
        (npy(version=(4, 0)), "version is 4.0"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "claims 4294967295 bytes"),
        (b"\x93NUMPY\1\0\xff\xff{}", "ends within its header"),
        (b"\x93NUMPY\3\0\1\0\0\0\xff", "not UTF-8"),
    ],
)
def test_headers_that_lie(opened, file, why):
    with pytest.raises(CheckpointError, match=why):
        opened(file)


def test_truncated_at_every_byte(tmp_path):
    check_truncated(open_checkpoint, tmp_path / "a.npy", GOLDEN, len(GOLDEN))


values = st.recursive(
    st.text() | st.integers(-(10**18), 10**18) | st.booleans() | st.none(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(values)
def test_literals_are_read_as_they_were_written(value):
    assert literal(repr(value)) == value


@given(st.text(alphabet="[](){}:,'\"\\ux0123456789LTrueNone \n-", max_size=40))
def test_what_is_no_literal_is_said_to_be_none(text):
    with contextlib.suppress(DamagedError):
        literal(text)


ARRAYS = {
    "conv.weight": np.random.default_rng(0).normal(size=(50, 4)).astype("f4"),
    "deep/er": np.asfortranarray(np.arange(600, dtype=">u2").reshape(20, 30)),
    "scalar": np.float64(3),
    "empty": np.zeros((0, 3)),
}


def archive(
    method=zipfile.ZIP_STORED,
    *,
    arrays=ARRAYS,
    methods=(),
    stream=False,
    prefix=b"",
    comment=b"",
    zip64=False,
):
    """An .npz made by zipfile, in ways that numpy itself does not use."""

    class Stream(io.RawIOBase):
        data = bytearray(prefix)

        def writable(self):
            return True

        def write(self, data):
            Stream.data += data
            return len(data)

    out = Stream() if stream else io.BytesIO(prefix)
    out.seek(0, 2) if not stream else None
    with zipfile.ZipFile(out, "a" if prefix and not stream else "w", method) as made:
        made.comment = comment
        for i, (name, array) in enumerate(arrays.items()):
            info = zipfile.ZipInfo(f"{name}.npy", (2001, 2, 3, 4, 5, 6))
            info.compress_type = methods[i] if methods else method
            with made.open(info, "w", force_zip64=zip64) as member:
                member.write(saved(np.asanyarray(array)))
    return bytes(Stream.data) if stream else out.getvalue()


MIXED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)
KINDS = {
    "stored": archive(),
    "deflated": archive(zipfile.ZIP_DEFLATED),
    "mixed": archive(methods=MIXED),
    "zip64": archive(zipfile.ZIP_DEFLATED, zip64=True),
    "stream": archive(zipfile.ZIP_DEFLATED, stream=True),
    "stream64": archive(methods=MIXED, stream=True, zip64=True),
    "prefix": archive(zipfile.ZIP_DEFLATED, prefix=b"#!/bin/sh\n", comment=b"a comment"),
    "stored stream": archive(stream=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_archives_of_all_kinds(opened, kind):
    found = opened(KINDS[kind])
    assert [t.name for t in found.tensors] == list(ARRAYS)
    assert all_words(found)["deep/er"].tolist() == words(ARRAYS["deep/er"], 2)
    assert found.tensors[0].offset is None or "deflated" not in found.tensors[0].layout


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "prefix"])
@pytest.mark.parametrize("checksum", ["repair", "leave"])
@pytest.mark.parametrize("in_place", [False, True])
def test_numpy_loads_exactly_the_planned_words(tmp_path, kind, checksum, in_place):
    path = tmp_path / "a.npz"
    path.write_bytes(KINDS[kind])
    out = path if in_place else tmp_path / "b.npz"
    where = {"in_place": True} if in_place else {"out": out}
    record = ckptflip.inject(path, count=12, seed=3, tensors=["conv*", "deep"], checksum=checksum, **where)
    infos = [zipfile.ZipFile(io.BytesIO(data)).infolist() for data in (KINDS[kind], out.read_bytes())]
    kept = [
        [(i.filename, i.date_time, i.flag_bits, i.compress_type, i.extra) for i in each] for each in infos
    ]
    assert kept[0] == kept[1]
    hit = {record.header.tensors[t].name for t in record.plan.tensor.tolist()}
    with np.load(out) as now:
        for name, array in ARRAYS.items():
            if checksum == "leave" and name in hit:
                with pytest.raises(zipfile.BadZipFile, match="CRC"):
                    now[name]
                continue
            size = array.dtype.itemsize
            before, after = words(np.asanyarray(array), size), words(now[name], size)
            rows = [
                i for i, t in enumerate(record.plan.tensor.tolist()) if record.header.tensors[t].name == name
            ]
            masks = record.plan.before ^ record.plan.after
            assert {w: b ^ a for w, (b, a) in enumerate(zip(before, after, strict=True)) if b != a} == {
                int(record.plan.word[i]): int(masks[i]) for i in rows
            }
    assert ckptflip.undo(out, record).restored == len(record)
    with np.load(out) as now:
        assert all(
            words(now[n], a.dtype.itemsize) == words(np.asanyarray(a), a.dtype.itemsize)
            for n, a in ARRAYS.items()
        )


@pytest.mark.parametrize("kind", ["zip64", "stream64", "stream", "prefix"])
def test_members_that_are_not_altered_keep_every_byte(tmp_path, kind):
    path = tmp_path / "a.npz"
    path.write_bytes(KINDS[kind])
    data = bytearray(saved(ARRAYS["deep/er"]))
    data[-1] ^= 1
    zip_rewrite.rewrite(path, {"deep/er.npy": np.frombuffer(bytes(data), np.uint8)}, "repair")
    now = path.read_bytes()
    one, other = (zipfile.ZipFile(io.BytesIO(d)) for d in (KINDS[kind], now))
    assert other.testzip() is None and other.read("deep/er.npy") == bytes(data)
    grown = len(now) - len(KINDS[kind])
    assert [i.header_offset for i in other.infolist()] == [
        i.header_offset + (grown if n > 1 else 0) for n, i in enumerate(one.infolist())
    ]
    altered, after = (i.header_offset for i in one.infolist()[1:3])
    assert now[:altered] == KINDS[kind][:altered]
    assert now[after + grown : one.start_dir + grown] == KINDS[kind][after : one.start_dir]
    assert other.comment == one.comment


def test_a_checksum_that_was_wrong_stays_wrong_by_as_much(tmp_path):
    data = bytearray(KINDS["deflated"])
    info = zipfile.ZipFile(io.BytesIO(KINDS["deflated"])).getinfo("deep/er.npy")
    for place in (info.header_offset + 14, bytes(data).rindex(struct.pack("<L", info.CRC))):
        data[place] ^= 0x40
    path = tmp_path / "a.npz"
    path.write_bytes(bytes(data))
    ckptflip.inject(path, out=tmp_path / "b.npz", tensors="deep", count=3, seed=1)
    wrong = zipfile.ZipFile(tmp_path / "b.npz").getinfo("deep/er.npy")
    raw = (tmp_path / "b.npz").read_bytes()
    n, extra = struct.unpack_from("<2H", raw, wrong.header_offset + 26)
    start = wrong.header_offset + 30 + n + extra
    contents = zlib.decompress(raw[start : start + wrong.compress_size], -15)
    assert wrong.CRC ^ zlib.crc32(contents) == 0x40


def test_members_that_are_no_arrays_are_left_out(opened):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("README", "hello")
        made.writestr("a.npy", saved(np.arange(3)))
        made.writestr("b.npy", saved(np.arange(3)), zipfile.ZIP_BZIP2)
        made.writestr("c.npy", saved(np.zeros(1, [("x", "f4")])))
        made.writestr("c.x.npy", saved(np.arange(3)))
    found = opened(out.getvalue())
    assert [t.name for t in found.tensors] == ["a", "c.x"]
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("README", "no .npy file"),
        ("b.npy", "compressed by method 12, which numpy never uses"),
        ("c.x", "another array has the same name"),
    ]


def test_a_zip_bomb_is_seen_before_it_goes_off(opened):
    data = bytearray(archive(zipfile.ZIP_DEFLATED, arrays={"a": np.zeros(9)}))
    info = zipfile.ZipFile(io.BytesIO(bytes(data))).infolist()[0]
    text = struct.pack("<L", info.file_size)
    bomb = bytes(data).replace(text, struct.pack("<L", 1 << 30))
    with pytest.raises(CheckpointError, match="cannot unpack to the 1073741824"):
        opened(bomb)


def test_a_member_that_unpacks_to_another_size(opened):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.npy", saved(np.arange(100)) + b"more")
    size = zipfile.ZipFile(out).infolist()[0].file_size
    for claimed in (size - 1, size + 1):
        found = opened(out.getvalue().replace(struct.pack("<L", size), struct.pack("<L", claimed)))
        with pytest.raises(CheckpointError, match=f"of its {claimed} bytes|than the {claimed} bytes"):
            found.read(0, np.arange(3))


SMALL = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros(3, STRUCTURE)}


@settings(max_examples=2000)
@given(
    damaged(
        [
            GOLDEN,
            saved(np.zeros(2, STRUCTURE)),
            npy(version=(3, 0)),
            archive(arrays=SMALL),
            archive(zipfile.ZIP_DEFLATED, arrays=SMALL),
            archive(zipfile.ZIP_DEFLATED, arrays=SMALL, stream=True),
        ]
    )
)
def test_damaged_files(tmp_path_factory, data):
    check(open_checkpoint, tmp_path_factory.getbasetemp() / "damaged.npz", data)
