"""Zip directories: where members and their CRCs lie, and what is refused."""

import io
import os
import struct
import zipfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.checkpoints import zips
from ckptflip.errors import CheckpointError

# One stored member "a" holding b"hello", made by hand from the specification.
LOCAL = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0x3610A686, 5, 5, 1, 0) + b"a"
CENTRAL = (
    struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0x3610A686, 5, 5, 1, 0, 0, 0, 0, 0, 0) + b"a"
)
GOLDEN = LOCAL + b"hello" + CENTRAL + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(CENTRAL), 36, 0)


class Unseekable(io.RawIOBase):
    """A stream: zipfile then writes sizes and CRC behind the data."""

    def __init__(self):
        self.data = bytearray()

    def writable(self):
        return True

    def write(self, data):
        self.data += data
        return len(data)


@pytest.fixture
def opened(tmp_path):
    """Writes bytes into a file and lists it; `where` it is is kept for reading back."""
    descriptors = []

    def make(data, **window):
        path = tmp_path / f"{len(descriptors)}.zip"
        path.write_bytes(data)
        descriptors.append(os.open(path, os.O_RDONLY))
        return zips.members(descriptors[-1], path, **window)

    yield make
    for fd in descriptors:
        os.close(fd)


def written(*, force_zip64=False, stream=False, comment=b"", method=zipfile.ZIP_STORED, contents=None):
    out = Unseekable() if stream else io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.comment = comment
        for name, data in (
            contents or {"a/b.npy": b"x" * 1000, "a/empty": b"", "ünï": os.urandom(99)}
        ).items():
            with archive.open(name, "w", force_zip64=force_zip64) as member:
                member.write(data)
    return bytes(out.data) if stream else out.getvalue()


def test_golden_bytes(opened):
    found = opened(GOLDEN)
    assert found["a"] == zips.Member("a", 31, 5, 5, 0, 0x3610A686, (14, 36 + 16))
    assert found.read("a", 5) == b"hello"
    assert [*found] == ["a"] and len(found) == 1 and "a" in found and "b" not in found


def test_a_window_gives_offsets_in_the_file(opened):
    found = opened(b"before" + GOLDEN + b"after", start=6, length=len(GOLDEN))
    assert found["a"].offset == 6 + 31
    assert found["a"].crc_places == (6 + 14, 6 + 36 + 16)
    assert found.read("a", 5) == b"hello"


@pytest.mark.parametrize("prefix", [b"", b"#!/bin/sh\n"])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"c" * 65535])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("force_zip64", [False, True])
def test_what_zipfile_writes(opened, force_zip64, stream, method, comment, prefix):
    data = prefix + written(force_zip64=force_zip64, stream=stream, comment=comment, method=method)
    found = opened(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [*found] == archive.namelist()
        for info in archive.infolist():
            member = found[info.filename]
            assert (member.size, member.packed, member.crc) == (info.file_size, info.compress_size, info.CRC)
            assert found.read(member.name, 1000) == archive.read(info)
            assert len(member.crc_places) == 2 or not info.file_size
            for place in member.crc_places:
                assert int.from_bytes(data[place : place + 4], "little") == info.CRC


def test_a_corrected_crc_in_all_its_places_satisfies_zipfile(opened):
    for stream in (False, True):
        data = bytearray(written(stream=stream))
        member = opened(bytes(data))["a/b.npy"]
        data[member.offset] ^= 1
        right = zlib.crc32(data[member.offset : member.offset + member.size])
        for place in member.crc_places:
            assert zipfile.ZipFile(io.BytesIO(data)).testzip() == "a/b.npy"
            data[place : place + 4] = right.to_bytes(4, "little")
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_descriptors_without_signature_and_crcs_that_differ(opened):
    data = written(stream=True, contents={"a": b"12345"})
    sign = data.index(b"PK\7\x08")
    # Without the signature, everything behind moves by four bytes.
    plain = bytearray(data[:sign] + data[sign + 4 :])
    end = plain.index(b"PK\5\6")
    struct.pack_into("<L", plain, end + 16, struct.unpack_from("<L", plain, end + 16)[0] - 4)
    member = opened(bytes(plain))["a"]
    assert member.crc_places[0] == sign
    plain[sign] ^= 1  # an interrupted repair
    assert opened(bytes(plain))["a"] == member


def test_a_crc_is_stored_in_the_local_header_too_where_a_descriptor_follows(opened):
    data = bytearray(written(stream=True, contents={"a": b"12345"}))
    struct.pack_into("<L", data, 14, zlib.crc32(b"12345"))
    assert len(opened(bytes(data))["a"].crc_places) == 3


def test_zip64_end_record(opened):
    start, size = 36, len(CENTRAL)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    short = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    data = GOLDEN[: start + size] + end64 + locator + short
    assert opened(data).read("a", 5) == b"hello"
    longer = end64[:4] + struct.pack("<Q", 44 + 8) + end64[12:] + bytes(8)
    assert opened(GOLDEN[: start + size] + longer + locator + short).read("a", 5) == b"hello"
    for at, wrong in ((start + size, b"XX"), (start + size + 4, b"\xff" * 8), (start + size + 76 - 4, b"\2")):
        with pytest.raises(CheckpointError):
            opened(data[:at] + wrong + data[at + len(wrong) :])


def patched(at, kind, value, data=GOLDEN):
    raw = bytearray(data)
    struct.pack_into("<" + kind, raw, at, value)
    return bytes(raw)


def renamed(raw_name, flags=0):
    """The golden archive with another name of one byte or more, in both headers."""
    n = len(raw_name)
    local = LOCAL[:6] + struct.pack("<H", flags) + LOCAL[8:26] + struct.pack("<HH", n, 0) + raw_name
    central = CENTRAL[:8] + struct.pack("<H", flags) + CENTRAL[10:28] + struct.pack("<H", n) + CENTRAL[30:46]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46 + n, len(local) + 5, 0)
    return local + b"hello" + central + raw_name + end


