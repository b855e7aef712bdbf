"""The page: what the templates are filled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, isnan
from typing import Any

import msgspec
import numpy as np

from ckptflip.campaign.spec import OUTCOMES
from ckptflip.report.campaign import rates, words, worst
from ckptflip.report.campaign.drawing import OUTCOME_COLOURS, Shown, on_page
from ckptflip.report.campaign.gathering import Gathered
from ckptflip.report.campaign.headline import headline, tally
from ckptflip.report.campaign.rates import CellRow, Floor, Rate

_KINDS = {
    "convergence": "Convergence",
    "measured": "Measured",
    "outcomes": "Outcomes",
    "heatmap": "Bit × layer",
    "propagation": "Propagation",
    "recovery": "Recovery",
}
_FAILED_COLOUR = "#8a8c90"


def render(gathered: Gathered, rows: Sequence[CellRow], figures: Mapping[str, Sequence[Shown]]) -> str:
    """The whole page, as HTML.

    Args:
        gathered: what the store holds.
        rows: the numbers of its cells.
        figures: by kind.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("ckptflip.report.campaign")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "name": words.name, "lines": words.lines, "percent": words.percent, "number": words.number,
        "many": words.many, "grouped": words.grouped, "interval": interval,
        "metric": words.metric,
        "shown": lambda figure: Markup(figure.svg),
    }  # fmt: skip
    return environment.get_template("index.html.j2").render(_context(gathered, rows, figures))


def _context(
    gathered: Gathered, rows: Sequence[CellRow], figures: Mapping[str, Sequence[Shown]]
) -> dict[str, Any]:
    spec, last = gathered.spec, gathered.revisions[-1]
    failed, more_failed = worst.failed(gathered)
    # Of altered checkpoints that are only measured, none is slowed and none recovers.
    trained = any(cell.until > cell.epoch for cell in gathered.cells)
    kinds = [(kind, title, _once(figures[kind])) for kind, title in _KINDS.items() if figures.get(kind)]
    return {
        "title": spec.get("title") or spec.get("name") or gathered.store,
        "campaign": spec.get("name") or "",
        "about": spec.get("about") or "",
        "store": gathered.store,
        "headline": headline(gathered, rows),
        "bar": _bar(gathered),
        "kinds": kinds,
        "outcomes": [each for each in OUTCOMES if trained or each != "slowed"],
        "all_outcomes": OUTCOMES,
        "trained": trained,
        "colours": {outcome: on_page(colour) for outcome, colour in OUTCOME_COLOURS.items()},
        "groups": _grouped(gathered, rows),
        "sequential": rates.stop_rule(gathered),
        "judged": gathered.judged,
        "recovered": recovered,
        "differed": differed,
        "strata": rates.stratified(gathered),
        "floors": [
            (floor, warning(floor, gathered.judged.tolerance)) for floor in rates.noise_floors(gathered)
        ],
        "failed": failed,
        "more_failed": more_failed,
        "worst": worst.worst(gathered),
        "exact": exactness(gathered),
        "former": gathered.former,
        "last": last,
        "machine": {what: _sized(what, said) for what, said in last.machine.items()},
        "revisions": list(reversed(gathered.revisions)),
        "seeds": _seeds(gathered),
        "spec": msgspec.json.format(msgspec.json.encode(spec), indent=2).decode(),
        "isfinite": isfinite,
    }


def _sized(what: str, said: Any) -> Any:
    """What the record says of a machine, its memory in a unit that people read."""
    return f"{said / 2**30:.1f} GiB" if what == "memory" and isinstance(said, int) else said


def _once(figures: Sequence[Shown]) -> list[Shown]:
    """The figures; a caption that is that of the figure above is not said again."""
    above = ["", *(figure.caption for figure in figures)]
    return [
        replace(figure, caption="" if figure.caption == before else figure.caption)
        for figure, before in zip(figures, above, strict=False)
    ]


def _bar(gathered: Gathered) -> list[tuple[str, int, str]]:
    """The tally as a bar: what, how many, colour; what did not occur is left out."""
    colours = OUTCOME_COLOURS | dict.fromkeys(("crashed", "hung", "out-of-memory"), _FAILED_COLOUR)
    return [(what, count, on_page(colours[what])) for what, count in tally(gathered).items() if count]


