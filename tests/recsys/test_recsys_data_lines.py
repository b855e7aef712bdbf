"""Files of lines come in blocks of whole lines; what is damaged is told, what is malformed set aside."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data import lines

CONTENT = b"a\tb\r\n\nccc\tdd\n\r\nlast\tone"


def whole(path: Path, size: int) -> list[tuple[int, bytes]]:
    return [
        (int(number), block.line(place))
        for block in lines.blocks(path, size=size)
        for place, number in enumerate(block.numbers)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_lines_and_their_numbers_whatever_the_blocks(tmp_path: Path, size: int, packed: bool) -> None:
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(CONTENT) if packed else CONTENT)
    assert whole(path, size) == [(1, b"a\tb"), (3, b"ccc\tdd"), (5, b"last\tone")]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n\n"])
def test_a_file_without_lines_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    assert whole(tmp_path / "log", 10) == []


def test_a_file_without_line_ends_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 3_000_000 + b"\nshort\n")
    tracemalloc.start()
    try:
        found = [(int(b.numbers[0]), len(b.line(0)), b.line(1)) for b in lines.blocks(path, size=10_000)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[0][0] == 1
    assert lines.MOST_LINE < found[0][1] < 20_000
    assert found[0][2] == b"short"
    assert most < 1_000_000


def test_cells_of_the_lines_that_have_the_columns(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a::bb::c\nno\n::x::\na::b:::c\na::b::c::d\n1::2::3\n")
    (block,) = lines.blocks(tmp_path / "log")
    starts, ends, fit = lines.columns(block, b"::", 3)
    cells = [
        [block.text[a:b].tobytes() for a, b in zip(*pair, strict=True)]
        for pair in zip(starts, ends, strict=True)
    ]
    assert fit.tolist() == [True, False, True, False, False, True]
    assert cells == [[b"a", b"bb", b"c"], [b"", b"x", b""], [b"1", b"2", b"3"]]


def test_the_first_reason_counts_alone() -> None:
    one, other = np.array([True, False, False]), np.array([True, True, False])
    bad, sound = lines.first_reasons([("one", one), ("other", other), ("none", ~one & ~one & one)])
    assert {reason: mask.tolist() for reason, mask in bad.items()} == {
        "one": [True, False, False],
        "other": [False, True, False],
    }
    assert sound.tolist() == [False, False, True]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "tail"])
def test_a_damaged_gzip_file_is_told(tmp_path: Path, damage: str) -> None:
    content = gzip.compress(np.random.default_rng(0).bytes(50_000).hex().encode() + b"\n")
    damaged = {
        "truncated": content[:20_000],
        "flipped": content[:20_000] + bytes([content[20_000] ^ 16]) + content[20_001:],
        "tail": content + b"rubbish",
    }[damage]
    (tmp_path / "day_0.gz").write_bytes(damaged)
    with pytest.raises(WorkloadError, match=r"day_0\.gz is a truncated or damaged gzip file"):
        whole(tmp_path / "day_0.gz", 1 << 16)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nowhere cannot be read: No such file"):
        whole(tmp_path / "nowhere", 10)
    with pytest.raises(WorkloadError, match="cannot be read: Is a directory"):
        whole(tmp_path, 10)


def test_what_is_set_aside_can_be_read_back(tmp_path: Path) -> None:
    path, aside = tmp_path / "log", tmp_path / "aside.jsonl"
    path.write_bytes(b"good\n\xff\x00\tbad\n" + b"x" * 5000 + b"\n")
    (block,) = lines.blocks(path)
    for _ in range(2):  # a second run begins the file again
        with lines.quarantine(aside) as put:
            put(path, block, np.array([1, 2]), "odd")
    entries = [json.loads(line) for line in aside.read_text("ascii").splitlines()]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in entries] == [
        (str(path), 2, "odd"),
        (str(path), 3, "odd"),
    ]
    assert entries[0]["text"].encode("latin-1") == b"\xff\x00\tbad"
    assert entries[1]["text"] == "x" * lines.MOST_LINE


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    precious = tmp_path / "train.txt"
    precious.write_bytes(b"0\t1\n")
    with (
        pytest.raises(UsageError, match=r"not written over .*train\.txt, which holds something else"),
        lines.quarantine(precious),
    ):
        pass
    assert precious.read_bytes() == b"0\t1\n"
    with pytest.raises(UsageError, match="cannot be written to"), lines.quarantine(tmp_path):
        pass


def test_no_file_when_nothing_is_set_aside(tmp_path: Path) -> None:
    with lines.quarantine(tmp_path / "aside"):
        pass
    assert not (tmp_path / "aside").exists()
    path = tmp_path / "log"
    path.write_bytes(b"bad\n")
    (block,) = lines.blocks(path)
    with (
        pytest.raises(UsageError, match=r"cannot be written to .*: No such file"),
        lines.quarantine(tmp_path / "no" / "aside") as put,
    ):
        put(path, block, np.array([0]), "odd")
