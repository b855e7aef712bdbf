"""Records on disk: what is written is read back to the last bit; what is damaged is refused."""

import json
import math
import random

import h5py
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptflip import record_files
from ckptflip.bits import lookup
from ckptflip.errors import RecordError, UsageError
from ckptflip.faults import Plan, Policy, Tensor
from ckptflip.faults.plan import COLUMNS, KINDS, draw, empty
from ckptflip.faults.record import SCHEMA, Header, Record, counts_of, entries_of

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float6_e2m3fn"),
    *("float4_e2m1fn", "complex128", "complex64", "complex32", "bcomplex32"),
    *("int8", "uint64", "int64", "int4", "uint1", "bool"),
]
SUFFIXES = (".jsonl", ".h5")


def make(plan, tensors, policies=(), seed=5):
    entries, renumbered = entries_of(plan, tensors)
    header = Header(
        ckptflip="0",
        schema=SCHEMA,
        created="2026-01-01T00:00:00+00:00",
        checkpoint="a.h5",
        output="b.h5",
        format="hdf5",
        checksum="repair",
        seed=seed,
        policies=tuple(policies),
        size=100,
        counts=counts_of(plan),
        tensors=entries,
        versions={"python": "3"},
        digest_before="sha256:00",
    )
    return Record(header, renumbered)


@st.composite
def records(draw_):
    """Any words at all, any masks of them hit: NaN of every kind, infinities and garbage bits included."""
    tensors, columns = [], {c: [] for c in COLUMNS}
    for t in range(draw_(st.integers(1, 4))):
        number = lookup(draw_(st.sampled_from(DTYPES)))
        shape = tuple(draw_(st.lists(st.integers(1, 5), max_size=3)))
        order = draw_(st.sampled_from("<>"))
        tensors.append(
            Tensor(name=f"t{t}é", shape=shape, number=number, order=order, layer="l", aliases=("x",))
        )
        top = (1 << number.part_width) - 1
        for w in sorted(draw_(st.sets(st.integers(0, tensors[-1].words - 1), max_size=6))):
            hit = draw_(st.integers(1, top))
            before = draw_(st.integers(0, top))
            row = (
                t,
                w,
                hit,
                before,
                before ^ (hit & draw_(st.integers(0, top))),
                draw_(st.integers(1, 2**16 - 1)),
            )
            for c, value in zip(COLUMNS, row, strict=True):
                columns[c].append(value)
    plan = Plan(*(np.array(columns[c], kind) for c, kind in zip(COLUMNS, KINDS, strict=True)))
    return make(plan, tensors)


def assert_same(found, record):
    assert found.header == record.header
    for c, kind in zip(COLUMNS, KINDS, strict=True):
        assert getattr(found.plan, c).dtype == kind
        assert getattr(found.plan, c).tolist() == getattr(record.plan, c).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(records())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_record_is_read_back_to_the_last_bit(folder, suffix, record):
    path = folder / f"r{suffix}"
    record_files.write(record, path, overwrite=True)
    found = record_files.read(path)
    assert_same(found, record)
    assert found.path == str(path)
    assert list(record_files.lines(found)) == list(record_files.lines(record))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_record(tmp_path, suffix):
    record = make(empty(), [])
    record_files.write(record, tmp_path / f"r{suffix}", overwrite=False)
    assert_same(record_files.read(tmp_path / f"r{suffix}"), record)


TENSORS = [
    Tensor(name="a", shape=(2, 3), number=lookup("float32"), layer="a", role="weight"),
    Tensor(name="c", shape=(2,), number=lookup("complex64"), order=">"),
    Tensor(name="n", shape=(), number=lookup("int8")),
    Tensor(name="f4", shape=(3,), number=lookup("float4_e2m1fn")),
]
WORDS = {
    0: [0x3F800000, 0x7F800001, 0xFF800000, 0, 1, 2],
    1: [0x40000000, 0x7FC00000, 3, 4],
    2: [0x80],
    3: [7, 0xA8, 1],
}


@pytest.fixture
def record():
    def read(tensor, words):
        return np.array(WORDS[tensor], TENSORS[tensor].number.word_dtype)[words]

    policies = [Policy(fraction=1.0, bits="!0"), Policy(bits="0", count=2)]
    return make(draw(policies, TENSORS, read, 1), TENSORS, policies, 1)