def _grouped(gathered: Gathered, rows: Sequence[CellRow]) -> list[tuple[str, list[CellRow]]]:
    """The lines of the table, below what tells groups of them apart."""
    several = gathered.several_workloads or gathered.several_epochs
    found: dict[str, list[CellRow]] = {}
    for row in rows:
        head = f"{row.cell.workload}, epoch {row.cell.epoch}" if several else ""
        found.setdefault(head, []).append(row)
    return list(found.items())


def interval(rate: Rate) -> str:
    """The interval of a rate, in percent; of no events its upper bound.

    Example:
        >>> interval(Rate(0, 100, 0.0, 0.0, 0.0295)), interval(Rate(5, 100, 0.05, 0.0164, 0.1128))
        ('≤ 2.9 %', '1.6 – 11 %')
    """
    if isnan(rate.share):
        return ""
    if not rate.events:
        return f"≤ {words.percent(rate.high)}"
    return f"{words.percent(rate.low, unit=False)} – {words.percent(rate.high)}"


def recovered(row: CellRow) -> list[str]:
    """Median epochs to recover, and its interval; beyond the last epoch where half were not back by then."""
    found = row.recovery
    if found is None:
        return [words.NONE]
    horizon = row.cell.until - row.cell.epoch
    said, low, high = (
        f"{end:g}" if isfinite(end) else f"> {horizon}"
        for end in (found.median, found.median_low, found.median_high)
    )
    return [said] if low == high == said else [said, f"{low} to {high}"]


def differed(row: CellRow) -> list[str]:
    """The mean difference of the final metric, its interval or why there is none, and of how many trials."""
    if row.difference is None:
        return [words.NONE]
    mean, found = row.difference
    ends = f"{words.number(found.low, 3)} to {words.number(found.high, 3)}"
    said = [words.number(mean, 3, sign=True), words.name(found.note, 60) or ends]
    return said + ([f"of {words.many(row.compared, 'trial')}"] if row.compared < row.done else [])


def warning(floor: Floor, tolerance: float) -> str:
    """What the noise between clean seeds says of the tolerance; empty where it says nothing against it."""
    if floor.floor is None:
        return "A single clean run says nothing of the noise between seeds: give several in [clean] seeds."
    if tolerance < floor.floor.spread:
        return (
            f"The tolerance ({tolerance:g}) is below what the clean runs themselves differ by "
            f"({floor.floor.spread:.3g}): small losses cannot be told from another seed."
        )
    if tolerance < floor.floor.bound:
        return (
            f"So few seeds do not show that their noise stays below the tolerance ({tolerance:g}): "
            f"differences up to {floor.floor.bound:.3g} agree with these runs."
        )
    return ""


def exactness(gathered: Gathered) -> list[str]:
    """Whether clean resumes and restarts without change gave the clean run again."""
    tried = [run for run in gathered.runs if run.exact is not None]
    same = sum(bool(run.exact) for run in tried)
    said = []
    if tried:
        said.append(
            f"{same} of {words.many(len(tried), 'clean run')} repeated the next epoch bit for bit when "
            "resumed from the checkpoint."
        )
    chosen = np.isin(gathered.trials.cell, [cell.id for cell in gathered.controls])
    chosen &= gathered.trials.state == "done"
    outcomes = gathered.trials.outcome[chosen]
    if len(outcomes):
        equal = int((outcomes == "identical").sum())
        said.append(f"{equal} of {words.many(len(outcomes), 'restart')} without change ended identical.")
        if equal < len(outcomes):
            others = {str(outcome): int((outcomes == outcome).sum()) for outcome in np.unique(outcomes)}
            said.append(
                "The others: "
                + words.listed([f"{count} {what}" for what, count in others.items() if what != "identical"])
                + ". Differences as large may come without any fault."
            )
    return said or ["Not tried: the campaign has no restarts without change."]


def _seeds(gathered: Gathered) -> dict[str, str]:
    of_runs: dict[str, list[str]] = {}
    for run in gathered.runs:
        of_runs.setdefault(run.workload, []).append(str(run.seed))
    return {"campaign": str(gathered.spec.get("seed", 0))} | {
        f"clean runs of {workload}": ", ".join(seeds) for workload, seeds in of_runs.items()
    }
