"""Splits share nothing, leave nothing out, and are the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from ckptflip.errors import UsageError
from ckptflip.recsys.data.splits import Split, by_day, by_group, by_row


def covers(split: Split, rows: int) -> bool:
    whole = np.concatenate([split.train, split.validation, split.test])
    return sorted(whole.tolist()) == list(range(rows)) and all(
        (np.diff(part) > 0).all() for part in (split.train, split.validation, split.test)
    )


@pytest.mark.parametrize("rows", [10, 11, 99, 12_345])
def test_rows_are_dealt_out_once(rows: int) -> None:
    split = by_row(rows, 5)
    assert covers(split, rows)
    assert len(split.validation) == len(split.test) == rows // 10
    again = by_row(rows, 5)
    assert split.test.tolist() == again.test.tolist()
    assert split.validation.tolist() == again.validation.tolist()


def test_another_seed_is_another_split() -> None:
    assert by_row(1000, 1).test.tolist() != by_row(1000, 2).test.tolist()


def test_the_split_is_the_same_for_ever() -> None:
    assert by_row(20, 7).test.tolist() == [5, 7]
    assert by_row(20, 7).validation.tolist() == [8, 15]


def test_every_row_is_as_likely_in_the_test() -> None:
    often = np.zeros(30)
    for seed in range(3000):
        often[by_row(30, seed).test] += 1
    # 300 expected; a deviation is 16.4.
    assert np.abs(often - 300).max() < 4.5 * 16.4


def test_users_lie_in_one_part() -> None:
    users = np.random.default_rng(2).integers(0, 50, 2000) * 17
    split = by_group(users, 9)
    assert covers(split, 2000)
    parts = [set(users[part].tolist()) for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in parts] == [40, 5, 5]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_days_stay_in_order() -> None:
    days = np.array([2, 0, 0, 5, 7, 7, 3, 5])
    split = by_day(days)
    assert covers(split, 8)
    assert split.test.tolist() == [4, 5]
    assert split.validation.tolist() == [3, 7]
    more = by_day(days, validation=2, test=2)
    assert (more.train.tolist(), more.validation.tolist(), more.test.tolist()) == (
        [1, 2],
        [0, 6],
        [3, 4, 5, 7],
    )


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_an_empty_part_is_an_error(rows: int) -> None:
    with pytest.raises(UsageError, match=rf"{rows} rows are too few .* would be empty"):
        by_row(rows, 1)
    with pytest.raises(UsageError, match=rf"{rows} groups are too few"):
        by_group(np.arange(rows), 1)


def test_days_that_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="does not say its days"):
        by_day(None)
    with pytest.raises(UsageError, match=r"none for training: the log has 2 \(day 0, 4\)"):
        by_day([0, 4])
    with pytest.raises(UsageError, match="one day or more"):
        by_day([0, 1, 2], test=0)
    with pytest.raises(UsageError, match=r"has 0 \(day none\)"):
        by_day([])


@pytest.mark.parametrize("shares", [(0.8, 0.2, 0.0), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_shares_that_make_no_sense(shares: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="shares are three numbers"):
        by_row(100, 1, shares)


def test_other_arguments_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="seed"):
        by_row(100, -1)
    with pytest.raises(UsageError, match="one number for each row"):
        by_group(np.zeros((10, 2)), 1)