@pytest.fixture(params=SUFFIXES)
def written(record, tmp_path, request):
    path = tmp_path / f"r{request.param}"
    record_files.write(record, path, overwrite=False)
    return path


@pytest.fixture
def text(record, tmp_path):
    path = tmp_path / "r.jsonl"
    record_files.write(record, path, overwrite=False)
    return path


def test_garbage_beside_a_narrow_number_can_be_undone(written, record):
    """A word before of 0xa8 for a float4 in a byte: undo needs all of it."""
    assert 0xA8 in record.plan.before.tolist()
    assert_same(record_files.read(written), record)


def test_lines_say_what_was_hit(text):
    lines = [json.loads(line) for line in text.read_bytes().splitlines()][1:]
    first, nan = lines[0], lines[1]
    assert (first["tensor"], first["element"], first["index"]) == ("a", 0, [0, 0])
    assert first["before"] == "3f800000"
    assert first["value_before"] == 1.0
    assert int(first["before"], 16) ^ int(first["after"], 16) == sum(1 << b for b in first["bits"])
    assert (nan["before"], nan["value_before"]) == ("7f800001", "nan")
    assert lines[2]["value_before"] == "-inf"
    imaginary = [line for line in lines if line["tensor"] == "c" and line.get("part") == 1]
    assert [line["element"] for line in imaginary] == [0, 1]
    assert min(b for line in imaginary for b in line["bits"]) >= 32
    scalar = next(line for line in lines if line["tensor"] == "n")
    assert (scalar["index"], scalar["before"], scalar["value_before"]) == ([], "80", -128)
    assert {tuple(line.get("policies", [0])) for line in lines} == {(0,), (0, 1)}


def test_lines_can_be_asked_for_in_part(record):
    every = list(record_files.lines(record))
    assert list(record_files.lines(record, slice(3, 9))) == every[3:9]
    assert len(every) == len(record)


def test_an_existing_record_is_kept_unless_told(record, text):
    with pytest.raises(UsageError, match="exists"):
        record_files.write(record, text, overwrite=False)
    before = text.read_bytes()
    record_files.write(record, text, overwrite=True, durable=True)
    assert text.read_bytes() == before
    assert [p.name for p in text.parent.iterdir()] == ["r.jsonl"]


def refused(path, message=""):
    with pytest.raises(RecordError) as caught:
        record_files.read(path)
    assert message in str(caught.value)
    assert path.name in str(caught.value)


def test_missing(tmp_path):
    refused(tmp_path / "none.jsonl", "No such file")
    refused(tmp_path, "not a plain file")


# How a line of a fault is changed, and what is said of it. The line is that of a's element 1.
LINES = {
    "unknown tensor": ({"tensor": "zzz"}, "line 3: its header names no tensor 'zzz'"),
    "bad hex": ({"before": "xyz"}, "line 3: invalid literal"),
    "negative hex": ({"before": "-1"}, "out of range"),
    "wide hex": ({"after": "1" * 17}, "out of range"),
    "word wider than dtype": ({"after": "17f800001"}, "too wide for a float32"),
    "negative element": ({"element": -1}, "outside a (2, 3)"),
    "element beyond": ({"element": 6}, "outside a (2, 3)"),
    "element far beyond": ({"element": 2**70}, ""),
    "element at the end of int64": ({"element": 2**63 - 1}, "outside a (2, 3)"),
    "repeated element": ({"element": 0}, "outside a (2, 3)"),
    "element not a number": ({"element": "1"}, "line 3: Expected `int`"),
    "bit beyond": ({"bits": [32]}, "line 3: bits must be distinct and in range"),
    "bit far beyond": ({"bits": [10**18]}, "line 3: bits must be distinct"),
    "negative bit": ({"bits": [-1]}, "line 3: bits must be distinct"),
    "repeated bit": ({"bits": [3, 3]}, "line 3: bits must be distinct"),
    "bits that do not cover the change": ({"bits": [3]}, "do not differ in the bits"),
    "one more bit than counted": ({"bits": list(range(32))}, "do not differ in the bits"),
    "after does not differ": ({"after": "7f800001"}, "do not differ in the bits"),
    "part of a real number": ({"part": 1}, "line 3: float32 has no part 1"),
    "negative part": ({"part": -1}, "line 3: float32 has no part -1"),
    "policy beyond": ({"policies": [16]}, "line 3: policies must be distinct and in range"),
    "policy far beyond": ({"policies": [10**15]}, "line 3: policies must be"),
}