END = len(GOLDEN) - 22
ATTACKS = {
    "encrypted": (patched(36 + 8, "H", 1), "encrypted"),
    "split": (patched(END + 4, "H", 1), "split"),
    "split by entry": (patched(36 + 34, "H", 2), "split"),
    "more members than bytes": (patched(END + 8, "L", 0xFFFEFFFE), "cannot hold"),
    "directory before the file": (patched(END + 16, "L", 2000), "directory"),
    "directory larger than the file": (patched(END + 12, "L", 2000), "directory"),
    "member behind the directory": (patched(36 + 42, "L", 2000), "beyond the directory"),
    "sizes that differ": (patched(36 + 20, "L", 4), "two sizes"),
    "more than the file": (patched(36 + 20, "Q", 0xFFFFFFFD_FFFFFFFD), "beyond the directory"),
    "no zip64 field": (patched(36 + 24, "L", 0xFFFFFFFF), "zip64"),
    "absolute": (renamed(b"/a"), "not relative"),
    "drive": (renamed(b"C:a"), "not relative"),
    "leading out": (renamed(b"a/../../b"), "out of the archive"),
    "leading out, backwards": (renamed(b"a\\..\\b"), "out of the archive"),
    "NUL": (renamed(b"a\0b"), "not relative"),
    "no name": (renamed(b""), "not relative"),
    "not UTF-8": (renamed(b"\xff\xfe", 1 << 11), "not UTF-8"),
    "no archive": (b"PK\3\4" + bytes(100), "no zip archive"),
    "empty": (b"", "no zip archive"),
}


@pytest.mark.parametrize(("data", "why"), ATTACKS.values(), ids=ATTACKS)
def test_attacks_on_the_directory(opened, data, why):
    with pytest.raises(CheckpointError, match=why):
        opened(data)


LOCAL_ATTACKS = {
    "signature": patched(0, "B", 0),
    "name": patched(30, "B", ord("b")),
    "method": patched(8, "H", 8),
    "flags": patched(6, "H", 1 << 3),
    "size": patched(22, "L", 4),
    "packed": patched(18, "L", 6),
    "extra field over the data": patched(28, "H", 9),
}


@pytest.mark.parametrize("data", LOCAL_ATTACKS.values(), ids=LOCAL_ATTACKS)
def test_a_local_header_must_agree_with_the_directory(opened, data):
    found = opened(data)
    with pytest.raises(CheckpointError, match="damaged"):
        found["a"]


def test_names_given_twice_and_overlaps(opened):
    twice = CENTRAL * 2
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(twice), 36, 0)
    with pytest.raises(CheckpointError, match="two members named"):
        opened(LOCAL + b"hello" + twice + end)
    other = CENTRAL[:-1] + b"b"
    with pytest.raises(CheckpointError, match="overlap"):
        opened(LOCAL + b"hello" + CENTRAL + other + end)


def test_bombs_are_not_inflated_beyond_what_is_asked_for(opened):
    data = bytearray(written(method=zipfile.ZIP_DEFLATED, contents={"a": bytes(50_000_000)}))
    with pytest.raises(CheckpointError, match="more than the 1000 expected"):
        opened(bytes(data)).read("a", 1000)
    central = data.rindex(b"PK\1\2")
    for at in (22, central + 24):
        struct.pack_into("<L", data, at, 1000)
    with pytest.raises(CheckpointError, match="more than the 1000 bytes it claims"):
        opened(bytes(data)).read("a", 1000)
    for at in (22, central + 24):
        struct.pack_into("<L", data, at, 50_000_001)
    with pytest.raises(CheckpointError, match="ends after 50000000"):
        opened(bytes(data)).read("a", 1 << 30)


def test_other_compressions_are_listed_but_not_read(opened):
    found = opened(written(method=zipfile.ZIP_LZMA, contents={"a": b"1"}))
    assert found["a"].method == zipfile.ZIP_LZMA
    with pytest.raises(CheckpointError, match="method 14"):
        found.read("a", 1)


def test_a_window_beyond_the_file(opened):
    with pytest.raises(CheckpointError, match="before the end"):
        opened(GOLDEN, start=1, length=len(GOLDEN))
    with pytest.raises(CheckpointError, match="before the end"):
        opened(GOLDEN, start=-1, length=3)


def test_a_missing_member(opened):
    with pytest.raises(CheckpointError, match="holds no member 'b'"):
        opened(GOLDEN)["b"]


def test_ten_thousand_members_are_quick(opened, soon):
    data = written(contents={f"layers/{i}": b"1234" for i in range(10_000)})
    found = opened(data)
    assert len([found[name] for name in found]) == 10_000


def attempt(data, tmp_path):
    path = tmp_path / "hostile.zip"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        found = zips.members(fd, path)
        for name in found:
            member = found.read(name, 1 << 20)
            assert len(member) == found.size(name)
    except CheckpointError:
        return False
    finally:
        os.close(fd)
    return True


STREAM = written(stream=True, force_zip64=True, method=zipfile.ZIP_DEFLATED)


def test_truncated_anywhere(tmp_path):
    for data in (GOLDEN, STREAM):
        assert not any(attempt(data[:n], tmp_path) for n in range(len(data)))


@settings(max_examples=400)
@given(
    st.sampled_from([GOLDEN, STREAM]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_random_bytes_end_in_clear_errors(tmp_path_factory, data, changes):
    raw = bytearray(data)
    for where, value in changes:
        raw[int(where * len(raw))] = value
    attempt(bytes(raw), tmp_path_factory.getbasetemp())
