"""What the stores of the published study's experiments say, in sentences made from their numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from cluster21_tables import Study, between, right_after, signed

from ckptflip.campaign.spec import BAD
from ckptflip.campaign.statistics import compare_rates, holm, non_inferiority
from ckptflip.campaign.store.rows import Cell
from ckptflip.report.campaign.rates import CellRow, stratified
from ckptflip.report.campaign.words import NONE, listed, many, number, percent

LEVEL = 0.05
# Numbers of flips that "dozens" stands for.
DOZENS = (10, 100)
Finding = Callable[[Study], list[str]]


def repeats(study: Study) -> list[str]:
    """E0: whether a restart repeats the run."""
    found = study.gathered
    said = []
    for workload in dict.fromkeys(cell.workload for cell in found.controls):
        chosen = np.isin(found.trials.cell, [c.id for c in found.controls if c.workload == workload])
        done = chosen & (found.trials.state == "done")
        count, same = int(done.sum()), int((found.trials.outcome[done] == "identical").sum())
        runs = [run for run in found.runs if run.workload == workload]
        whole = f"all {count}" if same == count else f"{same} of {count}"
        verb = "repeats" if same == count else "DOES NOT REPEAT"
        said.append(
            f"{workload}: {whole} restarts ended with the whole training state (weights, optimizer, random "
            f"generators) of the clean run, bit for bit; {sum(run.exact is True for run in runs)} of "
            f"{many(len(runs), 'clean run')} passed the same check when they were made. A resume {verb} the "
            "run."
        )
    return said


def absorbs(study: Study) -> list[str]:
    """E1, E4: how the share of bad ends grows with the flips, and what becomes of the claim."""
    said = []
    for workload, rows in study.by_workload():
        parts = [f"{percent(row.bad.share)} after {_flips(row.cell)}" for row in rows if row.bad]
        said.append(f"{workload}: {listed(parts)} ended badly.")
        said += [_dozens(workload, row) for row in rows if _count(row.cell) in DOZENS]
    return said


def breaks(study: Study) -> list[str]:
    """E1: as E4, and in how many restarts a weight was NaN, infinite or extreme at some epoch."""
    said = []
    for workload, rows in study.by_workload():
        parts = []
        for row in rows:
            ids = study.gathered.trials.id[study.gathered.of(row.cell)].tolist()
            parts.append(f"{sum(each in study.nev for each in ids)} of {len(ids)} after {_flips(row.cell)}")
        said.append(
            f"{workload}, restarts with NaN, infinite or extreme weights at some epoch: {listed(parts)}."
        )
    return said + absorbs(study)


def _dozens(workload: str, row: CellRow) -> str:
    """The claim that dozens of flips are often absorbed, by the rule that the page states."""
    assert row.bad is not None
    well = 1 - row.bad.high, 1 - row.bad.low
    verdict = (
        "holds" if well[0] > 0.5 else "does not hold" if well[1] < 0.5 else "is neither shown nor refuted"
    )
    return (
        f"{workload}, {_flips(row.cell)}: {percent(1 - row.bad.share)} of {many(row.done, 'restart')} did "
        "not "
        f"end badly (95 %: {between(*well)} %): the claim {verdict}."
    )


def bits(study: Study) -> list[str]:
    """E2: with and without the critical bit, and it alone."""
    pairs, critical = [], []
    for workload, rows in study.by_workload():
        by = {(row.cell.swept["bits"], _count(row.cell)): row for row in rows}
        for count in sorted({_count(row.cell) for row in rows}):
            if ("all", count) in by and ("all,!critical", count) in by:
                pairs.append((workload, by["all", count], by["all,!critical", count]))
            if ("critical", count) in by:
                critical.append(by["critical", count])
    said = [_critical_alone(critical)] if critical else []
    spared = [row for _, _, row in pairs]
    bad, done = (sum(getattr(row.bad, what) for row in spared) for what in ("events", "trials"))
    said.append(
        f"With the critical bit left out, {bad} of {done} restarts ended badly, over all numbers of flips."
    )
    return said + _compared(
        [(f"{workload}, {_flips(a.cell)}", a, b) for workload, a, b in pairs],
        "all bits", "the critical bit left out",
    )  # fmt: skip


def _critical_alone(rows: Sequence[CellRow]) -> str:
    parts = [
        f"{percent(row.bad.share)} after {_flips(row.cell)} ({row.cell.workload})" for row in rows if row.bad
    ]
    return f"Where the critical bit alone flips, {listed(parts)} ended badly."


def single(study: Study) -> list[str]:
    """E3: what one flip costs, right after the restart and at the end."""
    said = []
    tolerance = study.gathered.judged.tolerance
    for workload, rows in study.by_workload():
        for row in rows:
            assert row.bad is not None
            outside = int((~(right_after(study, row.cell) >= -tolerance - 1e-12)).sum())
            said.append(
                f"{workload}: {row.bad.events} of {row.done} restarts ended badly (the rate is at most "
                f"{percent(row.bad.high)}, with 95 % confidence); {outside} were more than {tolerance:g} "
                "below the "
                "clean run right after the restart."
            )
            said += _cost(study, row, tolerance)
    return said


def _cost(study: Study, row: CellRow, margin: float) -> list[str]:
    trials, done = study.gathered.trials, study.gathered.of(row.cell)
    faulty, clean = trials.final[done], trials.clean_final[done]
    both = np.isfinite(faulty) & np.isfinite(clean)
    if both.sum() < 2:
        return []
    found = non_inferiority(faulty[both], clean[both], margin)
    if found.note:
        return [f"{row.cell.workload}: the mean final difference is {signed(found.mean)} ({found.note})."]
    verdict = "less" if found.holds else "not shown to be less"
    left = "" if both.all() else f"; {int((~both).sum())} without a final accuracy are left out"
    return [
        f"{row.cell.workload}: the mean final difference is {signed(found.mean)}; with 95 % confidence the "
        "mean "
        f"loss is {verdict} than {margin:g} (at most {max(0.0, -found.bound):.4f}{left})."
    ]


def moments(study: Study) -> list[str]:
    """E5: the earliest against the latest checkpoint."""
    pairs = []
    for workload, rows in study.by_workload():
        for count in sorted({_count(row.cell) for row in rows}):
            of_these = sorted((r for r in rows if _count(r.cell) == count), key=lambda r: r.cell.epoch)
            if len(of_these) > 1:
                pairs.append((f"{workload}, {_flips(of_these[0].cell)}", of_these[0], of_these[-1]))
    if not pairs:
        return []
    first, last = pairs[0][1].cell.epoch, pairs[0][2].cell.epoch
    return _compared(pairs, f"epoch {first}", f"epoch {last}") + [
        f"{what}: mean final difference {_mean(a)} after flips at epoch {first}, {_mean(b)} at epoch {last}."
        for what, a, b in pairs
    ]


def _mean(row: CellRow) -> str:
    return NONE if row.difference is None else signed(row.difference[0])


def roles(study: Study) -> list[str]:
    """E12: the model against the optimizer."""
    pairs = []
    for workload, rows in study.by_workload():
        by = {(_role(row.cell), _count(row.cell)): row for row in rows}
        for count in sorted({_count(row.cell) for row in rows}):
            if ("model", count) in by and ("optimizer", count) in by:
                pairs.append((f"{workload}, {_flips(by['model', count].cell)}",
                              by["model", count], by["optimizer", count]))  # fmt: skip
    said = _compared(pairs, "the model", "the optimizer")
    more, less = (_significant(pairs, sign) for sign in (1, -1))
    verdict = {
        (True, False): "is confirmed" if more == len(pairs) else "is confirmed in part",
        (False, True): "is contradicted",
        (True, True): "holds in some comparisons and is contradicted in others",
        (False, False): "is neither shown nor refuted",
    }[more > 0, less > 0]
    return [
        *said,
        f"The claim {verdict} here: the model is the more sensitive in {more} of {len(pairs)} "
        "comparisons, "
        f"the optimizer in {less}.",
    ]


def _role(cell: Cell) -> str:
    given = cell.swept["roles"]
    return given if isinstance(given, str) else ", ".join(given)


Pair = tuple[str, CellRow, CellRow]


def _compared(pairs: Sequence[Pair], one: str, other: str) -> list[str]:
    """What differs in pairs of cells, with all tests taken together."""
    if not pairs:
        return []
    found = [_test(a, b) for _, a, b in pairs]
    adjusted = holm([each.p_value for each in found])
    told = [i for i in range(len(pairs)) if adjusted[i] <= LEVEL]
    said = [
        f"Bad ends of {one} against {other}: the rates differ in {len(told)} of "
        f"{many(len(pairs), 'comparison')} "
        f"(Fisher's exact test, adjusted by Holm's method, p ≤ {LEVEL:g})."
    ]
    for i in told:
        what, a, b = pairs[i]
        assert a.bad is not None and b.bad is not None
        ends = found[i].interval
        said.append(
            f"{what}: {percent(a.bad.share)} ({one}) against {percent(b.bad.share)} ({other}); difference "
            f"{_points(found[i].difference)} percentage points (95 %: {_points(ends.low)} to "
            f"{_points(ends.high)}), adjusted p {adjusted[i]:.2g}."
        )
    return said


def _points(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−")


def _test(a: CellRow, b: CellRow) -> Any:
    assert a.bad is not None and b.bad is not None
    return compare_rates(a.bad.events, a.bad.trials, b.bad.events, b.bad.trials)


def _significant(pairs: Sequence[Pair], sign: int) -> int:
    found = [_test(a, b) for _, a, b in pairs]
    adjusted = holm([each.p_value for each in found]) if found else []
    return sum(p <= LEVEL and each.difference * sign > 0 for p, each in zip(adjusted, found, strict=True))


def _extremes(
    groups: Iterable[tuple[str, Sequence[CellRow]]], called: Callable[[Cell], str], what: str = "condition"
) -> list[str]:
    """The least and the most harmful cell of each group, and whether any two differ."""
    said = []
    for name, rows in groups:
        if len(rows) < 2:
            continue
        order = sorted(rows, key=_share)
        pairs = list(itertools.combinations(order, 2))
        told = int((holm([_test(a, b).p_value for a, b in pairs]) <= LEVEL).sum())
        if _share(order[0]) == _share(order[-1]):
            said.append(f"{name}: {percent(_share(order[0]))} ended badly, whatever the {what}.")
            continue
        differ = f"{told} of {many(len(pairs), 'pair')} of them differ" if told else "no two of them differ"
        said.append(
            f"{name}: from {percent(_share(order[0]))} ({called(order[0].cell)}) to "
            f"{percent(_share(order[-1]))} ({called(order[-1].cell)}) ended badly; {differ} (Fisher, Holm, "
            f"p ≤ {LEVEL:g})."
        )
    return said


def _share(row: CellRow) -> float:
    return row.bad.share if row.bad else 0.0


def extremes(study: Study) -> list[str]:
    """E6, E9, E10: conditions against each other, for each workload."""
    return _extremes(study.by_workload(), lambda cell: cell.label)


def precisions(study: Study) -> list[str]:
    """E11: workloads of different precision against each other."""
    rows = [row for row in study.rows if row.bad]
    labels = dict.fromkeys(row.cell.label for row in rows)
    groups = [(label, [row for row in rows if row.cell.label == label]) for label in labels]
    return _extremes(groups, lambda cell: cell.workload, "precision")


def ranks(study: Study) -> list[str]:
    """E13: numbers of ranks against each other, for each number of flips."""
    rows = [row for row in study.rows if row.bad]
    counts = sorted({_count(row.cell) for row in rows})
    groups = [(_flips_of(n), [row for row in rows if _count(row.cell) == n]) for n in counts]
    return _extremes(groups, lambda cell: str(cell.swept["ranks"]), "number of ranks")


def spreads(study: Study) -> list[str]:
    """E7: how far other layers lie from the clean run, soon and late."""
    said = []
    for cell, rows in _spread_by_cell(study):
        trials = len({row.trial for row in rows})
        parts = []
        for epoch in sorted({row.epoch for row in rows}):
            at = [row for row in rows if row.epoch == epoch]
            layers = {row.layer for row in at}
            whole = sum(
                sum(row.changed > 0 for row in at if row.layer == layer) == trials for layer in layers
            )
            middle = [row.changes[2] for row in at if len(row.changes) == 5 and math.isfinite(row.changes[2])]
            size = number(float(np.median(middle)), 2) if middle else NONE
            parts.append(f"{whole} of {len(layers)} by {size} after {many(epoch - cell.epoch, 'epoch')}")
        said.append(
            f"{cell.workload}, {cell.label}: layers that differ from the clean run in all of "
            f"{many(trials, 'trial')}, and by how much of its value the median weight that differs: "
            f"{listed(parts)}."
        )
    return said


def _spread_by_cell(study: Study) -> Iterator[tuple[Cell, list[Any]]]:
    found = study.gathered
    cell_of = dict(zip(found.trials.id.tolist(), found.trials.cell.tolist(), strict=True))
    for cell in found.cells:
        rows = [row for row in found.spread if cell_of[row.trial] == cell.id]
        if rows:
            yield cell, rows


def equivalents(study: Study) -> list[str]:
    """E8: whether the same faults end alike in both frameworks."""
    from scipy.stats import binomtest

    trials = study.gathered.trials
    said = []
    for label in dict.fromkeys(row.cell.label for row in study.rows):
        cells = [row.cell for row in study.rows if row.cell.label == label]
        if len(cells) != 2:
            continue
        ends = [
            {
                int(n): str(outcome) in BAD
                for n, outcome in zip(trials.number[at], trials.outcome[at], strict=True)
            }
            for at in (study.gathered.of(cell) for cell in cells)
        ]
        both = sorted(ends[0].keys() & ends[1].keys())
        alone = [sum(ends[i][n] and not ends[1 - i][n] for n in both) for i in (0, 1)]
        differ = sum(alone)
        p = float(binomtest(alone[0], differ).pvalue) if differ else 1.0
        said.append(
            f"{label}: {len(both) - differ} of {len(both)} faults ended alike (badly or not) in both "
            "frameworks; "
            f"{alone[0]} badly in {cells[0].workload} alone, {alone[1]} in {cells[1].workload} alone "
            f"(McNemar's exact test: p {p:.2g})."
        )
    return said


def strata(study: Study) -> list[str]:
    """E3-strata: the rate of a uniform flip, and where the harm is."""
    said = []
    for found in stratified(study.gathered):
        rate = found.weighted
        if rate is None:
            continue
        said.append(
            f"A uniformly drawn flip ends badly in {percent(rate.rate)} (95 %: "
            f"{between(rate.low, rate.high)} %, "
            f"{rate.method}); the {rate.trials} trials tell as much as {rate.effective:.0f} drawn uniformly."
        )
        harmful = [row for row in found.rows if row.bad and row.bad.events]
        if not harmful:
            said.append("No trial ended badly: where the harm is cannot be said.")
            continue
        share = sum(row.stratum.weight for row in harmful)
        bad, all_bad = (
            sum(row.bad.events for row in rows if row.bad)
            for rows in ([r for r in harmful if r.stratum.field == "critical"], harmful)
        )
        said.append(
            f"{bad} of {all_bad} bad ends are flips of a critical bit. {len(harmful)} of {len(found.rows)} "
            "strata, "
            f"with {percent(share)} of the bits, saw any."
        )
    return said


def _count(cell: Cell) -> int:
    return int((cell.policy or {}).get("count") or 1)


def _flips(cell: Cell) -> str:
    return _flips_of(_count(cell))


def _flips_of(count: int) -> str:
    return "1 flip" if count == 1 else f"{count} flips"


FINDINGS: dict[str, Finding] = {
    "E0": repeats, "E1": breaks, "E2": bits, "E3": single, "E3-strata": strata, "E4": absorbs, "E5": moments,
    "E6": extremes, "E7": spreads, "E8": equivalents, "E9": extremes, "E10": extremes, "E11": precisions,
    "E11-keras": precisions, "E12": roles, "E13": ranks,
}  # fmt: skip
