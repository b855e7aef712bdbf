"""What the score of protections says, in sentences made from its numbers."""

from __future__ import annotations

from protection_tables import BARE, Line, Study, of, places

from ckptflip.campaign.statistics import holm
from ckptflip.report.campaign.words import listed, many, percent

LEVEL = 0.05
# The least change of a metric that the tables show.
SEEN = 5e-5
PUBLISHED, OURS = "clip-100", "clip-range"


def findings(study: Study) -> list[str]:
    """The sentences of a study."""
    said = [_noticed(study), _silent(study), _recovered(study)]
    if {PUBLISHED, OURS} <= set(study.survivors):
        said.append(_clipping(study))
    said += [_clean(study), _memory(study)]
    return [each for each in said if each]


def _noticed(study: Study) -> str:
    told = {name: study.pooled(name, effective=True) for name in study.detectors}
    if not told or not next(iter(told.values())).trials:
        return ""
    order = sorted(told, key=lambda name: -told[name].share)
    parts = [f"`{name}` {percent(told[name].share)}" for name in order]
    trials = many(told[order[0]].trials, "trial")
    return f"Of {trials} whose faults changed an output, these shares were noticed: {listed(parts)}."


def _silent(study: Study) -> str:
    alarms = {name: study.false_alarms(name) for name in study.detectors}
    loud = [f"`{name}` ({of(rate)})" for name, rate in alarms.items() if rate.events]
    trials = max((rate.trials for rate in alarms.values()), default=0)
    if not trials:
        return ""
    return f"Where nothing was altered ({many(trials, 'restart')}), " + (
        f"{listed(loud)} raised a false alarm." if loud else "no contender raised a false alarm."
    )


def _recovered(study: Study) -> str:
    parts = []
    for name in study.survivors:
        if name != BARE and (found := study.recovered(name)) is not None:
            parts.append(f"`{name}` {percent(found[1])}")
    if not parts:
        return ""
    lost = f"Of the {study.metric} that the bare models lost, summed over all cells"
    return f"{lost}, these shares were recovered: {listed(parts)}."


def _clipping(study: Study) -> str:
    """Calibrated against published clipping on the same faults, cell by cell, Holm over the cells."""
    told = [(line, study.against(line, OURS, PUBLISHED)) for line in study.lines]
    adjusted = holm([each.p_value for _, each in told]).tolist()
    differing = [(line, each) for (line, each), p in zip(told, adjusted, strict=True) if p <= LEVEL]
    said = (
        f"`{OURS}` against the published `{PUBLISHED}` on the same faults, {many(len(told), 'cell')} "
        "(Wilcoxon, Holm)"
    )
    parts = []
    for sign, word in ((1, "more"), (-1, "less")):
        these = [(line, each) for line, each in differing if sign * each.mean > 0]
        if these:
            line, each = max(these, key=lambda pair: abs(pair[1].mean))
            # How much less has its interval turned round with it.
            low, high = sorted((sign * each.mean_interval.low, sign * each.mean_interval.high))
            parts.append(
                f"{word} {study.metric} is left in {len(these)}, at most {places(abs(each.mean))} "
                f"({places(low)} to {places(high)}; {_name(study, line)})"
            )
    return f"{said}: {listed(parts) if parts else 'none differs'}."


def _clean(study: Study) -> str:
    """What contenders cost a model without a fault."""
    parts = []
    for name in study.survivors:
        lost = [float(c.lost(name, study.chance).mean()) for c in study.controls if name in c.left]
        if name != BARE and lost and max(abs(each) for each in lost) >= SEEN:
            parts.append(f"`{name}` {places(max(lost, key=abs))}")
    if not parts:
        return f"On models without a fault no contender changes the mean {study.metric} by {SEEN:g} or more."
    falls = f"On models without a fault the mean {study.metric} falls by {listed(parts)}"
    return f"{falls}; of all others by less than {SEEN:g}."


def _memory(study: Study) -> str:
    parts = [f"`{name}` {percent(share)}" for name, share in study.memory.items()]
    return f"Checks take, of the weights' memory: {listed(parts)}." if parts else ""


def _name(study: Study, line: Line) -> str:
    return f"{line.cell.label}, {line.cell.workload}" if study.gathered.several_workloads else line.cell.label
