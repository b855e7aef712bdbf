"""The wire format of protocol buffers, against an encoder of our own and a message of Google's library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.checkpoints.protobuf import (
    FIXED32,
    FIXED64,
    LENGTH,
    VARINT,
    FileBytes,
    ProtobufError,
    expect,
    fields,
    repeated_varints,
    signed,
    text,
    varint,
    varints,
)


def encoded(value: int) -> bytes:
    """A varint."""
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def field(number: int, wire: int, value: int | bytes) -> bytes:
    tag = encoded(number << 3 | wire)
    if isinstance(value, bytes):
        return tag + encoded(len(value)) + value
    if wire == VARINT:
        return tag + encoded(value)
    return tag + value.to_bytes(4 if wire == FIXED32 else 8, "little")


NUMBERS = st.integers(1, 40) | st.integers(1, (1 << 29) - 1)
FIELDS = st.one_of(
    st.tuples(NUMBERS, st.just(VARINT), st.integers(0, (1 << 64) - 1)),
    st.tuples(NUMBERS, st.just(FIXED32), st.integers(0, (1 << 32) - 1)),
    st.tuples(NUMBERS, st.just(FIXED64), st.integers(0, (1 << 64) - 1)),
    st.tuples(NUMBERS, st.just(LENGTH), st.binary(max_size=300)),
)


@given(st.lists(FIELDS, max_size=8), st.binary(max_size=5), st.booleans())
def test_fields_are_read_as_written_with_their_places(written, around, view):
    message = b"".join(field(*each) for each in written)
    data = around + message + around
    read = list(fields(memoryview(data) if view else data, len(around), len(around) + len(message)))
    assert [(f.number, f.wire) for f in read] == [(number, wire) for number, wire, _ in written]
    at = len(around)
    for got, (number, wire, value) in zip(read, written, strict=True):
        if isinstance(value, bytes):
            assert data[got.offset : got.end] == value
            assert got.value == len(value)
        else:
            assert got.value == value
        assert field(number, wire, value) == data[at : got.end]
        at = got.end


@settings(max_examples=2000)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_and_nothing_else(data):
    try:
        for each in fields(data, 0, len(data)):
            assert 0 < each.offset <= each.end <= len(data)
            list(repeated_varints(data, each))
    except ProtobufError:
        pass


def test_a_message_cut_anywhere_inside_its_last_field_is_refused():
    whole = field(1, VARINT, 300) + field(2, LENGTH, b"abc") + field(3, FIXED32, 7) + field(4, FIXED64, 8)
    ends = [0, *(f.end for f in fields(whole, 0, len(whole)))]
    for cut in range(len(whole)):
        if cut in ends:
            assert len(list(fields(whole, 0, cut))) == ends.index(cut)
        else:
            with pytest.raises(ProtobufError):
                list(fields(whole, 0, cut))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x08" + b"\x80" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "more than 64 bits"),
        (b"\x08\x80", "goes on beyond byte 2"),
        (b"\x00\x01", "number 0"),
        (encoded(1 << 32) + b"\x01", "number 536870912"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x0e", "wire type 6"),
        (b"\x0a\x05abc", "claims 5 bytes; 3 are left"),
        (b"\x0a" + encoded((1 << 64) - 1), "claims 18446744073709551615 bytes; 0 are left"),
        (b"\x0dabc", "claims 4 bytes; 3 are left"),
    ],
)
def test_what_is_malformed_is_said(data, why):
    with pytest.raises(ProtobufError, match=why):
        list(fields(data, 0, len(data)))


def test_a_field_may_not_leave_the_message_it_is_in():
    inner = field(1, LENGTH, b"12345")
    data = field(2, LENGTH, inner[:-1]) + b"more bytes, which belong to others"
    (outer,) = list(fields(data, 0, len(inner) + 1))
    with pytest.raises(ProtobufError, match="claims 5 bytes; 4 are left"):
        list(fields(data, outer.offset, outer.end))


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 4), (3, 2)])
def test_a_message_must_lie_in_the_bytes(start, end):
    with pytest.raises(ProtobufError, match="does not lie in 3 bytes"):
        list(fields(b"\x08\x01\x08", start, end))
    with pytest.raises(ProtobufError, match="does not lie in 3 bytes"):
        list(varints(b"\x08\x01\x08", start, end))


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=9))
def test_packed_numbers_are_those_written_one_by_one(values):
    packed = field(5, LENGTH, b"".join(map(encoded, values)))
    (whole,) = list(fields(packed, 0, len(packed)))
    found = list(repeated_varints(packed, whole))
    assert [v.value for v in found] == values
    assert b"".join(packed[v.offset : v.end] for v in found) == packed[whole.offset : whole.end]
    single = b"".join(field(5, VARINT, v) for v in values)
    each = [v for f in fields(single, 0, len(single)) for v in repeated_varints(single, f)]
    assert [v.value for v in each] == values


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_signed_numbers(value):
    assert signed(value & ((1 << 64) - 1)) == value


def test_the_largest_number_and_a_longer_form_of_a_small_one():
    assert varint(b"\xff" * 9 + b"\x01", 0, 10) == ((1 << 64) - 1, 10)
    assert varint(b"\x85\x80\x00", 0, 3) == (5, 3)


def test_a_field_of_another_kind_than_expected():
    data = field(1, VARINT, 5) + field(2, LENGTH, b"\xff\xfe")
    number, name = list(fields(data, 0, len(data)))
    assert expect(number, VARINT) == 5
    with pytest.raises(ProtobufError, match="field 1 at byte 1 is varint, not length-delimited"):
        text(data, number)
    with pytest.raises(ProtobufError, match="field 2 at byte 4 is not UTF-8"):
        text(data, name)
    fixed = field(3, FIXED32, 5)
    with pytest.raises(ProtobufError, match="field 3 at byte 1 is 4 bytes, not length-delimited"):
        list(repeated_varints(fixed, next(fields(fixed, 0, len(fixed)))))


def test_a_message_of_googles_library():
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2").DESCRIPTOR
    data = descriptor.serialized_pb
    names = []
    for each in fields(data, 0, len(data)):
        if each.number == 1:
            assert text(data, each) == descriptor.name
        elif each.number == 4:
            names += [text(data, f) for f in fields(data, each.offset, each.end) if f.number == 1]
    assert names == list(descriptor.message_types_by_name)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A message of 1 GiB, nearly all of it one field that is a hole in the file."""
    path = tmp_path / "sparse"
    head = encoded(1 << 3 | LENGTH) + encoded(1 << 30)
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + (1 << 30))
        file.write(field(2, LENGTH, b"the end"))
    return path


