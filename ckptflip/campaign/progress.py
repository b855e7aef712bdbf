"""How far a campaign is, from its store alone: each cell's trials and rate, the pace, the time left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ckptflip.campaign.shards import Shard, complete_shard
from ckptflip.campaign.spec import BAD
from ckptflip.campaign.store.lock import Holder, holder_of
from ckptflip.campaign.store.opening import undamaged
from ckptflip.campaign.store.reading import Reader, reading
from ckptflip.campaign.store.rows import Attempt, Cell, CellCounts

if TYPE_CHECKING:
    from ckptflip.campaign.estimates import Estimate

# The pace is that of the last trials: machines come and go, and collapsed trials end early.
_RECENT = 500
# A pause this many times as long as a trial, and no shorter than this many seconds, is none of the pace.
_PAUSE, _SHORTEST_PAUSE = 10.0, 60.0


class CellProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far one cell is.

    Attributes:
        label: the condition, in words.
        workload: label of the workload.
        epoch: of the checkpoint that is altered.
        done: trials with an outcome.
        wanted: trials wanted; with a stop rule, at most.
        failed: trials that crashed, hung or ran out of memory.
        outcomes: trials by outcome; those that did not occur have no entry.
        rate: the share of bad outcomes, weighted where trials are drawn by stratum; None: not known yet.
        low: lower end of its interval: Wilson's, for display; the confidence sequence's where a rule stops
            cells or trials are drawn by stratum; None likewise.
        high: upper end.
        stopped: why no more trials are run; None: more are.
    """

    label: str
    workload: str
    epoch: int
    done: int
    wanted: int
    failed: int
    outcomes: dict[str, int]
    rate: float | None
    low: float | None
    high: float | None
    stopped: str | None

    @property
    def left(self) -> int:
        """Trials that may still be run."""
        return 0 if self.stopped is not None else max(0, self.wanted - self.done - self.failed)


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a campaign is.

    Attributes:
        name: of the campaign.
        cells: those of the spec, in its order.
        bad: the outcomes whose rate is told.
        confidence: of the intervals.
        per_hour: trials finished per hour, lately; None: not known yet.
        rule: whether a rule may stop cells before they have all trials.
        writer: the process that runs it now; None: none does.
        shard: the part of the campaign that this store is for, where all of that is there.
    """

    name: str
    cells: tuple[CellProgress, ...]
    bad: tuple[str, ...]
    confidence: float
    per_hour: float | None
    rule: bool
    writer: Holder | None
    shard: Shard | None = None

    @property
    def trials(self) -> int:
        """All finished trials."""
        return sum(cell.done + cell.failed for cell in self.cells)

    @property
    def failed(self) -> int:
        """Trials that crashed, hung or ran out of memory."""
        return sum(cell.failed for cell in self.cells)

    @property
    def left(self) -> int:
        """Trials that may still be run: at most, where a rule stops cells."""
        return sum(cell.left for cell in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """Time left at the pace of late; None: the pace is not known yet."""
        if not self.left:
            return 0.0
        return self.left / self.per_hour * 3600 if self.per_hour else None


def progress(store: str | Path) -> Progress:
    """How far the campaign in a store is, while it runs or afterwards.

    Args:
        store: the store.

    Raises:
        CampaignError: it cannot be read, or no campaign was begun in it.
    """
    with reading(store) as reader:
        return progress_of(reader)


def progress_of(reader: Reader) -> Progress:
    """The same from a store that is open.

    Raises:
        CampaignError: it is damaged, or no campaign was begun in it.
    """
    with undamaged(reader.path):
        spec = reader.spec()
        stop = (spec.get("trials") or {}).get("stop") or {}
        bad, confidence = tuple(stop.get("outcomes") or BAD), float(stop.get("confidence") or 0.95)
        counts = reader.counts()
        stratified = {stratum.cell for stratum in reader.strata()}
        made: dict[int, Estimate] = {}
        if stop or stratified:
            # Drawn and stopped by what was seen: only an interval made for that holds.
            from ckptflip.campaign.estimates import FIXED, estimates

            made = {cell: one for cell, (one,) in estimates(reader).items() if one.method != FIXED}
        cells = tuple(
            _cell(
                cell, counts.get(cell.id, CellCounts()), bad, confidence, made.get(cell.id),
                stratified=cell.id in stratified,
            )
            for cell in reader.cells()
        )  # fmt: skip
        return Progress(
            name=str(spec.get("name", "")),
            cells=cells,
            bad=bad,
            confidence=confidence,
            per_hour=pace(reader.attempts(latest=_RECENT)),
            rule=bool(stop),
            writer=holder_of(reader.path),
            shard=_shard(reader),
        )


def _shard(reader: Reader) -> Shard | None:
    command = reader.revisions()[-1].command
    if "--shard" not in command:
        return None  # and spare reading the trials
    trials, cells = reader.trials(), reader.cells()
    current = {cell.id for cell in cells}
    names = zip(trials.cell.tolist(), trials.number.tolist(), strict=True)
    return complete_shard(command, cells, {name for name in names if name[0] in current})


def pace(attempts: Sequence[Attempt]) -> float | None:
    """Trials per hour, without the time in which nothing ran.

    Args:
        attempts: those that gave a trial, in the order they ended.

    Returns:
        None where there are too few.

    Example:
        >>> from ckptflip.campaign.store.rows import Attempt
        >>> ended = [Attempt(id=i, task="t", trial=i, state="done", executor="local", seconds=30.0,
        ...     ended=f"2026-01-01T00:{i:02d}:00+00:00") for i in range(1, 5)]
        >>> round(pace(ended))
        69
    """
    if not attempts:
        return None
    ends = [datetime.fromisoformat(each.ended).timestamp() for each in attempts]
    pause = max(_SHORTEST_PAUSE, _PAUSE * statistics.median(each.seconds for each in attempts))
    worked, busy_until = 0.0, ends[0] - attempts[0].seconds
    for end, attempt in zip(ends, attempts, strict=True):
        begin = end - attempt.seconds
        # A gap in which no trial ran at all is the time between two drivers, unless it is short.
        idle = begin - busy_until
        worked += max(0.0, end - busy_until) - (idle if idle > pause else 0.0)
        busy_until = max(busy_until, end)
    return len(attempts) / worked * 3600 if worked > 0 else None


def _cell(
    cell: Cell,
    counts: CellCounts,
    bad: tuple[str, ...],
    confidence: float,
    estimate: Estimate | None,
    *,
    stratified: bool,
) -> CellProgress:
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    if estimate is not None:
        rate, low, high = estimate.rate, estimate.low, estimate.high
    elif counts.done and not stratified:
        events = sum(counts.outcomes.get(each, 0) for each in bad)
        rate, (low, high) = events / counts.done, _wilson(events, counts.done, confidence)
    return CellProgress(
        label=cell.label,
        workload=cell.workload,
        epoch=cell.epoch,
        done=counts.done,
        wanted=cell.wanted,
        failed=counts.failed,
        outcomes=counts.outcomes,
        rate=rate,
        low=low,
        high=high,
        stopped=cell.stopped,
    )


def _wilson(events: int, trials: int, confidence: float) -> tuple[float, float]:
    """As `ckptflip.campaign.statistics.wilson`, without scipy, which would take longer than all the rest."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (events + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(events * (trials - events) / trials + z * z / 4)
    return (centre - half if events else 0.0), (centre + half if events < trials else 1.0)
