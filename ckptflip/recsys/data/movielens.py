"""MovieLens-1M and -20M from the official files, as a click log: does this user like this movie?

Layouts (the READMEs of https://grouplens.org/datasets/movielens): 1M has `ratings.dat`
(UserID::MovieID::Rating::Timestamp), `users.dat` (UserID::Gender::Age::Occupation::Zip-code) and
`movies.dat` (MovieID::Title::Genres), in Latin-1, without headers; 20M has `ratings.csv` and `movies.csv`,
in UTF-8, with the headers userId,movieId,rating,timestamp and movieId,title,genres. Genres have "|" between
them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data import cells, lines
from ckptflip.recsys.data.logs import ClickLog, Tally

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_MOST_NUMBER = 2**31


@dataclass(frozen=True, slots=True)
class _Version:
    """The official files of one set.

    Attributes:
        name: of the set.
        ratings: file of the ratings.
        separator: between its cells.
        header: its first line, if it has one.
        fields: what a log of it can have, with the file that holds it.
    """

    name: str
    ratings: str
    separator: bytes
    header: bytes | None
    fields: dict[str, str]


_1M = _Version(
    "MovieLens-1M",
    "ratings.dat",
    b"::",
    None,
    {"user": "", "movie": "", "genre": "movies.dat"}
    | dict.fromkeys(("gender", "age", "occupation", "zip"), "users.dat"),
)
_20M = _Version(
    "MovieLens-20M",
    "ratings.csv",
    b",",
    b"userId,movieId,rating,timestamp",
    {"user": "", "movie": "", "genre": "movies.csv"},
)
_USERS = ("user", "gender", "age", "occupation", "zip")


@dataclass(frozen=True, slots=True)
class MovieLens:
    """A set, read.

    Attributes:
        log: labels, no dense features (float32[n, 0]), and a table for each field asked for.
        ratings: float32[n], as given, 0.5 to 5.
        keys: the official values of each table's rows, in the rows' order; of fields other than user and
            movie, row 0 stands for a user or movie that its file does not tell of.
    """

    log: ClickLog
    ratings: NDArray[np.float32]
    keys: tuple[tuple[Any, ...], ...]


def read(
    folder: str | Path,
    *,
    fields: Sequence[str] = ("user", "movie"),
    positive: float = 4.0,
    quarantine: str | Path | None = None,
    most_malformed: float | None = None,
) -> MovieLens:
    """Read a set from its folder, or from a folder that holds `ml-1m` or `ml-20m`.

    Args:
        folder: with the official files.
        fields: the tables: `user`, `movie`, `genre` (the first one listed); of 1M also `gender`, `age`,
            `occupation` and `zip`. A user's or movie's row is its place, by official number, among those with
            a rating.
        positive: a rating of at least this is a click (label 1). With whole stars 4 is the same as "above 3";
            in 20M, which has half stars, "above 3" is 3.5.
        quarantine: a file for malformed ratings; see `lines.quarantine`.
        most_malformed: the largest share of malformed ratings, 0 to 1; None for any.

    Raises:
        UsageError: options that make no sense, or no such files.
        WorkloadError: a file is missing or damaged, no rating is sound, or too many are malformed.
    """
    lines.check_options(most_malformed)
    place, version = _found(Path(folder))
    _check_fields(fields, version)
    if not 0.5 <= positive <= 5:
        raise UsageError(
            f"a rating is 0.5 to 5 stars, and so is the least one that is a click, not {positive!r}"
        )
    table, tally = _ratings(place / version.ratings, version, quarantine, most_malformed)
    columns, keys = [], []
    for name in fields:
        numbers = table.users if name in _USERS else table.movies
        rows, values = _column(place, version, name, numbers)
        columns.append(rows)
        keys.append(values)
    unknown = {
        name: int((rows == 0).sum())
        for name, rows in zip(fields, columns, strict=True)
        if version.fields[name] and (rows == 0).any()
    }
    log = ClickLog(
        (table.ratings >= positive).astype(np.float32),
        np.empty((table.users.size, 0), np.float32),
        np.stack(columns, axis=1),
        tuple(len(values) for values in keys),
        tuple(fields),
        None,
        Tally(tally.lines, tally.malformed, unknown=unknown),
    )
    return MovieLens(log, table.ratings.astype(np.float32), tuple(keys))


def _found(folder: Path) -> tuple[Path, _Version]:
    """The folder with the files, and which set it is."""
    found = [
        (place, version)
        for place, version in (
            (folder, _1M),
            (folder, _20M),
            (folder / "ml-1m", _1M),
            (folder / "ml-20m", _20M),
        )
        if (place / version.ratings).is_file()
    ]
    if not found:
        raise WorkloadError(
            f"{folder} holds no MovieLens set: neither ratings.dat (1M) nor ratings.csv (20M). Unpack the "
            "official archive and name its folder"
        )
    if len(found) > 1:
        raise UsageError(f"{folder} holds {' and '.join(v.name for _, v in found)}: name the folder of one")
    return found[0]


def _check_fields(fields: Sequence[str], version: _Version) -> None:
    if isinstance(fields, str) or not fields or len(set(fields)) < len(fields):
        raise UsageError(f"name one or more fields, each once, not {fields!r}")
    for name in fields:
        if name not in version.fields:
            known = ", ".join(version.fields)
            raise UsageError(f"{version.name} has no field {name!r}; its fields are {known}")


@dataclass(frozen=True, slots=True)
class _Ratings:
    """Users and movies by official number, int64[n], and ratings in stars, float64[n]."""

    users: Integers
    movies: Integers
    ratings: Floats


def _ratings(
    path: Path, version: _Version, aside: str | Path | None, most: float | None
) -> tuple[_Ratings, Tally]:
    parts, total = [], Tally()
    with lines.quarantine(None if aside is None else Path(aside)) as put:
        for piece in lines.blocks(path):
            if piece.numbers[0] == 1 and version.header is not None:
                piece = _without_header(piece, path, version.header)
            part, bad = _parsed(piece, version.separator)
            for reason, mask in bad.items():
                put(path, piece, np.flatnonzero(mask), reason)
            malformed = {reason: int(mask.sum()) for reason, mask in bad.items()}
            total += Tally(piece.numbers.size, malformed)
            parts.append(part)
    lines.check_share(total, most, str(path))
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in _Ratings.__slots__]
    return _Ratings(*joined), total


def _without_header(piece: lines.Block, path: Path, header: bytes) -> lines.Block:
    if piece.line(0) != header:
        raise WorkloadError(
            f"{path} begins with {piece.line(0)[:60].decode('latin-1')!r}, not with the header "
            f"{header.decode()!r}: is it the official file?"
        )
    end = int(piece.ends[0])
    return lines.Block(piece.text[end:], piece.numbers[1:], piece.starts[1:] - end, piece.ends[1:] - end)


def _parsed(piece: lines.Block, separator: bytes) -> tuple[_Ratings, dict[str, Flags]]:
    starts, ends, fit = lines.columns(piece, separator, 4)
    text = piece.text
    numbers, whole = cells.integers(text, starts[:, (0, 1, 3)], ends[:, (0, 1, 3)])
    whole &= ends[:, (0, 1, 3)] > starts[:, (0, 1, 3)]
    stars, half, starred = _stars(text, starts[:, 2], ends[:, 2])
    ratings = stars + half / 2
    limits = (numbers[:, :2] >= 0).all(axis=1) & (numbers[:, :2] < _MOST_NUMBER).all(axis=1)
    found = [*lines.unreadable(piece), ("not of 4 columns", ~fit)]
    for reason, sound in (
        ("with a number that is none", whole.all(axis=1)),
        ("with a rating other than 0.5 to 5 in halves", starred & (ratings >= 0.5) & (ratings <= 5)),
        ("with a user or movie below 0 or above 2^31", limits),
    ):
        mask = np.zeros(fit.size, bool)
        mask[fit] = ~sound
        found.append((reason, mask))
    bad, good = lines.first_reasons(found)
    kept = good[fit]
    return _Ratings(numbers[kept, 0], numbers[kept, 1], ratings[kept]), bad


def _stars(text: Any, starts: Integers, ends: Integers) -> tuple[Floats, Floats, Flags]:
    """Whole stars, half ones, and whether each cell is "4", "4.0" or "3.5"."""
    lengths = ends - starts
    stars = text[starts].astype(np.float64) - ord("0")
    last = text[starts + 2]
    pointed = (lengths == 3) & (text[starts + 1] == ord(".")) & ((last == ord("0")) | (last == ord("5")))
    sound = (stars >= 0) & (stars <= 5) & ((lengths == 1) | pointed)
    return stars, ((last == ord("5")) & (lengths == 3)).astype(np.float64), sound


def _column(place: Path, version: _Version, name: str, numbers: Integers) -> tuple[Integers, tuple[Any, ...]]:
    """int64[n] rows of a field's table, and the official values of the rows."""
    known, position = np.unique(numbers, return_inverse=True)
    if not version.fields[name]:
        return position.astype(np.int64), tuple(known.tolist())
    told = _told(place / version.fields[name], version, name)
    values = sorted(set(told.values()))
    row = {value: number for number, value in enumerate(values, 1)}
    by_number = np.array([row[told[key]] if key in told else 0 for key in known.tolist()], np.int64)
    return by_number[position], ("", *values)


