"""What a campaign found, in sentences made from its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptflip.campaign.shards import Shard, complete_shard
from ckptflip.campaign.spec import OUTCOMES
from ckptflip.campaign.task import STATES
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.campaign.rates import CellRow
from ckptflip.report.campaign.words import listed, many, name, percent

_SAID = {
    "identical": "ended bit for bit as the clean run",
    "masked": "stayed within the tolerance throughout",
    "slowed": "left the tolerance and came back",
    "degraded": "ended outside the tolerance",
    "collapsed": "collapsed",
}


def tally(gathered: Gathered) -> dict[str, int]:
    """Trials of altered cells by outcome, then those without one by state."""
    chosen = np.isin(gathered.trials.cell, [cell.id for cell in gathered.cells])
    outcomes, states = gathered.trials.outcome[chosen], gathered.trials.state[chosen]
    found = {outcome: int((outcomes == outcome).sum()) for outcome in OUTCOMES}
    return found | {state: int((states == state).sum()) for state in STATES if state != "done"}


def headline(gathered: Gathered, rows: Sequence[CellRow]) -> list[str]:
    """Sentences: how many trials, how they ended, where it was worst, and what is not done yet."""
    counts = tally(gathered)
    done = sum(counts[outcome] for outcome in OUTCOMES)
    failed = {state: counts[state] for state in STATES if counts.get(state)}
    if not done and not failed:
        return ["No trial has finished yet.", *_open(gathered, rows)]
    if not done:
        none = f"None of {many(sum(failed.values()), 'trial')} came to an end: {_failures(failed)}."
        return [none, *_open(gathered, rows)]
    said = [f"{many(done, 'altered restart')} in {many(len(gathered.cells), 'cell')} came to an end."]
    if failed:
        said.append(
            f"{many(sum(failed.values()), 'further one')} did not: {_failures(failed)}. They are in no rate; "
            "the faults may be what ended them."
        )
    said += _ended(counts, done, failed=bool(failed))
    if gathered.strata:
        said.append(
            "Faults were drawn by stratum: these are shares of the trials; what they say of a flip drawn "
            "uniformly is in the tables."
        )
    return [*said, *_range(gathered, rows), *_open(gathered, rows)]


def _ended(counts: dict[str, int], done: int, *, failed: bool) -> list[str]:
    absorbed = counts["identical"] + counts["masked"]
    some = f"{absorbed} ({percent(absorbed / done)})"
    whole = "all" if absorbed == done else some if absorbed else "none"
    parts = [f"{counts[each]} {_SAID[each]}" for each in ("identical", "masked") if counts[each]]
    whom = "Of those that did" if failed else "Of these"
    said = f"{whom}, {whole} absorbed the fault" + (f": {listed(parts)}." if len(parts) == 2 else ".")
    rest = [
        f"{counts[each]} ({percent(counts[each] / done)}) {_SAID[each]}"
        for each in ("slowed", "degraded", "collapsed")
        if counts[each]
    ]
    if not rest:
        return [said, "None was slowed, degraded or collapsed."]
    missing = [each for each in ("degraded", "collapsed") if not counts[each]]
    none = [f"None {listed(missing).replace(' and ', ' or ')}."] if missing else []
    return [said, f"{_capital(listed(rest))}.", *none]


def _failures(failed: dict[str, int]) -> str:
    said = {"crashed": "crashed", "hung": "hung", "out-of-memory": "ran out of memory"}
    return listed([f"{count} {said.get(state, state)}" for state, count in failed.items()])


def _range(gathered: Gathered, rows: Sequence[CellRow]) -> list[str]:
    """The least and the most harmful cell, where they differ."""
    judged = [(row.bad.share, row) for row in rows if row.bad is not None]
    if len(judged) < 2 or gathered.strata:
        return []
    least, most = min(judged, key=lambda pair: pair[0]), max(judged, key=lambda pair: pair[0])
    if least[0] == most[0]:
        return []
    ends = [
        f"{row.bad.events} of {row.bad.trials} ({name(gathered.name(row.cell), 80)})"
        for _, row in (least, most)
        if row.bad is not None
    ]
    return [f"Degraded or collapsed were from {ends[0]} to {ends[1]}."]


def _open(gathered: Gathered, rows: Sequence[CellRow]) -> list[str]:
    missing = sum(max(row.cell.wanted - row.done - row.failed, 0) for row in rows if row.cell.stopped is None)
    if not missing:
        return []
    if shard := _shard(gathered):
        return [
            f"This is shard {shard.index}/{shard.of}, all of it: {many(missing, 'trial')} of the campaign "
            "are those of the other shards, which `ckptflip merge` unites with it."
        ]
    most = "up to " if (gathered.spec.get("trials") or {}).get("stop") else ""
    return [f"The campaign is not finished: {most}{many(missing, 'trial')} are to come."]


def _shard(gathered: Gathered) -> Shard | None:
    """The part of the campaign that is here and complete; None where that is not so."""
    cells = [*gathered.cells, *gathered.controls]
    there = zip(gathered.trials.cell.tolist(), gathered.trials.number.tolist(), strict=True)
    return complete_shard(gathered.revisions[-1].command, cells, set(there))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
