"""Criteo's click logs: the Kaggle challenge's (`train.txt`) and the Terabyte one (`day_0` … `day_23`).

Layout of both (the data sets' own descriptions, https://ailab.criteo.com): one line per ad shown, 40 cells
with tabs between them: the label (1 clicked, 0 not), 13 whole numbers, 26 categorical values hashed to 32
bits and written as hexadecimal digits; a missing value is an empty cell. Lines are in the order of time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data import cells, lines
from ckptflip.recsys.data.ids import Counter, Ids, Vocabulary
from ckptflip.recsys.data.logs import ClickLog, Tally, join, take

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

DENSE = tuple(f"I{number}" for number in range(1, 14))
FIELDS = tuple(f"C{number}" for number in range(1, 27))
_COLUMNS = 1 + len(DENSE) + len(FIELDS)
_DAY = re.compile(r"day_(\d+)(\.gz)?$")
_FIRST_FIELD = 1 + len(DENSE)


def dense(counts: Integers) -> NDArray[np.float32]:
    """Dense features as DLRM takes them: log(x + 1), with negative ones as 0.

    Example:
        >>> dense(np.array([[-2, 0, 1]])).round(4).tolist()
        [[0.0, 0.0, 0.6930999755859375]]
    """
    return np.log1p(np.maximum(counts, 0)).astype(np.float32)


def files(path: str | Path) -> list[Path]:
    """The log's files: the file itself; in a folder `train.txt`, or the days in their order.

    Raises:
        WorkloadError: there is no such file.
        UsageError: a folder holds both logs, or a day twice.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    days: dict[int, Path] = {}
    for one in sorted(path.iterdir()):
        if match := _DAY.match(one.name):
            day = int(match[1])
            if day in days:
                raise UsageError(f"{path} holds day {day} twice, {days[day].name} and {one.name}: remove one")
            days[day] = one
    kaggle = [path / name for name in ("train.txt", "train.txt.gz") if (path / name).is_file()]
    if len(kaggle) + bool(days) > 1:
        raise UsageError(f"{path} holds more than one log: name the file")
    found = kaggle or [days[day] for day in sorted(days)]
    if not found:
        raise WorkloadError(f"{path} holds no Criteo log: neither train.txt nor day_0 … day_23, plain or .gz")
    return found


def read(
    paths: Any,
    ids: Ids,
    *,
    limit: int | None = None,
    quarantine: str | Path | None = None,
    most_malformed: float | None = None,
) -> ClickLog:
    """Read a log into memory: 264 bytes a row, so 12 GB for the whole Kaggle log.

    Args:
        paths: a file, a folder (see `files`) or a list of files.
        ids: how raw values become rows, such as `ids.Hashed`.
        limit: stop after this many sound rows; the share of malformed lines then counts up to there.
        quarantine: a file for the malformed lines; see `lines.quarantine`.
        most_malformed: the largest share of malformed lines, 0 to 1; None for any.

    Raises:
        WorkloadError: a file is missing or damaged, no line is sound, or too many are malformed.
        UsageError: options that make no sense.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a log is limited to 1 row or more, not {limit}")
    parts, rows = [], 0
    for part in stream(paths, ids, quarantine=quarantine, most_malformed=most_malformed):
        parts.append(part)
        rows += len(part)
        if limit is not None and rows >= limit:
            break
    log = join(parts)
    lines.check_share(log.tally, most_malformed, _named(paths))
    return log if limit is None else take(log, slice(limit))


def stream(
    paths: Any,
    ids: Ids,
    *,
    quarantine: str | Path | None = None,
    most_malformed: float | None = None,
    block: int = lines.BLOCK,
) -> Iterator[ClickLog]:
    """Read a log in pieces, with memory for one piece; each has its own tally, and may have no row.

    The arguments and errors are those of `read`, `block` the bytes read at a time. Too many malformed lines
    are an error once the whole log is read.
    """
    lines.check_options(most_malformed)
    if len(ids.sizes) != len(FIELDS):
        raise UsageError(f"a Criteo log has {len(FIELDS)} tables, not {len(ids.sizes)}")
    if block < 1:
        raise UsageError(f"a block has 1 byte or more, not {block}")
    aside = None if quarantine is None else Path(quarantine)
    return _pieces(_sources(paths), _named(paths), ids, aside, most_malformed, block)


def _pieces(
    sources: list[Path], name: str, ids: Ids, aside: Path | None, most: float | None, block: int
) -> Iterator[ClickLog]:
    matches = [_DAY.match(path.name) for path in sources]
    days = [int(match[1]) for match in matches if match]
    total = Tally()
    with lines.quarantine(aside) as put:
        for place, path in enumerate(sources):
            day = days[place] if len(days) == len(sources) else None
            for piece in lines.blocks(path, size=block):
                log = _parsed(piece, path, ids, day, put)
                total += log.tally
                yield log
    lines.check_share(total, most, name)


def vocabulary(paths: Any, *, least: int = 1) -> Vocabulary:
    """Go over a log once and give a row to each value that occurs often enough.

    Use it on training files alone where the test must not tell which values exist. Memory is that of the
    distinct values, 12 bytes each; malformed lines are not counted.

    Args:
        paths: as for `read`.
        least: how often a value must occur.
    """
    counter, total = Counter(len(FIELDS)), Tally()
    for path in _sources(paths):
        for piece in lines.blocks(path):
            cut = _cut(piece)
            counter.add(cut.values, cut.missing)
            total += Tally(piece.numbers.size, {"malformed": piece.numbers.size - len(cut.values)})
    if total.set_aside == total.lines:
        raise WorkloadError(f"{_named(paths)} holds no sound line: is it a file of another layout?")
    return counter.vocabulary(least)


def _sources(paths: Any) -> list[Path]:
    if isinstance(paths, str | Path):
        return files(paths)
    found = [path for one in paths for path in files(one)]
    if not found:
        raise UsageError("name the log's files: there are none")
    return found


def _named(paths: Any) -> str:
    return str(paths) if isinstance(paths, str | Path) else ", ".join(str(path) for path in paths)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A block's sound lines in columns, and why the other lines are not sound.

    Attributes:
        bad: bool[lines of the block] by reason; a line has one reason.
        places: int64[k]: where in the block the sound lines are.
        labels: int64[k].
        counts: int64[k, 13]; a missing cell is 0.
        absent: bool[k, 13]: which are missing.
        values: int64[k, 26]; likewise.
        missing: bool[k, 26].
    """

    bad: dict[str, Flags]
    places: Integers
    labels: Integers
    counts: Integers
    absent: Flags
    values: Integers
    missing: Flags