def _told(path: Path, version: _Version, name: str) -> dict[int, str]:
    """A field's value by official number of user or movie."""
    column = {"gender": 1, "age": 2, "occupation": 3, "zip": 4}.get(name, 2)
    width = 5 if name in _USERS else 3
    found = {}
    for number, row in _table(path, version):
        try:
            if len(row) != width:
                raise ValueError(f"{len(row)} columns, not {width}")
            found[int(row[0])] = row[column].split("|")[0]
        except ValueError as error:
            raise WorkloadError(
                f"{path}, line {number}: {error}. The file is damaged: unpack the archive again"
            ) from None
    return found


def _table(path: Path, version: _Version) -> Iterator[tuple[int, list[str]]]:
    """Lines of users or movies: number and cells; a title may hold the separator."""
    split: Callable[[Any], Iterator[list[str]]] = csv.reader if version.header else _dat
    encoding = "utf-8" if version.header else "latin-1"
    try:
        with path.open(encoding=encoding, newline="" if version.header else None) as file:
            for number, row in enumerate(split(file), 1):
                if row and not (number == 1 and version.header):
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise WorkloadError(f"{path} cannot be read: {why}") from None


def _dat(file: Any) -> Iterator[list[str]]:
    for line in file:
        row = line.rstrip("\r\n").split("::")
        if len(row) > 3 and row[1] not in ("M", "F"):
            row = [row[0], "::".join(row[1:-1]), row[-1]]
        yield row if row != [""] else []
