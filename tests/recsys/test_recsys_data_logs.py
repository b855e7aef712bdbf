"""A log's arrays fit together, or it is said what does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data.logs import ClickLog, Tally, access_counts, check, described, join, take


def a_log(ids: list[list[int]], tally: Tally | None = None) -> ClickLog:
    n = len(ids)
    return ClickLog(
        (np.arange(n) % 2).astype(np.float32),
        np.arange(n * 2, dtype=np.float32).reshape(n, 2),
        np.array(ids, np.int64),
        (4, 100),
        ("user", "movie"),
        np.arange(n),
        tally or Tally(n),
    )


LOG = a_log([[0, 99], [3, 5], [3, 5]])


def test_rows_are_taken_and_logs_joined() -> None:
    one, rest = take(LOG, [0]), take(LOG, slice(1, None))
    both = join([rest, one])
    assert both.ids.tolist() == [[3, 5], [3, 5], [0, 99]]
    assert both.labels.tolist() == [1, 0, 0]
    assert both.dense.tolist() == [[2, 3], [4, 5], [0, 1]]
    assert both.days is not None
    assert both.days.tolist() == [1, 2, 0]
    assert len(take(LOG, LOG.labels == 1)) == 1


def test_tallies_are_added() -> None:
    one = Tally(5, {"long": 2}, {"C1": 1}, {}, {"C2": 3})
    other = Tally(7, {"long": 1, "label": 4}, {}, {"I1": 2}, {"C2": 1})
    both = join([a_log([[0, 0]], one), a_log([[1, 1]], other)]).tally
    assert both == Tally(12, {"long": 3, "label": 4}, {"C1": 1}, {"I1": 2}, {"C2": 4})
    assert both.set_aside == 7


def test_other_tables_are_not_joined_or_counted_together() -> None:
    other = replace(LOG, sizes=(4, 101))
    with pytest.raises(UsageError, match="cannot be joined"):
        join([LOG, other])
    with pytest.raises(UsageError, match="cannot be joined"):
        join([LOG, replace(LOG, days=None)])
    with pytest.raises(UsageError, match="cannot be counted together"):
        access_counts([LOG, other])
    with pytest.raises(UsageError, match="no log to join"):
        join([])
    with pytest.raises(UsageError, match="no log to count"):
        access_counts([])


def test_accesses_by_row_of_small_and_large_tables() -> None:
    assert [c.tolist() for c in access_counts(LOG)] == [c.tolist() for c in access_counts([LOG])]
    users, movies = access_counts([LOG, LOG])
    assert users.tolist() == [2, 0, 0, 4]
    assert {row: int(movies[row]) for row in np.flatnonzero(movies)} == {5: 4, 99: 2}
    many = a_log([[n % 4, n % 100] for n in range(1000)])
    assert access_counts([many])[1].tolist() == [10] * 100


@pytest.mark.parametrize("ids", [[[0, 0], [4, 0]], [[0, 0], [-1, 0]]])
def test_an_id_beyond_its_table(ids: list[list[int]]) -> None:
    message = r"row 1 of the log: id -?\d of field user lies beyond its table of 4 rows \(1 such ids in all\)"
    with pytest.raises(WorkloadError, match=message):
        check(a_log(ids))
    with pytest.raises(WorkloadError, match=message):
        access_counts([a_log(ids)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 2], np.float32)}, "row 2 of the log: the label is 2.0"),
        ({"labels": np.array([0, 1, 0])}, "labels are float32"),
        ({"labels": np.array([0, 1], np.float32)}, "dense are float32 of shape"),
        ({"dense": np.array([[0, np.inf]] * 3, np.float32)}, "dense feature 1 is inf"),
        ({"dense": np.zeros(3, np.float32)}, "dense are float32"),
        ({"ids": np.zeros((3, 2), np.int32)}, "ids are int64"),
        ({"ids": np.zeros((3, 1), np.int64)}, "ids are int64"),
        ({"days": np.zeros(2, np.int64)}, "days are int64"),
        ({"fields": ("user",)}, "as many names, not 1"),
    ],
)
def test_arrays_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    assert check(LOG) is LOG
    with pytest.raises(UsageError, match=message):
        check(replace(LOG, **changes))  # type: ignore[arg-type]


def test_what_is_said_of_a_log() -> None:
    tally = Tally(
        10,
        {"too long": 1, "not of 40 columns": 6},
        {"C1": 1, "C2": 5, "I1": 2, "I2": 2},
        {"I2": 3},
        {"C9": 1},
    )
    assert described(replace(LOG, tally=tally)) == [
        "3 rows, 1 clicked (33.33 %)",
        "7 of 10 lines are malformed and were set aside: 6 not of 40 columns, 1 too long",
        "10 cells are missing and became 0 (C2 5, I1 2, I2 2, …)",
        "3 dense values are negative and became 0 (I2 3)",
        "1 ids are not in the vocabulary (C9 1)",
    ]
    assert described(take(LOG, slice(0))) == ["0 rows, 0 clicked"]
    assert described(take(LOG, [1]))[1] == "every row is clicked: no AUC can be measured on them"
    assert described(take(LOG, [0]))[1] == "no row is clicked: no AUC can be measured on them"
