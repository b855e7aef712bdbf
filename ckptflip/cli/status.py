"""`ckptflip status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP, format_option

if TYPE_CHECKING:
    from rich.table import Table

    from ckptflip.campaign.progress import CellProgress, Progress

_OUTCOMES = ("identical", "masked", "slowed", "degraded", "collapsed")
COLUMNS = (
    "condition", "workload", "epoch", "done", "wanted", "failed", *_OUTCOMES, "rate", "low", "high",
    "stopped",
)  # fmt: skip
# People read counts and intervals better in one piece.
_SHOWN = ("condition", "workload", "epoch", "trials", "failed", *_OUTCOMES, "rate", "interval", "stopped")
# Seconds between two looks at the store.
_EVERY = 2.0


@click.command(context_settings=HELP)
@click.argument("store")
@click.option("--watch", is_flag=True, help="Show it anew every two seconds, as long as the campaign runs.")
@format_option
def command(store: str, watch: bool, form: str) -> None:
    """How far the campaign in STORE is: a row per cell, then the pace and the time left.

    May be asked at any time, while `run` is at work too. The rate is the share of degraded or collapsed
    trials (of the outcomes of the stop rule, where there is one) among those that are done, with a Wilson
    interval for display. Where a rule stops cells, or trials are drawn by stratum, it is the confidence
    sequence that the rule looks at. Claims are made by the report.
    """
    from ckptflip.campaign.progress import progress
    from ckptflip.cli.output import emit, say
    from ckptflip.errors import UsageError

    if watch:
        if form != "table":
            raise UsageError(f"--watch draws a table; leave out --format {form}, or --watch")
        _watch(store)
        return
    found = progress(store)
    if form == "table":
        emit([_shown(cell) for cell in found.cells], _SHOWN, form)
    else:
        emit([_row(cell) for cell in found.cells], COLUMNS, form)
    say(_summary(found))


def _row(cell: CellProgress) -> dict[str, Any]:
    return {
        "condition": cell.label,
        "workload": cell.workload,
        "epoch": cell.epoch,
        "done": cell.done,
        "wanted": cell.wanted,
        "failed": cell.failed,
        **{outcome: cell.outcomes.get(outcome, 0) for outcome in _OUTCOMES},
        "rate": cell.rate,
        "low": cell.low,
        "high": cell.high,
        "stopped": cell.stopped,
    }


def _shown(cell: CellProgress) -> dict[str, Any]:
    known = cell.rate is not None
    return {
        **_row(cell),
        "trials": f"{cell.done}/{cell.wanted}",
        "rate": f"{cell.rate:.3f}" if known else None,
        "interval": f"{cell.low:.3f}–{cell.high:.3f}" if known else None,
    }


def _summary(found: Progress) -> str:
    most = "at most " if found.left and found.rule else ""
    parts = [f"{found.trials} of {most}{found.trials + found.left} trials", f"{found.failed} failed"]
    if found.per_hour is not None:
        parts.append(f"{found.per_hour:,.0f} per hour")
    if not found.left:
        parts.append("complete")
    elif found.shard is not None:
        parts.append(f"shard {found.shard.index}/{found.shard.of} complete")
    elif found.seconds_left is not None:
        parts.append(f"{_span(found.seconds_left)} left")
    parts.append(f"run by {found.writer}" if found.writer else "not running")
    return f"{found.name}: {', '.join(parts)}"


def _span(seconds: float) -> str:
    """A time for people.

    Example:
        >>> _span(42), _span(3900), _span(200_000)
        ('42 s', '1 h 05 min', '2 d 7 h')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _watch(store: str) -> None:
    import time

    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from ckptflip.campaign.progress import progress

    console = Console(highlight=False)
    if not console.is_terminal:
        _follow(store)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = progress(store)
            live.update(Group(_drawn(found), Text(_harmless(_summary(found)))), refresh=True)
            if not found.left or found.writer is None:
                return
            time.sleep(_EVERY)


def _follow(store: str) -> None:
    """Where no terminal shows a table that changes: a line whenever a trial is done, the table at the end."""
    import time

    from ckptflip.campaign.progress import progress
    from ckptflip.cli.output import emit, say

    told = -1
    while True:
        found = progress(store)
        if not found.left or found.writer is None:
            break
        if found.trials != told:
            say(_summary(found))
            told = found.trials
        time.sleep(_EVERY)
    emit([_shown(cell) for cell in found.cells], _SHOWN, "table")
    say(_summary(found))


def _drawn(found: Progress) -> Table:
    """The table as it is watched: narrow, without what says nothing in any row."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [{**_shown(cell), "outcomes": _outcomes(cell)} for cell in found.cells]
    names = ["condition", "workload", "epoch", "trials", "failed", "outcomes", "rate", "interval", "stopped"]
    for name, dull in (("workload", None), ("epoch", None), ("failed", 0), ("stopped", None)):
        values = {row[name] for row in rows}
        if values <= {dull} or (name in ("workload", "epoch") and len(values) == 1):
            names.remove(name)
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        folds = name in ("condition", "workload", "outcomes", "stopped")
        table.add_column(
            name,
            justify="left" if folds else "right",
            no_wrap=not folds,
            overflow="fold" if folds else "crop",
        )
    for row in rows:
        table.add_row(*(Text(_harmless("-" if row[n] is None else str(row[n]))) for n in names))
    return table


def _outcomes(cell: CellProgress) -> str:
    return ", ".join(f"{cell.outcomes[each]} {each}" for each in _OUTCOMES if cell.outcomes.get(each)) or "-"


def _harmless(text: str) -> str:
    """Control characters of names, escaped: they come from strangers' specs."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