def test_gigabytes_are_skipped_and_not_read(sparse, monkeypatch):
    real, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda fd, size, at: sizes.append(size) or real(fd, size, at))
    with sparse.open("rb") as file:
        data = FileBytes(file.fileno())
        first, last = fields(data, 0, len(data))
        assert text(data, last) == "the end"
        assert (first.value, last.offset) == (1 << 30, first.end + 2)
    assert sum(sizes) < 1 << 18


@given(st.lists(FIELDS, max_size=20))
def test_a_file_is_read_like_bytes(tmp_path_factory, written):
    message = b"".join(field(*each) for each in written)
    path = tmp_path_factory.mktemp("p") / "message"
    path.write_bytes(message)
    with path.open("rb") as file:
        data = FileBytes(file.fileno())
        assert list(fields(data, 0, len(data))) == list(fields(message, 0, len(message)))
        assert data[1 : len(message)] == message[1:]


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(field(1, LENGTH, bytes(1 << 17)) + field(2, VARINT, 1))
    with path.open("r+b") as file:
        data = FileBytes(file.fileno())
        reading = fields(data, 0, len(data))
        next(reading)
        file.truncate(10)
        with pytest.raises(ProtobufError, match="it was cut while it was read"):
            next(reading)
    with pytest.raises(ProtobufError, match="byte 131072 cannot be read"):
        data[1 << 17 : (1 << 17) + 4]
