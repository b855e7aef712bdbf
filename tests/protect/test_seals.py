"""Seals: what they find, what they mend, what they refuse; and that a kill loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.cli.main import run
from ckptflip.errors import CheckpointError, DamagedCheckpointError, SealError, UsageError
from ckptflip.protect.seals import code, sidecar, verified
from ckptflip.protect.seals.cuts import MOST_BLOCKS, block_for, cut
from ckptflip.protect.seals.sealing import groups_for
from ckptflip.protect.seals.verifying import summary

BLOCK = 4096


def folder_of(path: Path, sizes: list[int], seed: int = 0) -> Path:
    """A folder of files with random bytes."""
    rng = np.random.default_rng(seed)
    for i, size in enumerate(sizes):
        file = path / f"part/{i}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.bytes(size))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, bits: list[int]) -> None:
    data = bytearray(path.read_bytes())
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@contextlib.contextmanager
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("seals")
    yield folder
    shutil.rmtree(folder)


class TestCode:
    @given(st.data(), st.integers(1, 20), st.integers(1, 4))
    @settings(deadline=None, max_examples=30)
    def test_any_lost_rows_follow_from_any_shares(self, data: st.DataObject, rows: int, shares: int) -> None:
        matrix = code.coefficients(rows, shares)
        count = data.draw(st.integers(1, min(rows, shares)))
        lost = data.draw(st.permutations(range(rows)))[:count]
        used = data.draw(st.permutations(range(shares)))[:count]
        rng = np.random.default_rng(rows * 8 + shares)
        planes = rng.integers(0, 1 << 63, (rows, 1, 8, 2)).astype(np.uint64)
        left = [np.zeros((1, 8, 2), np.uint64) for _ in used]
        for share, into in zip(used, left, strict=True):
            for row in range(rows):
                code.accumulate(into, planes[row], int(matrix[share, row]))
            for row in set(range(rows)) - set(lost):
                code.accumulate(into, planes[row], int(matrix[share, row]))
        for row, found in zip(lost, code.solved(matrix, lost, used, left), strict=True):
            np.testing.assert_array_equal(found, planes[row])

    def test_a_product_is_that_of_the_field(self) -> None:
        """Against long multiplication, bit by bit."""
        for a, b in ((2, 0x80), (7, 0xB3), (255, 255)):
            expected = 0
            for i in range(8):
                expected ^= (a << i) * (b >> i & 1)
            for i in range(15, 7, -1):
                expected ^= (0x11D << (i - 8)) * (expected >> i & 1)
            symbol = np.zeros((1, 8, 1), np.uint64)
            symbol[0, :, 0] = [b >> i & 1 for i in range(8)]
            product = np.zeros_like(symbol)
            code.accumulate(product, symbol, a)
            assert sum(int(product[0, i, 0]) << i for i in range(8)) == expected

    @given(st.integers(1, MOST_BLOCKS), st.floats(0.005, 1))
    @settings(deadline=None)
    def test_a_code_costs_what_was_asked(self, blocks: int, cost: float) -> None:
        groups = groups_for(blocks, cost)
        assert groups.count * groups.shares <= cost * blocks + 1
        assert groups.rows + groups.shares <= 256
        assert groups.rows == -(-blocks // groups.count)


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=8), st.sampled_from([1, 7, 4096]))
def test_cells_cover_every_byte_once(sizes: list[int], block: int) -> None:
    cuts = cut(sizes, block)
    covered: list[list[int]] = [[] for _ in sizes]
    for cell in range(cuts.cells):
        file, start, end = cuts.in_file(cell)
        covered[file] += range(start, end)
        assert cuts.block_of(cell) == (cuts.edges[cell + 1] - 1) // block
    assert covered == [list(range(s)) for s in sizes]
    assert cuts.blocks == -(-sum(sizes) // block)


@pytest.mark.parametrize("total", [0, 1, BLOCK, (1 << 36) + 1, 1 << 45])
def test_tables_are_bounded(total: int) -> None:
    assert -(-total // block_for(total)) <= MOST_BLOCKS


class TestPromise:
    """Random sizes and damage: within the promise all is mended and proven, beyond it that is said."""

    @given(st.data())
    @settings(deadline=None, max_examples=40)
    def test_lost_blocks(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.integers(0, 6 * BLOCK), min_size=1, max_size=4).filter(any))
        cost = data.draw(st.sampled_from([0.01, 0.1, 0.3, 1.0]))
        seed = data.draw(st.integers(0, 99))
        with scratch(tmp_path_factory) as folder:
            original = folder_of(folder / "c", sizes, seed)
            before = contents(original)
            sealed = ckptflip.seal(original, repair=cost)
            stream = b"".join(before.values())
            rng = np.random.default_rng(seed)
            blocks = -(-len(stream) // BLOCK)
            count = data.draw(st.integers(1, blocks))
            lost = sorted(rng.choice(blocks, count, replace=False).tolist())
            damaged = bytearray(stream)
            for b in lost:
                part = damaged[b * BLOCK : (b + 1) * BLOCK]
                damaged[b * BLOCK : (b + 1) * BLOCK] = bytes(v ^ 0xA5 for v in part)
            at = 0
            for name, content in before.items():
                (original / name).write_bytes(damaged[at : at + len(content)])
                at += len(content)
            # Every byte of a lost block is wrong: only blocks of four bytes or less need no share.
            by_group = np.bincount([b % sealed.groups for b in lost], minlength=sealed.groups)
            promised = bool((by_group <= sealed.shares).all())
            found = ckptflip.verify(original)
            assert not found.intact
            assert found.mendable or not promised
            done = ckptflip.repair(original, out=folder / "mended")
            assert done.whole == found.mendable
            if done.whole:
                assert contents(folder / "mended") == before
            else:
                assert done.left and not (folder / "mended").exists()
                unmended = [d for d in done.found.damage if not d.mendable]
                assert unmended and all(d.what == "changed" for d in unmended)
            assert contents(original) != before

    @given(st.data())
    @settings(deadline=None, max_examples=40)
    def test_one_or_two_flips_in_a_block_need_no_shares(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        size = data.draw(st.integers(1, 5 * BLOCK))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        with scratch(tmp_path_factory) as folder:
            original = folder_of(folder / "c", [size])
            before = contents(original)
            ckptflip.seal(original)
            flips: list[int] = []
            for start in range(0, size, BLOCK):
                bits = min(BLOCK, size - start) * 8
                flips += (start * 8 + rng.choice(bits, rng.integers(1, 3), replace=False)).tolist()
            flip(original / "part/0.bin", flips)
            found = ckptflip.verify(original)
            assert sum(d.bits or 0 for d in found.damage) == len(flips) and found.mendable
            assert ckptflip.repair(original, in_place=True).whole
            assert contents(original) == before

    def test_any_change_of_a_word_needs_no_shares(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [3 * BLOCK])
        before = contents(original)
        ckptflip.seal(original)
        flip(original / "part/0.bin", [32 * 1500 + b for b in (0, 1, 5, 9, 17, 18, 20, 22, 27, 30, 31)])
        assert ckptflip.repair(original, in_place=True).whole
        assert contents(original) == before

    def test_three_flips_apart_are_said_to_be_beyond(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [3 * BLOCK])
        ckptflip.seal(original)
        flip(original / "part/0.bin", [5, 9000, 30000])
        now = contents(original)
        found = ckptflip.verify(original)
        (damage,) = found.damage
        assert (damage.what, damage.start, damage.end, damage.mendable) == ("changed", 0, BLOCK, False)
        done = ckptflip.repair(original, in_place=True)
        assert (done.whole, done.left, done.out) == (False, 1, None)
        assert contents(original) == now

    def test_partial_mends_what_can_be(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [3 * BLOCK])
        before = contents(original)["part/0.bin"]
        ckptflip.seal(original)
        flip(original / "part/0.bin", [5, 9000, 30000, 8 * BLOCK + 3])
        done = ckptflip.repair(original, in_place=True, partial=True)
        assert (done.whole, done.left, done.mended) == (False, 1, 1)
        now = contents(original)["part/0.bin"]
        assert now[BLOCK:] == before[BLOCK:] and now[:BLOCK] != before[:BLOCK]

    def test_a_run_of_lost_pages_as_long_as_was_said(self, tmp_path: Path) -> None:
        path = tmp_path / "w.npy"
        np.save(path, np.random.default_rng(0).integers(0, 255, 1 << 22).astype(np.uint8))
        before = path.read_bytes()
        sealed = ckptflip.seal(path, repair=0.05)
        run_length = sealed.groups * sealed.shares * sealed.block
        assert run_length >= 0.045 * len(before)
        start = 300 * sealed.block
        path.write_bytes(before[:start] + bytes(run_length) + before[start + run_length :])
        done = ckptflip.repair(path, out=tmp_path / "mended.npy")
        assert done.whole and (tmp_path / "mended.npy").read_bytes() == before
        assert {d.tensor for d in done.found.damage} == {"array"}

    def test_damaged_shares_count_against_the_promise(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [8 * BLOCK])
        before = contents(original)
        sealed = ckptflip.seal(original, repair=0.25)
        assert (sealed.groups, sealed.shares) == (1, 2)
        flip(sealed.path, [8 * (sealed.path.stat().st_size // 2)])
        assert [d.what for d in ckptflip.verify(original).damage] == ["seal"]
        data = bytearray((original / "part/0.bin").read_bytes())
        data[:BLOCK] = bytes(BLOCK)
        (original / "part/0.bin").write_bytes(data)
        assert ckptflip.repair(original, out=tmp_path / "one").whole
        assert contents(tmp_path / "one") == before
        data[BLOCK : 2 * BLOCK] = bytes(BLOCK)
        (original / "part/0.bin").write_bytes(data)
        found = ckptflip.verify(original)
        assert not found.mendable and {d.what for d in found.damage} == {"changed", "seal"}


class TestSealItself:
    """Damage to the seal is found, and never passes for a verified checkpoint."""

    @given(st.data())
    @settings(deadline=None, max_examples=150)
    def test_random_damage(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        with scratch(tmp_path_factory) as folder:
            original = folder_of(folder / "c", [2 * BLOCK, 77])
            sealed = ckptflip.seal(original, repair=data.draw(st.sampled_from([None, 0.4])))
            good = sealed.path.read_bytes()
            how = data.draw(st.sampled_from(["flip", "cut", "add", "zeros", "empty"]))
            at = data.draw(st.integers(0, len(good) - 1))
            bad = {
                "flip": good[:at] + bytes([good[at] ^ 1 << data.draw(st.integers(0, 7))]) + good[at + 1 :],
                "cut": good[:at],
                "add": good[:at] + b"x" + good[at:],
                "zeros": good[:at] + bytes(min(64, len(good) - at)) + good[at + 64 :],
                "empty": b"",
            }[how]
            if bad == good:
                return
            sealed.path.write_bytes(bad)
            try:
                found = ckptflip.verify(original)
            except SealError:
                return
            assert not found.intact and {d.what for d in found.damage} == {"seal"}
            assert how in ("flip", "zeros")

    def test_no_seal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        original = folder_of(tmp_path / "c", [10])
        with pytest.raises(SealError, match="does not exist"):
            ckptflip.verify(original)
        assert run(["verify", str(original)]) == 1
        assert run(["repair", str(original)]) == 1
        assert "nothing is known" in capsys.readouterr().err

    def test_one_damaged_copy_still_verifies_and_mends(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [3 * BLOCK])
        before = contents(original)
        sealed = ckptflip.seal(original)
        flip(sealed.path, [8 * 300])
        flip(original / "part/0.bin", [77])
        found = ckptflip.verify(original)
        assert {d.what for d in found.damage} == {"flip", "seal"}
        assert ckptflip.repair(original, in_place=True).whole
        assert contents(original) == before
        assert not ckptflip.verify(original).intact
        ckptflip.seal(original, overwrite=True)
        assert ckptflip.verify(original).intact

    @pytest.mark.parametrize(
        "name", ["../out.bin", "/etc/passwd", "a/../../b", "", ".", "a//b", "a\0b", "part/0.bin/"]
    )
    def test_names_lead_nowhere_else(self, tmp_path: Path, name: str) -> None:
        original = folder_of(tmp_path / "c", [10])
        sealed = ckptflip.seal(original)
        _forge(sealed.path, files=((name, 10),))
        with pytest.raises(SealError, match="outside"):
            ckptflip.verify(original)

    @pytest.mark.parametrize(
        "change",
        [
            {"block": 4097},
            {"block": 1 << 13, "files": (("part/0.bin", 1 << 60),)},
            {"files": ()},
            {"kind": "file", "files": (("a", 5), ("b", 5))},
            {"kind": "nonsense"},
            {"schema": 2},
            {"groups": {"count": 0, "rows": 1, "shares": 1}},
            {"groups": {"count": 1, "rows": 300, "shares": 1}},
            {"groups": {"count": 1, "rows": 1, "shares": 300}},
            {"groups": {"count": -1, "rows": -1, "shares": 1}},
        ],
    )
    def test_absurd_headers(self, tmp_path: Path, change: dict[str, Any]) -> None:
        original = folder_of(tmp_path / "c", [10])
        sealed = ckptflip.seal(original)
        _forge(sealed.path, **change)
        with pytest.raises(SealError):
            ckptflip.verify(original)

    def test_a_seal_says_what_it_is(self, tmp_path: Path) -> None:
        """The bytes of a small one, by hand."""
        from hashlib import blake2b
        from zlib import crc32

        path = tmp_path / "a.npy"
        np.save(path, np.arange(3, dtype=np.uint8))
        data = path.read_bytes()
        raw = ckptflip.seal(path).path.read_bytes()
        length = int.from_bytes(raw[8:16], "little")
        header = json.loads(raw[16 : 16 + length])
        assert header["files"] == [["a.npy", len(data)]] and header["block"] == BLOCK
        row = blake2b(data, digest_size=16).digest() + crc32(data).to_bytes(4, "little")
        front = b"ckpSEAL\n" + length.to_bytes(8, "little") + raw[16 : 16 + length] + row
        front += blake2b(front, digest_size=32).digest()
        assert raw == front + front + len(front).to_bytes(8, "little") + b"ckpSEAL\n"


def _forge(path: Path, **change: Any) -> None:
    """A seal with another header and right digests, as a stranger could make it."""
    seal = sidecar.read(path)
    header = json.loads(sidecar.encoded(seal.header)) | change
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        end = sidecar.length_of_front(raw, seal.cuts, None)
        sidecar.finish(file, raw, seal.table, seal.shares, end)


class TestFiles:
    def test_missing_new_cut_and_longer_files(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [100, BLOCK, 200, 0, 300])
        before = contents(original)
        ckptflip.seal(original, repair=1.0)
        (original / "part/0.bin").unlink()
        (original / "part/3.bin").unlink()
        (original / "part/1.bin").write_bytes(before["part/1.bin"][:77])
        (original / "part/2.bin").write_bytes(before["part/2.bin"] + b"more")
        (original / "new.bin").write_bytes(b"")
        found = ckptflip.verify(original)
        assert [(d.what, d.file, d.start, d.end, d.mendable) for d in found.damage] == [
            ("missing", "part/0.bin", 0, 100, True),
            ("cut", "part/1.bin", 77, BLOCK, True),
            ("longer", "part/2.bin", 200, 204, True),
            ("missing", "part/3.bin", 0, 0, True),
            ("extra", "new.bin", 0, 0, False),
        ]
        assert ckptflip.repair(original, out=tmp_path / "mended").whole
        assert contents(tmp_path / "mended") == before
        assert ckptflip.repair(original, in_place=True).whole
        assert contents(original) == before | {"new.bin": b""}
        assert [d.what for d in ckptflip.verify(original).damage] == ["extra"]

    def test_a_missing_folder_is_made_again_in_place(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [9000, 100])
        (original / "top.bin").write_bytes(b"there")
        before = contents(original)
        ckptflip.seal(original, repair=1.0)
        shutil.rmtree(original / "part")
        (original / "part").write_bytes(b"no folder")
        with pytest.raises(CheckpointError, match="with -o"):
            ckptflip.repair(original, in_place=True)
        (original / "part").unlink()
        assert ckptflip.repair(original, in_place=True).whole
        assert contents(original) == before and ckptflip.verify(original).intact

    def test_an_output_does_not_replace_the_seal(self, tmp_path: Path) -> None:
        path = tmp_path / "w.npy"
        np.save(path, np.zeros(9))
        sealed = ckptflip.seal(path)
        flip(path, [8 * 130])
        kept = sealed.path.read_bytes()
        with pytest.raises(UsageError, match="the seal that"):
            ckptflip.repair(path, out=sealed.path, overwrite=True)
        assert sealed.path.read_bytes() == kept

    def test_zeros_beyond_the_end_are_not_there(self, tmp_path: Path) -> None:
        original = tmp_path / "c"
        original.mkdir()
        (original / "z.bin").write_bytes(bytes(3 * BLOCK))
        ckptflip.seal(original)
        (original / "z.bin").write_bytes(bytes(2 * BLOCK))
        found = ckptflip.verify(original)
        assert [d.what for d in found.damage] == ["cut"] and not found.intact

    def test_a_checkpoint_and_its_seal_may_be_renamed(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.zeros(9))
        sealed = ckptflip.seal(path)
        path.rename(tmp_path / "b.npy")
        sealed.path.rename(tmp_path / "b.npy.seal")
        assert ckptflip.verify(tmp_path / "b.npy").intact
        assert ckptflip.verify(tmp_path / "b.npy.seal").intact

    def test_nothing_to_repair(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [100])
        ckptflip.seal(original)
        done = ckptflip.repair(original)
        assert (done.whole, done.out, done.mended) == (True, None, 0)
        assert not (tmp_path / "c.repaired").exists()
        assert ckptflip.repair(original, in_place=True).out is None

    @pytest.mark.parametrize("hurt", [False, True], ids=["whole", "seal damaged"])
    def test_an_output_is_there_whenever_every_byte_is_right(self, tmp_path: Path, hurt: bool) -> None:
        original = folder_of(tmp_path / "c", [3 * BLOCK, 0, 100])
        before = contents(original)
        sealed = ckptflip.seal(original)
        if hurt:
            flip(sealed.path, [8 * 300])
        done = ckptflip.repair(original, out=tmp_path / "copy")
        assert (done.whole, done.out, done.mended, done.left) == (True, tmp_path / "copy", 0, 0)
        assert [d.what for d in done.found.damage] == ["seal"] * hurt
        assert contents(tmp_path / "copy") == before == contents(original)
        with pytest.raises(UsageError, match="exists"):
            ckptflip.repair(original, out=tmp_path / "copy")

    def test_a_bit_is_that_of_an_element_or_none(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, w=np.ones(9, np.float32))
        ckptflip.seal(path)
        crc = 14  # of the zip's first local header
        data = path.read_bytes().index(np.ones(9, np.float32).tobytes())
        flip(path, [8 * crc + 5])
        (alone,) = ckptflip.verify(path).damage
        assert (alone.bit, alone.tensor) == (None, "") and alone.part.startswith("bit 5 of the byte")
        flip(path, [8 * data + 30])
        for found in (ckptflip.verify(path), ckptflip.repair(path, in_place=True).found):
            assert [(d.tensor, d.element, d.bit) for d in found.damage] == [("", None, None), ("w", 0, 30)]
            assert summary(found) == f"{path} is damaged: bit 30 of element 0 of w and 1 more"

    def test_a_seal_is_not_replaced_by_chance(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [100])
        ckptflip.seal(original)
        with pytest.raises(UsageError, match="--overwrite"):
            ckptflip.seal(original)

    def test_what_is_written_meanwhile_is_not_sealed(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [100])
        path = original / "part/0.bin"
        with pytest.raises(CheckpointError, match="was written while it was sealed"):
            ckptflip.seal(original, progress=lambda _: os.utime(path, ns=(1, 1)))
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    def test_links_out_of_the_folder_are_not_written_through(self, tmp_path: Path) -> None:
        original = folder_of(tmp_path / "c", [100])
        victim = tmp_path / "victim"
        (original / "part/0.bin").rename(victim)
        (original / "part/0.bin").symlink_to(victim)
        ckptflip.seal(original)
        flip(victim, [3])
        now = victim.read_bytes()
        with pytest.raises(CheckpointError, match="link out of"):
            ckptflip.repair(original, in_place=True)
        assert victim.read_bytes() == now
        assert ckptflip.repair(original).whole

    def test_verified_raises_on_damage(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.zeros(9, np.float32))
        ckptflip.seal(path)
        assert verified(path) == path
        flip(path, [8 * 128 + 30])
        with pytest.raises(DamagedCheckpointError, match="bit 30 of element 0 of array") as caught:
            verified(path)
        assert caught.value.exit_code == 3

    def test_a_damaged_header_is_named_by_the_mended_file(self, tmp_path: Path) -> None:
        """When the checkpoint no longer opens, its bytes are named; once mended, its tensors."""
        path = tmp_path / "a.npy"
        np.save(path, np.zeros(9, np.float32))
        ckptflip.seal(path, repair=1.0)
        flip(path, [8, 8 * 128 + 30])
        found = ckptflip.verify(path)
        assert found.unnamed and {d.tensor for d in found.damage} == {""}
        done = ckptflip.repair(path)
        assert done.whole and done.out == tmp_path / "a.repaired.npy"
        for each in (done, ckptflip.repair(path, in_place=True)):
            assert [(d.start, d.tensor, d.element, d.bit) for d in each.found.damage] == [
                (1, "", None, None),
                (131, "array", 0, 30),
            ]


class _Killed(BaseException):
    """Stands for a kill: nothing that catches errors sees it."""


@pytest.mark.parametrize("share", [None, 0.5])
def test_repair_in_place_after_a_kill_at_any_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    """Each write may end anywhere, half done; repairing again gives back every byte."""
    pristine = folder_of(tmp_path / "pristine", [3 * BLOCK, 5, 2 * BLOCK])
    before = contents(pristine)
    sealed = ckptflip.seal(pristine, repair=share)
    flip(pristine / "part/0.bin", [9, 80, 8 * BLOCK + 5])
    if share:
        for name in ("part/1.bin", "part/2.bin"):
            (pristine / name).write_bytes(before[name][:3] + b"tail" * 3000)
        (pristine / "part/1.bin").unlink()
    real, reached = os.pwrite, False
    for writes in range(50):
        original = tmp_path / str(writes)
        shutil.copytree(pristine, original)
        left = [writes]

        def pwrite(fd: int, data: Any, offset: int, left: list[int] = left) -> int:
            if not left[0]:
                real(fd, data[: len(data) // 2], offset)
                raise _Killed
            left[0] -= 1
            return real(fd, data, offset)

        with monkeypatch.context() as patching:
            patching.setattr(os, "pwrite", pwrite)
            try:
                assert ckptflip.repair(original, seal=sealed.path, in_place=True).whole
                reached = True
            except _Killed:
                pass
        done = ckptflip.repair(original, seal=sealed.path, in_place=True)
        assert done.whole, f"killed after {writes} writes"
        assert contents(original) == before
        if reached:
            return
    raise AssertionError("the repair never came to its end")


class TestCommands:
    def test_a_story(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "w.npy"
        np.save(path, np.zeros(5000, np.float32))
        assert run(["seal", str(path), "--repair=10%"]) == 0
        assert capsys.readouterr().out == f"{path}.seal\n"
        assert run(["verify", str(path)]) == 0
        ckptflip.inject(path, in_place=True, count=1, bits="30", seed=1)
        capsys.readouterr()
        assert run(["verify", str(path), "--format", "json"]) == 3
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["what"], row["tensor"], row["bit"], row["mendable"]) == ("flip", "array", 30, "yes")
        assert run(["repair", str(path), "-o", str(tmp_path / "good.npy")]) == 0
        assert run(["verify", str(tmp_path / "good.npy"), "--seal", f"{path}.seal"]) == 0
        assert run(["verify", str(path)]) == 3
        assert run(["repair", str(path), "--in-place"]) == 0
        assert run(["verify", str(path)]) == 0
        assert run(["seal", str(path), "--repair", "x"]) == 2
        assert run(["seal", str(path), "--repair=300%", "--overwrite"]) == 2
        assert run(["seal", str(tmp_path / "none.npy")]) == 1
        assert run(["repair", str(path), "-o", "x.npy", "--in-place"]) == 2

    def test_a_script_can_go_on_with_the_output(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, out = tmp_path / "w.npz", tmp_path / "out.npz"
        np.savez(path, w=np.zeros(5000, np.float32))
        sealed = ckptflip.seal(path)
        assert run(["repair", str(path), "-o", str(out)]) == 0
        assert out.read_bytes() == path.read_bytes()
        assert f"{out}: a copy; {path} is as it was sealed" in capsys.readouterr().err
        assert run(["repair", str(path)]) == 0
        assert "nothing was written" in capsys.readouterr().err
        flip(sealed.path, [8 * 100])
        assert run(["repair", str(path), "-o", str(out), "--overwrite"]) == 0
        said = capsys.readouterr().err
        assert f"{out}: a copy" in said and f"{sealed.path} itself is damaged" in said

    def test_exit_code_when_it_cannot_be_mended(self, tmp_path: Path) -> None:
        path = tmp_path / "w.npy"
        np.save(path, np.zeros(5000, np.float32))
        ckptflip.seal(path)
        ckptflip.inject(path, in_place=True, count=400, seed=1)
        assert run(["repair", str(path)]) == 3
        assert not (tmp_path / "w.repaired.npy").exists()


def test_a_checkpoint_saved_anew_is_one_range(tmp_path: Path) -> None:
    """Whatever the groups: what is damaged from end to end is one line."""
    original = folder_of(tmp_path / "c", [40 * BLOCK])
    ckptflip.seal(original, repair=0.3)
    (original / "part/0.bin").write_bytes(np.random.default_rng(9).bytes(40 * BLOCK))
    found = ckptflip.verify(original)
    assert [(d.what, d.start, d.end) for d in found.damage] == [("changed", 0, 40 * BLOCK)]


@pytest.mark.parametrize("workers", [0, -1])
def test_no_threads_are_no_verdict(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.npy"
    np.save(path, np.zeros(5000))
    ckptflip.seal(path)
    flip(path, [10_000])
    for act in (ckptflip.verify, ckptflip.repair):
        with pytest.raises(UsageError, match="workers must be 1 or more"):
            act(path, workers=workers)
    for command in ("seal", "verify", "repair"):
        assert run([command, str(path), "--workers", str(workers)]) == 2
    capsys.readouterr()
    assert not ckptflip.verify(path).intact


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name in (b"run/w\xff.bin", b"run/\xfe/w.bin"):
        folder = tmp_path / "run"
        file = tmp_path / os.fsdecode(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"weights")
        with pytest.raises(CheckpointError, match="not UTF-8"):
            ckptflip.seal(folder)
        shutil.rmtree(folder)
        assert not sidecar.beside(folder).exists()


@pytest.mark.parametrize("name", ["a" * 256, "/".join(["a" * 200] * 20), "ä" * 128])
def test_names_too_long_for_any_file_lead_nowhere(name: str) -> None:
    assert not sidecar.is_inside(name)
    assert sidecar.is_inside(name[:100])