@pytest.mark.parametrize("name", LINES)
def test_damaged_line(text, name):
    change, message = LINES[name]
    lines = text.read_bytes().splitlines()
    fault = json.loads(lines[2]) | change
    lines[2] = json.dumps(fault).encode()
    text.write_bytes(b"\n".join(lines) + b"\n")
    refused(text, message)


def header_changes(header):
    """Headers that must be refused, each with what is said."""
    yield "newer", {**header, "schema": SCHEMA + 1}, f"is of schema {SCHEMA + 1}; this version reads up to"
    yield "schema 0", {**header, "schema": 0}, "header contradicts itself"
    yield "schema text", {**header, "schema": "1"}, "is not a ckptflip record"
    yield "no schema", {k: v for k, v in header.items() if k != "schema"}, "is not a ckptflip record"
    yield "fewer words counted", {**header, "counts": header["counts"] | {"words_hit": 3}}, "of 3 words"
    for count in ("bits_hit", "bits_effective", "words_effective", "tensors"):
        changed = header["counts"] | {count: header["counts"][count] + 1}
        yield count, {**header, "counts": changed}, "is damaged"
    first, *rest = header["tensors"]
    yield "no tensors", {**header, "tensors": []}, "names no tensor 'a'"
    yield "tensors in another order", {**header, "tensors": [*rest, first]}, "not in the order of its tensors"
    yield "same name twice", {**header, "tensors": [first, *rest, first]}, "contradicts itself"
    for shape in ([1, 1], [], [0], [-2, -3], [2, "x"], [2**70]):
        message = "" if "x" in shape else "lies outside a"
        yield f"shape {shape}", {**header, "tensors": [first | {"shape": shape}, *rest]}, message
    for dtype in ("float16", "int8"):
        yield dtype, {**header, "tensors": [first | {"dtype": dtype}, *rest]}, ""
    for dtype in (
        "",
        "object",
        "float7",
        "f4,f4",
        "i4,(2",
        "3f4(",
        "float128",
        ">",
        ">>float32",
        "str",
        None,
    ):
        yield (
            f"dtype {dtype}",
            {**header, "tensors": [first | {"dtype": dtype}, *rest]},
            "is not a ckptflip record",
        )
    yield "bad policy", {**header, "policies": [{"count": 0}]}, "is not a ckptflip record"
    yield "list", [header], "is not a ckptflip record"
    yield "null", None, "is not a ckptflip record"


EXAMPLE = json.loads(msgspec.json.encode(make(empty(), TENSORS).header)) | {"tensors": [{}]}
HEADER_CASES = [name for name, _, _ in header_changes(EXAMPLE)]


@pytest.mark.parametrize("name", HEADER_CASES)
def test_damaged_header(text, name):
    head, *faults = text.read_bytes().splitlines()
    header, message = next((h, m) for n, h, m in header_changes(json.loads(head)) if n == name)
    text.write_bytes(b"\n".join([json.dumps(header).encode(), *faults]) + b"\n")
    refused(text, message)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}",
        b"[]",
        b"not json",
        b"\xff\xfe\x00",
        b'{"schema": "\xff"}',
        b'{"schema": 1e999}',
        b"[" * 100_000,
        b"PK\x03\x04",
        b"\x89HDF\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n" + bytes(2000),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_record_at_all(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"tensor": "\xff"}',
        b"[" * 100_000,
        b'{"tensor": "a", "element":',
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_line_that_is_no_fault(text, line):
    lines = text.read_bytes().splitlines()
    lines[2] = line
    text.write_bytes(b"\n".join(lines) + b"\n")
    refused(text, "line 3")


def test_any_missing_line(text):
    lines = text.read_bytes().splitlines(keepends=True)
    for i in range(len(lines)):
        text.write_bytes(b"".join(lines[:i] + lines[i + 1 :]))
        refused(text)


def test_any_truncation(written):
    whole = written.read_bytes()
    cuts = range(len(whole) - 1) if written.suffix == ".jsonl" else range(0, len(whole), 97)
    for cut in cuts:
        written.write_bytes(whole[:cut])
        refused(written)


def test_lines_in_another_order(text):
    head, first, second, *rest = text.read_bytes().splitlines(keepends=True)
    text.write_bytes(b"".join([head, second, first, *rest]))
    refused(text, "lies outside")


