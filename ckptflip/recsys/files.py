"""Training and test rows of the official files, as a workload takes them: split, given ids, cut to size."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ckptflip.errors import WorkloadError
from ckptflip.recsys.data import criteo, ids, movielens, splits
from ckptflip.recsys.data.logs import ClickLog, described, take

if TYPE_CHECKING:
    from ckptflip.recsys.recipes import Options

# Days that a log needs for a split in time: one each for training, validation and test.
_DAYS = 3
_TRAIN_SHARE, _, _TEST_SHARE = splits.SHARES


def logs(options: Options) -> tuple[ClickLog, ClickLog]:
    """Training and test rows of ``criteo:FILE`` or ``movielens:DIR``.

    Rows are dealt out 80:10:10 by `data_seed`; a Criteo log of three or more days is split in time instead,
    the last day for the test, the one before it for validation. Validation rows are kept apart and not used.
    Criteo's values get their rows from those that occur in the training rows (row 0: none of these, row 1:
    missing). With `rows`, row numbers are taken modulo that.

    Raises:
        UsageError, WorkloadError: the files are missing, damaged or too short.
    """
    kind, _, place = options.data.partition(":")
    if kind == "movielens":
        log = movielens.read(place).log
        _tell(log, place)
        train, test = _parts(log, options)
    else:
        log = criteo.read(place, ids.Exact((1 << 32,) * len(criteo.FIELDS)), limit=_limit(options))
        _tell(log, place)
        train, test = _with_rows(*_parts(log, options))
    return _cut(train, options.rows), _cut(test, options.rows)


def _limit(options: Options) -> int | None:
    """Rows to read so that both parts are large enough."""
    if options.samples is None:
        return None
    wanted = max(options.samples / _TRAIN_SHARE, (options.test or 0) / _TEST_SHARE)
    return math.ceil(wanted) + 10


def _tell(log: ClickLog, place: str) -> None:
    if log.tally.set_aside:
        told = [said for said in described(log) if "malformed" in said]
        warnings.warn(f"{place}: {'; '.join(told)}", stacklevel=2)


def _parts(log: ClickLog, options: Options) -> tuple[ClickLog, ClickLog]:
    in_time = log.days is not None and np.unique(log.days).size >= _DAYS
    split = splits.by_day(log.days) if in_time else splits.by_row(len(log), options.data_seed)
    return (
        take(log, _first(split.train, options.samples, "training", options.data)),
        take(log, _first(split.test, options.test, "test", options.data)),
    )


def _first(rows: splits.Integers, wanted: int | None, part: str, data: str) -> splits.Integers:
    if wanted is not None and wanted > rows.size:
        raise WorkloadError(f"{data} has {rows.size} {part} rows, not the {wanted} that were asked for")
    return rows[:wanted]


def _with_rows(train: ClickLog, test: ClickLog) -> tuple[ClickLog, ClickLog]:
    """Criteo's raw values as rows; a missing value reads as 0."""
    counter = ids.Counter(len(train.sizes))
    counter.add(train.ids, train.ids == 0)
    known = counter.vocabulary()
    first, second = (
        dataclasses.replace(log, ids=known.rows(log.ids, log.ids == 0)[0], sizes=known.sizes)
        for log in (train, test)
    )
    return first, second


def _cut(log: ClickLog, rows: int | None) -> ClickLog:
    if rows is None:
        return log
    sizes = tuple(min(size, rows) for size in log.sizes)
    return dataclasses.replace(log, ids=log.ids % np.array(sizes, np.int64), sizes=sizes)
