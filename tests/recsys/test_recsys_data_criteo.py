"""Criteo's files are read exactly, by blocks of any size; malformed lines are counted and set aside."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from recsys_layouts import CATEGORIES, COUNTS, criteo_file, criteo_line

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data import clicks, criteo, logs, tsv
from ckptflip.recsys.data.ids import Exact, Hashed

WIDE = Hashed((2**32,) * 26)


def changed(cells: list[str], place: int, cell: str) -> list[str]:
    return [*cells[:place], cell, *cells[place + 1 :]]


def test_every_cell_of_a_line(tmp_path: Path) -> None:
    first = criteo_line("1")
    second = criteo_line("0", [*("-2", ""), *COUNTS[2:]], ["", "F", *CATEGORIES[2:]])
    log = criteo.read(criteo_file(tmp_path / "train.txt", [first, second]), WIDE)
    assert logs.check(log) is log
    assert log.labels.tolist() == [1, 0]
    numbers = [int(cell or "0") for cell in COUNTS]
    wanted = [[math.log1p(n) for n in numbers], [0, 0, *(math.log1p(n) for n in numbers[2:])]]
    assert log.dense.tolist() == np.array(wanted, np.float32).tolist()
    values = [int(cell, 16) for cell in CATEGORIES]
    assert log.ids.tolist() == [values, [0, 15, *values[2:]]]
    assert log.fields == tuple(f"C{n}" for n in range(1, 27))
    assert log.days is None
    assert log.tally == logs.Tally(2, {}, {"I12": 2, "I2": 1, "C1": 1}, {"I1": 1})


def test_hashed_ids_are_the_value_modulo_the_size(tmp_path: Path) -> None:
    sizes = tuple(range(1, 27))
    log = criteo.read(criteo_file(tmp_path / "train.txt", [criteo_line()]), Hashed(sizes))
    assert log.ids[0].tolist() == [int(cell, 16) % size for cell, size in zip(CATEGORIES, sizes, strict=True)]
    assert log.sizes == sizes


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("block", [1, 100, 333, 1 << 20])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_blocks_make_no_difference(tmp_path: Path, end: str, block: int, last: bool) -> None:
    lines = [criteo_line(str(n % 2), changed(COUNTS, 12, str(n))) for n in range(9)]
    path = criteo_file(tmp_path / "train.txt", lines, end)
    if not last:
        path.write_bytes(path.read_bytes()[: -len(end)])
    plain = criteo.read(criteo_file(tmp_path / "plain", lines), WIDE)
    log = logs.join(criteo.stream(path, WIDE, block=block))
    assert log.tally == plain.tally
    for name in ("labels", "dense", "ids"):
        assert getattr(log, name).tolist() == getattr(plain, name).tolist()


MALFORMED = {
    "not of 40 columns": [
        criteo_line() + "\t",
        criteo_line().removesuffix("\t" + CATEGORIES[-1]),
        "text",
        "\t",
    ],
    "with a label other than 0 and 1": [criteo_line("2"), criteo_line(""), criteo_line("01")],
    "with a dense value that is no whole number": [
        criteo_line(counts=changed(COUNTS, place, cell))
        for place, cell in [(0, "1.5"), (12, "x"), (3, "-"), (4, "1e5"), (5, " 1"), (6, "12345678901234567")]
    ],
    "with a categorical value that is not hexadecimal": [
        criteo_line(categories=changed(CATEGORIES, place, cell))
        for place, cell in [(0, "68fd1e6g"), (25, "168fd1e64"), (3, "-1"), (4, "0x12"), (5, "ÿ")]
    ],
    "with a NUL byte": [criteo_line() + "\0", "\0", criteo_line(categories=changed(CATEGORIES, 9, "\0"))],
    "too long": ["7" * 5000, criteo_line() + "\t1" * 3000],
}


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_malformed_lines_are_counted_and_set_aside(tmp_path: Path, block: int) -> None:
    lines, told = [], []
    for reason, bad in MALFORMED.items():
        for line in bad:
            lines += [criteo_line("1"), line]
            told.append((len(lines), reason, line[:4096]))
    path = criteo_file(tmp_path / "train.txt", lines)
    aside = tmp_path / "aside.jsonl"
    log = logs.join(criteo.stream(path, WIDE, quarantine=aside, block=block))
    assert len(log) == len(told)
    assert log.labels.all()
    assert log.tally.lines == len(lines)
    assert log.tally.malformed == {reason: len(bad) for reason, bad in MALFORMED.items()}
    entries = sorted(map(json.loads, aside.read_text().splitlines()), key=lambda entry: entry["line"])
    assert [(entry["line"], entry["reason"], entry["text"]) for entry in entries] == told
    assert {entry["file"] for entry in entries} == {str(path)}
    said = "\n".join(logs.described(log))
    assert f"{len(told)} of {len(lines)} lines are malformed and were set aside: " in said
    assert "6 with a dense value that is no whole number" in said


def test_the_share_of_malformed_lines_can_be_limited(tmp_path: Path) -> None:
    path = criteo_file(tmp_path / "train.txt", [criteo_line()] * 3 + ["x"])
    assert len(criteo.read(path, WIDE, most_malformed=0.25)) == 3
    with pytest.raises(
        WorkloadError, match=r"1 of 4 lines are malformed \(1 not of 40 columns\).*at most 0.2"
    ):
        criteo.read(path, WIDE, most_malformed=0.2)
    with pytest.raises(UsageError, match="from 0 to 1, not 2"):
        criteo.read(path, WIDE, most_malformed=2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no lines"),
        (["", ""], "holds no lines"),
        (["x", "y"], "all 2 lines are malformed"),
        (
            [criteo_line()[2:]],  # the official test.txt has no labels
            r"all 1 lines are malformed \(1 not of 40 columns\). Is it a file of another layout",
        ),
    ],
)
def test_a_log_without_a_sound_line_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    path = criteo_file(tmp_path / "train.txt", lines)
    with pytest.raises(WorkloadError, match=message):
        criteo.read(path, WIDE)
    with pytest.raises(WorkloadError, match=message):
        list(criteo.stream(path, WIDE))
    if lines:
        with pytest.raises(WorkloadError, match="holds no sound line"):
            criteo.vocabulary(path)


def test_ids_as_they_are_and_beyond_their_table(tmp_path: Path) -> None:
    small = ["5"] * 26
    lines = [criteo_line("1", COUNTS, small), criteo_line("0", COUNTS, changed(small, 3, "6"))]
    path = criteo_file(tmp_path / "train.txt", lines)
    log = criteo.read(path, Exact((6,) * 26), quarantine=tmp_path / "aside")
    assert log.ids.tolist() == [[5] * 26]
    assert log.labels.tolist() == [1]
    assert log.tally.malformed == {"with an id beyond its table": 1}
    assert log.tally.missing == {"I12": 1}
    assert json.loads((tmp_path / "aside").read_text())["line"] == 2


def test_a_vocabulary_knows_what_occurs_often_enough(tmp_path: Path) -> None:
    categories = [
        changed(CATEGORIES, 0, cell) for cell in ["b", "a", "b", "c", "a", "b", "", "ffffffff", "ffffffff"]
    ]
    lines = [criteo_line(categories=one) for one in categories]
    path = criteo_file(tmp_path / "train.txt", [*lines, "malformed", criteo_line("2", COUNTS, categories[3])])
    known = criteo.vocabulary(path, least=2)
    assert [values.tolist() for values in known.values[:2]] == [
        [0xA, 0xB, 0xFFFFFFFF],
        [int(CATEGORIES[1], 16)],
    ]
    log = criteo.read(path, known)
    assert log.ids[:, 0].tolist() == [3, 2, 3, 0, 2, 3, 1, 4, 4]
    assert log.sizes[:2] == (5, 3)
    assert log.tally.unknown == {"C1": 1}
    assert logs.check(log) is log
    with pytest.raises(UsageError, match="not 0 times"):
        criteo.vocabulary(path, least=0)


def test_counting_by_chunks_equals_counting_at_once() -> None:
    from ckptflip.recsys.data.ids import Counter

    rng = np.random.default_rng(3)
    values = rng.integers(0, 200_000, (400_000, 1))
    missing = rng.random((400_000, 1)) < 0.1
    counter = Counter(1)
    for start in range(0, len(values), 7919):
        counter.add(values[start : start + 7919], missing[start : start + 7919])
    found, often = np.unique(values[~missing], return_counts=True)
    assert counter.vocabulary(least=3).values[0].tolist() == found[often >= 3].tolist()


def test_the_days_of_the_terabyte_log(tmp_path: Path) -> None:
    for day in (0, 2, 10):
        content = (criteo_line("1") + "\n").encode() * (day + 1)
        packed = day != 2
        (tmp_path / f"day_{day}{'.gz' if packed else ''}").write_bytes(
            gzip.compress(content) if packed else content
        )
    (tmp_path / "README").write_text("not a day")
    log = criteo.read(tmp_path, WIDE)
    assert log.days is not None
    assert log.days.tolist() == [0] + [2] * 3 + [10] * 11
    assert [path.name for path in criteo.files(tmp_path)] == ["day_0.gz", "day_2", "day_10.gz"]
    one = criteo.read([tmp_path / "day_2"], WIDE)
    assert one.days is not None
    assert one.days.tolist() == [2] * 3


def test_a_truncated_day_is_an_error_after_what_is_sound(tmp_path: Path) -> None:
    lines = [criteo_line("1", [str(n)] * 13) for n in range(2000)]
    content = gzip.compress("\n".join(lines).encode())
    (tmp_path / "day_0.gz").write_bytes(content[: len(content) // 2])
    rows = 0
    with pytest.raises(WorkloadError, match="truncated"):
        for part in criteo.stream(tmp_path / "day_0.gz", WIDE, block=1000):
            rows += len(part)
    assert 0 < rows < 2000


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="holds no Criteo log"):
        criteo.files(tmp_path)
    criteo_file(tmp_path / "train.txt", [criteo_line()])
    assert criteo.files(tmp_path) == [tmp_path / "train.txt"]
    criteo_file(tmp_path / "day_0", [criteo_line()])
    with pytest.raises(UsageError, match="more than one log"):
        criteo.files(tmp_path)
    (tmp_path / "train.txt").unlink()
    criteo_file(tmp_path / "day_0.gz", [criteo_line()])
    with pytest.raises(UsageError, match="day 0 twice"):
        criteo.files(tmp_path)
    with pytest.raises(WorkloadError, match="cannot be read"):
        criteo.read(tmp_path / "nowhere", WIDE)
    with pytest.raises(UsageError, match="there are none"):
        criteo.read([], WIDE)


def test_a_log_of_one_class_is_read_and_said(tmp_path: Path) -> None:
    log = criteo.read(criteo_file(tmp_path / "train.txt", [criteo_line("0")] * 3), WIDE)
    assert "no row is clicked: no AUC can be measured on them" in logs.described(log)


def test_a_limit(tmp_path: Path) -> None:
    path = criteo_file(tmp_path / "train.txt", [criteo_line(counts=[str(n)] * 13) for n in range(50)])
    log = criteo.read(path, WIDE, limit=7)
    assert log.dense.tolist() == criteo.read(path, WIDE).dense[:7].tolist()
    with pytest.raises(UsageError, match="1 row or more"):
        criteo.read(path, WIDE, limit=0)


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="26 tables, not 3"):
        criteo.stream(tmp_path, Hashed((1, 2, 3)))
    with pytest.raises(UsageError, match="from 0 to 1"):
        criteo.stream(tmp_path, WIDE, most_malformed=-1)
    with pytest.raises(UsageError, match="1 byte or more"):
        criteo.stream(tmp_path / "x", WIDE, block=0)
    for sizes in ((0,) * 26, (2**32 + 1,) * 26, ()):
        with pytest.raises(UsageError, match="sizes of tables"):
            Hashed(sizes)
        with pytest.raises(UsageError, match="sizes of tables"):
            Exact(sizes)


def test_a_generated_log_written_and_read_is_the_same(tmp_path: Path) -> None:
    spec = clicks.ClickSpec(5, zipf=1.0625)
    generated = clicks.generate(spec, 0, 3000)
    path = tmp_path / "train.txt"
    assert tsv.write(path, clicks.stream(spec, 0, 3000, rows=700)) == 3000
    first = path.read_bytes().split(b"\n")[0].split(b"\t")
    assert len(first) == 40
    log = criteo.read(path, Exact(spec.tables))
    for name in ("labels", "dense", "ids"):
        assert getattr(log, name).tolist() == getattr(generated.log, name).tolist()
    missing = generated.missing.sum(axis=0)
    assert {name: n for name, n in log.tally.missing.items() if name[0] == "I"} == {
        f"I{column + 1}": n for column, n in enumerate(missing.tolist()) if n
    }
    assert log.tally.negative == {"I2": int((generated.counts[:, 1] < 0).sum())}
    with pytest.raises(WorkloadError, match="cannot be written"):
        tsv.write(tmp_path / "no" / "train.txt", [generated])


def slowly(content: bytes) -> tuple[list[list[int]], int]:
    """The sound lines' numbers and how many lines are malformed, read the plain way."""
    rows, bad = [], 0
    for raw in content.split(b"\n"):
        line = raw.removesuffix(b"\r")
        if not line:
            continue
        cells = line.split(b"\t")
        fits = len(cells) == 40 and len(line) <= 4096 and cells[0] in (b"0", b"1")
        fits = fits and all(re.fullmatch(rb"(-?[0-9]{1,16})?", cell) for cell in cells[1:14])
        if fits and all(re.fullmatch(rb"[0-9a-fA-F]{0,8}", cell) for cell in cells[14:]):
            numbers = [max(int(cell or b"0"), 0) for cell in cells[1:14]]
            rows.append([int(cells[0]), *numbers, *(int(cell or b"0", 16) for cell in cells[14:])])
        else:
            bad += 1
    return rows, bad


ALPHABET = b"\t\n\r\0 -+.0123456789abcfgABFG:\xff"


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_are_read_as_the_plain_way_reads_them(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray("\n".join([criteo_line("1"), criteo_line("0")] * 20).encode())
    for _ in range(int(rng.integers(0, 60))):
        place, length = int(rng.integers(0, len(content))), int(rng.integers(0, 3))
        content[place : place + length] = (
            rng.choice(list(ALPHABET), int(rng.integers(0, 3))).astype("u1").tobytes()
        )
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    rows, bad = slowly(bytes(content))
    parts = []
    for part in criteo.stream(path, WIDE, block=int(rng.integers(1, 3000))):
        parts.append(part)
        if (
            sum(len(part) for part in parts) == len(rows)
            and sum(p.tally.lines for p in parts) == len(rows) + bad
        ):
            break  # a log without a sound line is refused at its end
    log = logs.join(parts)
    assert log.tally.set_aside == bad
    wanted = np.array(rows, np.int64).reshape(-1, 40)
    assert log.labels.tolist() == wanted[:, 0].tolist()
    assert log.dense.tolist() == np.log1p(wanted[:, 1:14]).astype(np.float32).tolist()
    assert log.ids.tolist() == wanted[:, 14:].tolist()