def _cut(piece: lines.Block) -> _Cut:
    starts, ends, fit = lines.columns(piece, b"\t", _COLUMNS)
    empty = starts == ends
    label = piece.text[starts[:, 0]]
    labelled = (ends[:, 0] - starts[:, 0] == 1) & ((label == ord("0")) | (label == ord("1")))
    number, category = np.s_[:, 1:_FIRST_FIELD], np.s_[:, _FIRST_FIELD:]
    counts, whole = cells.integers(piece.text, starts[number], ends[number])
    values, hexadecimal = cells.hexadecimals(piece.text, starts[category], ends[category])
    found = [*lines.unreadable(piece), (f"not of {_COLUMNS} columns", ~fit)]
    for reason, sound in (
        ("with a label other than 0 and 1", labelled),
        ("with a dense value that is no whole number", whole.all(axis=1)),
        ("with a categorical value that is not hexadecimal", hexadecimal.all(axis=1)),
    ):
        mask = np.zeros(fit.size, bool)
        mask[fit] = ~sound
        found.append((reason, mask))
    bad, sound = lines.first_reasons(found)
    kept = sound[fit]
    return _Cut(
        bad,
        np.flatnonzero(sound),
        (label == ord("1"))[kept].astype(np.int64),
        counts[kept],
        empty[number][kept],
        values[kept],
        empty[category][kept],
    )


def _parsed(piece: lines.Block, path: Path, ids: Ids, day: int | None, put: lines.Put) -> ClickLog:
    cut = _cut(piece)
    rows, beyond, unknown = ids.rows(cut.values, cut.missing)
    keep: Any = slice(None)
    if beyond is not None and beyond.any():
        far = np.zeros(piece.numbers.size, bool)
        far[cut.places[beyond.any(axis=1)]] = True
        cut.bad["with an id beyond its table"] = far
        keep = ~far[cut.places]
    for reason, mask in cut.bad.items():
        put(path, piece, np.flatnonzero(mask), reason)
    counts = cut.counts[keep]
    tally = Tally(
        piece.numbers.size,
        {reason: int(mask.sum()) for reason, mask in cut.bad.items()},
        _counted((*DENSE, *FIELDS), np.hstack([cut.absent[keep], cut.missing[keep]])),
        _counted(DENSE, counts < 0),
        {} if unknown is None else _counted(FIELDS, unknown[keep]),
    )
    labels = cut.labels[keep].astype(np.float32)
    days = None if day is None else np.full(labels.size, day, np.int64)
    return ClickLog(labels, dense(counts), rows[keep], ids.sizes, FIELDS, days, tally)


def _counted(names: tuple[str, ...], flags: Flags) -> dict[str, int]:
    """How often each column's flag is set, where it is at all."""
    return {name: int(count) for name, count in zip(names, flags.sum(axis=0), strict=True) if count}
