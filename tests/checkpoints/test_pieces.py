"""Words of boxes: strides, packed widths, grids of chunks; and the CRCs that cover them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.bits import lookup
from ckptflip.checkpoints import crc, stored_crcs
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.patch import Patch, apply_patches
from ckptflip.checkpoints.pieces import Layout, Piece, contiguous, located, strides_of
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Changes
from ckptflip.errors import CheckpointError, RecordError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import ChecksumEntry

F32, U8, F6 = lookup("float32"), lookup("uint8"), lookup("float6_e3m2fn")


def changes(words: list[int], masks: list[int]) -> Changes:
    mask = np.array(masks, np.uint64)
    return Changes(np.zeros(len(words), np.int32), np.array(words, np.int64), mask, mask)


def addresses(layout: Layout) -> list[int]:
    """The place of every word, in bits."""
    words = np.arange(np.prod(layout.dims, dtype=int), dtype=np.int64)
    found = np.full(words.size, -1)
    for _, rows, bits in located(layout, words):
        assert (found[rows] == -1).all()
        found[rows] = bits
    return found.tolist()


def test_plain_words_lie_one_after_the_other():
    assert addresses(contiguous(0, 8, F32, (2, 2))) == [64, 96, 128, 160]
    assert addresses(contiguous(0, 8, F32, ())) == [64]
    assert addresses(contiguous(0, 1, F6, (3,), bits=6)) == [8, 14, 20]


def test_strides_transpose():
    layout = Layout((2, 3), (Piece(0, 0, (2, 3), (32, 64)),), F32)
    assert addresses(layout) == [0, 64, 128, 32, 96, 160]


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_chunks_in_any_order_are_found(shape, chunk, random):
    """Few chunks are searched one by one, many by their cell; each chunk is its own stretch of the file."""
    starts = [(i, j) for i in range(0, shape[0], chunk[0]) for j in range(0, shape[1], chunk[1])]
    random.shuffle(starts)
    pieces, expected = [], np.empty(shape, int)
    for number, (i, j) in enumerate(starts):
        size = (min(chunk[0], shape[0] - i), min(chunk[1], shape[1] - j))
        offset = number * chunk[0] * chunk[1]
        pieces.append(Piece(0, offset, size, strides_of(chunk, 8), (i, j)))
        at = np.arange(chunk[0] * chunk[1]).reshape(chunk)[: size[0], : size[1]]
        expected[i : i + size[0], j : j + size[1]] = 8 * (offset + at)
    assert addresses(Layout(shape, tuple(pieces), U8)) == expected.reshape(-1).tolist()


def laid(tmp_path: Path, data: bytes, layout: Layout, shape: tuple[int, ...], **more) -> LaidOut:
    path = tmp_path / "data"
    path.write_bytes(data)
    return LaidOut(path, "test", [path], [Tensor("x", shape, layout.number)], [layout], **more)


@given(st.binary(min_size=6, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_packed_words_are_read_and_altered_alone(data, draw):
    """Six-bit words straddle bytes: 4 of them lie in 3 bytes, the first in the lowest bits."""
    count = len(data) * 8 // 6
    at = draw.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1).map(sorted))
    masks = draw.draw(st.lists(st.integers(1, 63), min_size=len(at), max_size=len(at)))
    value = int.from_bytes(data, "little")
    expected = [value >> 6 * i & 63 for i in range(count)]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        target = laid(Path(folder), data, contiguous(0, 0, F6, (count,), bits=6), (count,))
        assert target.read(0, np.arange(count)).tolist() == expected
        prepared = target.prepare(changes(at, masks), "repair")
        target.close()
        apply_patches(prepared.patches)
        for i, mask in zip(at, masks, strict=True):
            value ^= mask << 6 * i
        assert (Path(folder) / "data").read_bytes() == value.to_bytes(len(data), "little")


def test_a_piece_outside_its_file_is_refused(tmp_path):
    for layout in (contiguous(0, 9, F32, (2,)), Layout((2,), (Piece(0, 0, (2,), (-32,)),), F32)):
        with pytest.raises(CheckpointError, match="x would lie at bytes"):
            laid(tmp_path, bytes(16), layout, (2,))
    laid(tmp_path, bytes(16), contiguous(0, 8, F32, (2,)), (2,))
    with pytest.raises(CheckpointError, match="x would lie"):
        laid(tmp_path, bytes(2), contiguous(0, 0, F6, (3,), bits=6), (3,))


def test_words_that_no_piece_holds(tmp_path):
    target = laid(tmp_path, bytes(16), Layout((4,), (Piece(0, 0, (2,), (32,)),), F32), (4,))
    with pytest.raises(CheckpointError, match="lie in no file"):
        target.read(0, np.array([3]))


class TestStoredCrcs:
    """Eight data bytes; the CRC of them at byte 8; a CRC over data and first CRC at byte 12."""

    CRCS = (
        StoredCrc("crc32", 0, 0, 8, ((0, 8),)),
        StoredCrc("crc32c", 0, 0, 12, ((0, 12),), masked=True),
    )

    def sealed(self, data: bytes) -> bytes:
        inner = data + zlib.crc32(data).to_bytes(4, "little")
        return inner + crc.mask(crc.checksum("crc32c", inner)).to_bytes(4, "little")

    def target(self, tmp_path: Path, data: bytes, table=CRCS) -> LaidOut:
        return laid(tmp_path, data, contiguous(0, 0, U8, (8,)), (8,), crcs=table)

    def altered(self, target: LaidOut, checksum: str = "repair") -> tuple[bytes, tuple[ChecksumEntry, ...]]:
        prepared = target.prepare(changes([1, 7], [0x80, 1]), checksum)
        target.close()
        apply_patches(prepared.patches)
        return target.path.read_bytes(), prepared.checksums

    def test_both_layers_are_right_again(self, tmp_path):
        found, entries = self.altered(self.target(tmp_path, self.sealed(b"checksum")))
        assert found == self.sealed(bytes([ord("c"), ord("h") ^ 0x80, *b"ecksu", ord("m") ^ 1]))
        assert [e.offset for e in entries] == [8, 12]

    def test_they_are_left_when_asked(self, tmp_path):
        original = self.sealed(b"checksum")
        found, entries = self.altered(self.target(tmp_path, original), "leave")
        assert (found[8:], entries) == (original[8:], ())

    def test_a_wrong_one_stays_wrong(self, tmp_path):
        original = bytearray(self.sealed(b"checksum"))
        original[8] ^= 0x10
        found, _ = self.altered(self.target(tmp_path, bytes(original)))
        assert zlib.crc32(found[:8]) ^ 0x10 == int.from_bytes(found[8:12], "little")

    def test_zero_may_mean_none(self, tmp_path):
        table = (StoredCrc("crc32", 0, 0, 8, ((0, 8),), zero_is_none=True),)
        found, entries = self.altered(self.target(tmp_path, b"checksum" + bytes(8), table))
        assert (found[8:], entries) == (bytes(8), ())

    def test_recorded_ones_get_their_value_back_wherever_the_run_ended(self, tmp_path):
        original = self.sealed(b"checksum")
        altered, entries = self.altered(self.target(tmp_path, original))
        for cut in range(8, 17):  # the bytes of the checksums that were written before the kill
            target = self.target(tmp_path, altered[:cut] + original[cut:])
            prepared = target.prepare(changes([1, 7], [0x80, 1]), "repair", None, entries)
            apply_patches(prepared.patches)
            assert target.path.read_bytes() == original
            target.close()

    def test_a_record_cannot_reach_other_bytes(self, tmp_path):
        target = self.target(tmp_path, self.sealed(b"checksum"))
        for entry in (ChecksumEntry(0, 4, 0, 1), ChecksumEntry(1, 8, 0, 1), ChecksumEntry(0, 8, 5, 6)):
            with pytest.raises(RecordError, match="Nothing was altered"):
                target.prepare(changes([1], [1]), "repair", None, [entry])

    def test_a_checksum_beyond_the_file(self, tmp_path):
        target = self.target(tmp_path, bytes(14))
        with pytest.raises(CheckpointError, match="beyond the end"):
            target.prepare(changes([1], [1]), "repair")


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_the_change_of_a_crc_is_that_of_the_bytes(old, new):
    size = min(len(old), len(new))
    a, b = np.frombuffer(old, np.uint8, size), np.frombuffer(new, np.uint8, size)
    at = np.flatnonzero(a != b)
    for algorithm in crc.POLYNOMIALS:
        change = crc.delta(algorithm, size - 1 - at, (a ^ b)[at])
        assert crc.checksum(algorithm, old[:size]) ^ change == crc.checksum(algorithm, new[:size])


def test_crcs_against_published_answers():
    """The check values of the catalogue of parametrised CRC algorithms, and of RFC 3720, B.4."""
    assert crc.checksum("crc32", b"123456789") == 0xCBF43926
    assert crc.checksum("crc32c", b"123456789") == 0xE3069283
    assert crc.checksum("crc32c", bytes(32)) == 0x8A9136AA
    assert crc.checksum("crc32c", b"\xff" * 32) == 0x62A8AB43
    assert crc.checksum("crc32c", bytes(range(32))) == 0x46DD794E


def test_many_bytes_of_a_crc_at_once():
    random = np.random.default_rng(1)
    old = random.integers(0, 256, 100_000, dtype=np.uint8)
    at = np.unique(random.integers(0, old.size, 5000))
    new = old.copy()
    new[at] ^= 1 << (at % 8).astype(np.uint8)
    change = crc.delta("crc32", old.size - 1 - at, (old ^ new)[at])
    assert zlib.crc32(old) ^ change == zlib.crc32(new)


def test_crcs_that_are_not_touched_cost_no_read():
    table = [StoredCrc("crc32", 0, 16 * i, 8, ((0, 16 * i + 8),)) for i in range(1000)]
    read: list[int] = []

    class Descriptors(dict):
        def __getitem__(self, key):
            read.append(key)
            raise KeyError

    patch = Patch("", np.dtype("u1"), np.array([12]), np.array([1], np.uint8))
    assert stored_crcs.updated(table, [(0, patch)], Descriptors()) == []
    assert read == []
