"""MovieLens' official files are read exactly; what is malformed is counted, what is damaged told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recsys_layouts import MOVIES, MOVIES_CSV, RATINGS, RATINGS_CSV, USERS, movielens_1m, movielens_20m

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data import logs, movielens, splits


def test_the_1m_set(tmp_path: Path) -> None:
    found = movielens.read(movielens_1m(tmp_path / "ml-1m"))
    assert logs.check(found.log) is found.log
    assert found.log.labels.tolist() == [1, 0, 1, 0]
    assert found.ratings.tolist() == [5, 3, 4, 1]
    assert found.log.fields == ("user", "movie")
    assert found.keys == ((1, 2, 6040), (661, 1193, 3952))
    assert found.log.ids.tolist() == [[0, 1], [0, 0], [1, 1], [2, 2]]
    assert found.log.sizes == (3, 3)
    assert found.log.dense.shape == (4, 0)
    assert found.log.tally == logs.Tally(4)


def test_the_archive_may_be_unpacked_beside(tmp_path: Path) -> None:
    movielens_1m(tmp_path / "ml-1m")
    assert len(movielens.read(tmp_path).log) == 4
    movielens_20m(tmp_path / "ml-20m")
    with pytest.raises(UsageError, match="holds MovieLens-1M and MovieLens-20M"):
        movielens.read(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_20m_set_has_half_stars(tmp_path: Path, end: str) -> None:
    folder = movielens_20m(tmp_path, end=end)
    found = movielens.read(folder, fields=("user", "movie", "genre"))
    assert found.ratings.tolist() == [3.5, 4.0, 0.5]
    assert found.log.labels.tolist() == [0, 1, 0]
    assert movielens.read(folder, positive=3.5).log.labels.tolist() == [1, 1, 0]
    assert found.keys == ((1, 7), (2, 29), ("", "(no genres listed)", "Adventure"))
    assert found.log.ids.tolist() == [[0, 0, 2], [0, 1, 1], [1, 0, 2]]


def test_fields_of_users_and_movies(tmp_path: Path) -> None:
    fields = ("movie", "genre", "gender", "age", "occupation", "zip")
    found = movielens.read(movielens_1m(tmp_path), fields=fields)
    assert found.keys[1:] == (
        ("", "Animation", "Drama"),
        ("", "F", "M"),
        ("", "1", "25", "56"),
        ("", "10", "16", "6"),
        ("", "11106", "48067", "70072"),
    )
    assert found.log.ids[3].tolist() == [2, 2, 2, 2, 3, 1]
    assert logs.check(found.log).sizes == (3, 3, 3, 4, 4, 4)


def test_users_and_movies_that_the_files_do_not_tell_of(tmp_path: Path) -> None:
    folder = movielens_1m(tmp_path, users=USERS[:1], movies=MOVIES[:1])
    found = movielens.read(folder, fields=("gender", "genre"))
    assert found.log.ids.tolist() == [[1, 0], [1, 1], [0, 0], [0, 0]]
    assert found.log.tally.unknown == {"gender": 2, "genre": 3}


def test_a_title_may_hold_anything(tmp_path: Path) -> None:
    odd = "661::Title :: with \x85colons:: (1996)::Comedy|Drama"
    found = movielens.read(movielens_1m(tmp_path, movies=[odd, *MOVIES[1:]]), fields=("genre",))
    assert found.keys == (("", "Comedy", "Drama"),)


MALFORMED = {
    "not of 4 columns": ["1::2::3", "1::2::3::4::5", "1:2:3:4", "1,2,3,4", "1::2::::4"],
    "with a number that is none": ["x::2::3::4", "::2::3::4", "1::2::3::", "1::2.0::3::4"],
    "with a rating other than 0.5 to 5 in halves": [
        f"1::2::{rating}::4" for rating in ("0", "6", "3.7", "10", "-1", "5.5", "3.", "nan", "35.")
    ],
    "with a user or movie below 0 or above 2^31": ["-1::2::3::4", "1::2147483648::3::4"],
    "with a NUL byte": ["1::2::3::4\0"],
    "too long": ["1" * 5000 + "::2::3::4"],
}


def test_malformed_ratings_are_counted_and_set_aside(tmp_path: Path) -> None:
    bad = [line for lines in MALFORMED.values() for line in lines]
    folder, aside = movielens_1m(tmp_path / "set", ratings=[*bad, *RATINGS]), tmp_path / "aside"
    found = movielens.read(folder, quarantine=aside)
    assert found.log.tally.lines == len(bad) + 4
    assert found.log.tally.malformed == {reason: len(lines) for reason, lines in MALFORMED.items()}
    assert found.keys == ((1, 2, 6040), (661, 1193, 3952))
    entries = sorted(map(json.loads, aside.read_text().splitlines()), key=lambda entry: entry["line"])
    assert [entry["text"] for entry in entries] == [line[:4096] for line in bad]
    with pytest.raises(WorkloadError, match="22 of 26 lines are malformed"):
        movielens.read(folder, most_malformed=0.5)


def test_sets_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="holds no MovieLens set"):
        movielens.read(tmp_path)
    with pytest.raises(WorkloadError, match="all 1 lines are malformed"):
        movielens.read(movielens_1m(tmp_path / "a", ratings=["x"]))
    with pytest.raises(WorkloadError, match=r"ratings\.dat holds no lines"):
        movielens.read(movielens_1m(tmp_path / "b", ratings=[]))
    with pytest.raises(WorkloadError, match=r"begins with '1,2,3\.5,1112486027', not with the header"):
        movielens.read(movielens_20m(tmp_path / "c", ratings=RATINGS_CSV[1:]))
    with pytest.raises(WorkloadError, match=r"ratings\.csv holds no lines"):
        movielens.read(movielens_20m(tmp_path / "d", ratings=RATINGS_CSV[:1]))


def test_damaged_tables_of_users_and_movies(tmp_path: Path) -> None:
    folder = movielens_1m(tmp_path / "a", users=[USERS[0], "2::M::56"])
    assert len(movielens.read(folder).log) == 4  # users.dat has no part in it
    with pytest.raises(WorkloadError, match=r"users\.dat, line 2: 3 columns, not 5"):
        movielens.read(folder, fields=("age",))
    (folder / "users.dat").unlink()
    with pytest.raises(WorkloadError, match=r"users\.dat cannot be read: No such file or directory$"):
        movielens.read(folder, fields=("age",))
    with pytest.raises(WorkloadError, match=r"movies\.dat, line 1: invalid literal"):
        movielens.read(movielens_1m(tmp_path / "b", movies=["x::y::z"]), fields=("genre",))
    folder = movielens_20m(tmp_path / "c", movies=[*MOVIES_CSV, "3,a,b,c"])
    with pytest.raises(WorkloadError, match=r"movies\.csv, line 4: 4 columns, not 3"):
        movielens.read(folder, fields=("genre",))
    (folder / "movies.csv").write_bytes(b"movieId,title,genres\n1,\xff,x\n")
    with pytest.raises(WorkloadError, match=r"movies\.csv cannot be read"):
        movielens.read(folder, fields=("genre",))


def test_fields_that_make_no_sense(tmp_path: Path) -> None:
    folder = movielens_20m(tmp_path)
    with pytest.raises(
        UsageError, match="MovieLens-20M has no field 'age'; its fields are user, movie, genre"
    ):
        movielens.read(folder, fields=("age",))
    for fields in ((), ("user", "user"), "user"):
        with pytest.raises(UsageError, match="each once"):
            movielens.read(folder, fields=fields)


def test_a_split_by_user_does_not_leak(tmp_path: Path) -> None:
    ratings = [f"{user}::{movie}::{movie % 5 + 1}::1" for user in range(1, 21) for movie in range(1, 6)]
    log = movielens.read(movielens_1m(tmp_path, ratings=ratings)).log
    split = splits.by_group(log.ids[:, 0], 3)
    users = [set(log.ids[part, 0].tolist()) for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in users] == [16, 2, 2]
    assert len(set.union(*users)) == 20


@pytest.mark.parametrize("positive", [0, 5.5, float("nan")])
def test_clicks_are_told_by_a_rating_that_exists(tmp_path: Path, positive: float) -> None:
    with pytest.raises(UsageError, match="so is the least one that is a click"):
        movielens.read(movielens_1m(tmp_path), positive=positive)
