"""Ways to do the same work, timed in turn: in every round each has its go, the order rotating."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# The same work as the plain way, once more: what nothing looks like.
PLAIN, AGAIN = "plain", "plain again"


class Work(NamedTuple):
    """One way to do the work.

    Attributes:
        way: its name.
        run: does it once.
        repeat: how often in each measurement.
    """

    way: str
    run: Callable[[], Any]
    repeat: int = 1


def measured(works: list[Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor in every round, by way."""
    found: dict[str, list[float]] = {work.way: [] for work in works}
    for work in works:
        work.run()
    for i in range(rounds):
        turn = i % len(works)
        for work in works[turn:] + works[:turn]:
            found[work.way].append(spent(work.run, work.repeat))
    return found


def spent(run: Callable[[], Any], repeat: int) -> float:
    """Seconds of the processor for one run."""
    began = time.process_time()
    for _ in range(repeat):
        run()
    return (time.process_time() - began) / repeat


def share(found: dict[str, list[float]], way: str) -> str:
    """What a way adds to the plain ones, as the median over rounds; of the second plain one, to the first."""
    if way not in found:
        return "–"
    plain, again = found[PLAIN], found[AGAIN]
    base = plain if way == AGAIN else [(a + b) / 2 for a, b in zip(plain, again, strict=True)]
    ratios = [t / b for t, b in zip(found[way], base, strict=True)]
    return f"{100 * (statistics.median(ratios) - 1):+.1f} %"


def milliseconds(found: dict[str, list[float]], way: str) -> str:
    """The median over rounds."""
    return f"{1e3 * statistics.median(found[way]):.3g}" if way in found else "–"