class TestDamagedHdf5:
    @pytest.fixture
    def path(self, record, tmp_path):
        path = tmp_path / "r.h5"
        record_files.write(record, path, overwrite=False)
        return path

    def put(self, path, name, data):
        with h5py.File(path, "r+") as file:
            del file[name]
            if data is not None:
                file[name] = data

    def test_another_hdf5_file(self, tmp_path):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["header"] = 1.0
        refused(tmp_path / "x.h5")
        with h5py.File(tmp_path / "y.h5", "w") as file:
            file.create_group("header")
        refused(tmp_path / "y.h5", "is HDF5, but no record")

    @pytest.mark.parametrize("name", ["header", *COLUMNS])
    def test_a_missing_part(self, path, name):
        self.put(path, name, None)
        refused(path, "is HDF5, but no record")

    @pytest.mark.parametrize("name", COLUMNS)
    def test_a_column_of_another_kind_or_length(self, path, record, name):
        column = getattr(record.plan, name)
        for data in (column.astype(float), column.astype("S5"), h5py.Empty(column.dtype)):
            self.put(path, name, data)
            refused(path, "is HDF5, but no record")
        for data in (column[:-1], column[0], column[None]):
            self.put(path, name, data)
            refused(path, "its columns differ in length")

    def test_big_endian_columns_are_fine(self, path, record):
        self.put(path, "word", record.plan.word.astype(">i8"))
        assert_same(record_files.read(path), record)

    @pytest.mark.parametrize(
        ("name", "row", "value", "message"),
        [("tensor", 0, -1, "order of its tensors"), ("tensor", -1, 9, "order of its tensors"),
         ("tensor", 0, 3, "order of its tensors"), ("word", 0, -1, "outside a"), ("word", 5, 6, "outside a"),
         ("word", 1, 0, "outside a"), ("before", 0, 2**40, "too wide"), ("hit", 0, 2**40, "too wide"),
         ("hit", 0, 0, "do not differ in the bits"), ("after", 0, 0x3F800000, "do not differ in the bits")],
    )  # fmt: skip
    def test_damaged_rows(self, path, record, name, row, value, message):
        column = getattr(record.plan, name).copy()
        column[row] = value
        self.put(path, name, column)
        refused(path, message)


def test_any_byte_may_be_damaged(text):
    """Random mutations of the lines: read back, or refused as a record; never another exception."""
    whole = text.read_bytes()
    rng = random.Random(0)
    read = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[at] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[at] = rng.choice(b'0123456789"[]{},:-eE.\n\xff')
                case 2:
                    del damaged[at : at + rng.randrange(1, 9)]
                case 3:
                    damaged[at:at] = rng.choice([b"-", b"9" * 30, b"[[", b"\n", b"null", b"1e999", b"\x00"])
        text.write_bytes(bytes(damaged))
        try:
            found = record_files.read(text)
        except RecordError as why:
            assert "r.jsonl" in str(why)
            continue
        read += 1
        assert counts_of(found.plan) == found.header.counts
        assert len(list(record_files.lines(found))) == len(found)
    assert read < 2500  # names, values and dates may change unnoticed; words, bits and positions may not


def test_any_byte_of_hdf5_may_be_damaged(record, tmp_path):
    path = tmp_path / "r.h5"
    record_files.write(record, path, overwrite=False)
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            found = record_files.read(path)
        except RecordError:
            continue
        assert counts_of(found.plan) == found.header.counts


def test_values_of_every_kind_are_plain_json(tmp_path):
    """No NaN or infinity as bare words, which JSON does not know."""
    tensors = [Tensor(name="f", shape=(4,), number=lookup("float8_e5m2"))]
    words = np.array([0x7D, 0x7C, 0xFC, 0x3C], np.uint8)
    plan = draw(Policy(bits="sign", fraction=1.0), tensors, lambda t, at: words[at], 0)
    path = tmp_path / "r.jsonl"
    record_files.write(make(plan, tensors), path, overwrite=False)
    lines = [json.loads(x, parse_constant=pytest.fail) for x in path.read_bytes().splitlines()[1:]]
    assert [x["value_before"] for x in lines] == ["nan", "inf", "-inf", 1.0]
    assert [x["value_after"] for x in lines] == ["nan", "-inf", "inf", -1.0]
    assert math.isnan(float(lines[0]["value_after"]))
    assert [x["after"] for x in lines] == ["fd", "fc", "7c", "bc"]
