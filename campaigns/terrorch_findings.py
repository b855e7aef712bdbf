"""What the stores of the recommendation study say, in sentences made from their numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from terrorch_tables import Line, Study, auc, loss, read_rows

from ckptflip.campaign.statistics import compare_rates, holm
from ckptflip.recsys.quantised_workload import row_bytes
from ckptflip.report.campaign.rates import Rate, rates
from ckptflip.report.campaign.words import grouped, listed, many, percent

LEVEL = 0.05
# Of the tables of the built-in DLRM.
COLUMNS = 16
# Of the dummy model, in the order of its workloads' labels.
FACTORS = (("embedding", "columns"), ("MLP", "units"), ("sparsity", "of the table"))
# How a comparison begins that nobody had planned, and of what it is.
AFTERWARDS, USELESS = "Afterwards,", "were useless"
Finding = Callable[[Study], list[str]]
# Two things to compare, and what they are called.
Pair = tuple[str, Rate, Rate]


def models(study: Study) -> list[str]:
    """T1: from which error rate on each model loses AUC."""
    said = [_onset(name, lines) for name, lines in study.by(lambda line: line.cell.workload)]
    by_rate: dict[float, list[Line]] = {}
    for line in study.lines:
        by_rate.setdefault(line.amount, []).append(line)
    telling = next((lines for lines in by_rate.values() if _pooled(lines).share > 0.5), [])
    if telling:
        order = sorted(telling, key=lambda line: line.loss)
        said.append(
            f"At BER {telling[0].amount:g}, the lowest rate at which more than half of all models' "
            f"evaluations lost AUC, the mean loss goes from {loss(order[0])} ({order[0].cell.workload}) to "
            f"{loss(order[-1])} ({order[-1].cell.workload})."
        )
        pairs = [
            (f"{a.cell.workload} and {b.cell.workload}", a.lost, b.lost)
            for a, b in itertools.combinations(telling, 2)
        ]
        said += compared(pairs, f"Of the models at BER {telling[0].amount:g}")
        pairs = [
            (f"{a.cell.workload} and {b.cell.workload}", a.useless, b.useless)
            for a, b in itertools.combinations(telling, 2)
        ]
        said += compared(pairs, f"{AFTERWARDS} of the models at BER {telling[0].amount:g}", did=USELESS)
    unharmed = sum(line.unharmed for line in study.lines)
    said.append(
        f"{unharmed} of {sum(line.done for line in study.lines)} evaluations had NaN or infinite weights and "
        "lost no AUC; a campaign's outcome `collapsed` counts them in, so this page goes by the AUC."
    )
    return said


def _onset(name: str, lines: Sequence[Line]) -> str:
    quiet = list(itertools.takewhile(lambda line: not line.lost.events, lines))
    often = next((line for line in lines if line.lost.share > 0.5), None)
    said = f"{name}: "
    if quiet:
        bound = _pooled(quiet)
        said += (
            f"none of {bound.trials} evaluations lost AUC up to BER {quiet[-1].amount:g} (a rate of at most "
            f"{percent(bound.high)} over all of these); "
        )
    if often is None:
        return f"{said}at no rate did more than half."
    return (
        f"{said}more than half did at BER {often.amount:g}: {percent(often.lost.share)}, with a mean loss of "
        f"{loss(often)}."
    )


def parts(study: Study) -> list[str]:
    """T2: MLPs against tables, by error rate and by flip."""
    by = {(line.group, line.amount): line for line in study.lines}
    bers = [amount for group, amount in by if group == "MLPs" and ("tables", amount) in by]
    said = compared(
        [(f"BER {r:g}", by["MLPs", r].lost, by["tables", r].lost) for r in bers],
        "MLPs against tables at the same error rate of each bit", ("MLPs", "tables"),
    )  # fmt: skip
    said += compared(
        [(f"BER {r:g}", by["MLPs", r].useless, by["tables", r].useless) for r in bers],
        f"{AFTERWARDS} MLPs against tables at the same error rate", ("MLPs", "tables"), did=USELESS,
    )  # fmt: skip
    if bers:
        ends = by["MLPs", bers[-1]], by["tables", bers[-1]]
        said.append(
            f"The tables are {ends[1].flips / max(ends[0].flips, 1):.0f} times as large: at BER {bers[-1]:g} "
            f"they get {grouped(round(ends[1].flips))} flips and lose {loss(ends[1])}, the MLPs "
            f"{grouped(round(ends[0].flips))} flips and {loss(ends[0])}."
        )
    counts = [amount for group, amount in by if group == "top MLP" and ("any table", amount) in by]
    pairs = [(f"{many(int(n), 'flip')}", by["top MLP", n].lost, by["any table", n].lost) for n in counts]
    said += compared(pairs, "The top MLP against tables, for the same number of flips", ("top MLP", "tables"))
    more, less = (sum(sign * d > 0 for _, d in _told(pairs)) for sign in (1, -1))
    verdict = "not confirmed" if not more else "confirmed" if not less else "contradicted in part"
    said.append(f"By flip, the claim that the top MLP is more vulnerable than the tables is {verdict} here.")
    return said


def sizes(study: Study) -> list[str]:
    """T3: the smallest against the largest value of each factor, all else the same."""
    said = []
    for place, (factor, what) in enumerate(FACTORS):
        values: dict[float, list[Line]] = {}
        for line in study.lines:
            number = float(line.cell.workload.split(", ")[place].rpartition(" ")[2])
            values.setdefault(number, []).append(line)
        low, high = min(values), max(values)
        pairs = []
        for group in dict.fromkeys(line.group for line in study.lines):
            one, other = ([x for x in values[v] if x.group == group] for v in (high, low))
            pairs.append((f"{group} hit", _pooled(one), _pooled(other)))
        said += compared(
            pairs, f"{factor}, {high:g} against {low:g} {what}, over all else", (f"{high:g}", f"{low:g}")
        )
    return [*said, "The error rates are the same for all models, so a larger one gets more flips."]


def rows(study: Study) -> list[str]:
    """T4: hot against cold rows, and which of them are read at all."""
    groups = list(dict.fromkeys(line.group for line in study.lines))
    hot, cold = (next(group for group in groups if group.startswith(kind)) for kind in ("hot", "cold"))
    by = {(line.group, line.amount): line for line in study.lines}
    counts = [amount for group, amount in by if group == hot]
    pairs = [(many(int(n), "flip"), by[hot, n].lost, by[cold, n].lost) for n in counts]
    said = compared(pairs, "Hot rows against cold rows, for the same number of flips", (hot, cold))
    most = counts[-1]
    said.append(
        f"{many(int(most), 'flip')} cost {loss(by[hot, most])} of AUC in {hot} of the rows, and "
        f"{loss(by[cold, most])} in {cold}."
    )
    read = read_rows(study)
    shares = []
    for group in groups:
        found = [read[line.cell.id] for line in study.lines if line.group == group]
        faulty, seen = sum(each.rows for each in found), sum(each.read for each in found)
        shares.append(f"{percent(seen / max(faulty, 1))} ({group})")
    said.append(
        f"Of the rows with a fault, the evaluation read {listed(shares)}: a fault in a row that is not read "
        "cannot show."
    )
    return said


def forms(study: Study) -> list[str]:
    """T5: tables in fewer bits against those in float32."""
    names = list(dict.fromkeys(line.cell.workload for line in study.lines))
    clean = [f"{study.clean(n):.4f} ({n}, {row_bytes(n, COLUMNS)} bytes a row)" for n in names]
    said = [f"Without errors the mean AUC is {listed(clean)}."]
    by = {(line.cell.workload, line.amount): line for line in study.lines}
    bers = list(dict.fromkeys(line.amount for line in study.lines))
    for name in names[1:]:
        pairs = [(f"BER {r:g}", by[name, r].lost, by[names[0], r].lost) for r in bers if (name, r) in by]
        said += compared(pairs, f"{name} against {names[0]}", (name, names[0]))
    said += [_onset(name, lines) for name, lines in study.by(lambda line: line.cell.workload)]
    return said


def fields(study: Study) -> list[str]:
    """T5-int8, T5-int4: codes, scales and biases against each other."""
    by = {(line.group.removeprefix("fields "), line.amount): line for line in study.lines}
    counts = list(dict.fromkeys(line.amount for line in study.lines))
    said = []
    for one, other in (("scale", "code"), ("bias", "code"), ("scale", "bias")):
        pairs = [(many(int(n), "flip"), by[one, n].lost, by[other, n].lost) for n in counts]
        said += compared(pairs, f"A {one} hit against a {other} hit", (one, other))
    most = counts[-1]
    costs = [f"{loss(by[field, most])} ({field})" for field in ("code", "scale", "bias")]
    return [*said, f"{many(int(most), 'flip')} cost a mean AUC of {listed(costs)}."]


def training(study: Study) -> list[str]:
    """T6: right after the restart against the end, and the critical bit."""
    by = {(line.group.removeprefix("bits "), line.amount): line for line in study.lines}
    counts = list(dict.fromkeys(line.amount for line in study.lines))
    said = []
    for bits in dict.fromkeys(bits for bits, _ in by):
        of_these = [
            f"{many(int(n), 'flip')}, {auc(by[bits, n].after)} right after and {loss(by[bits, n])} at the end"
            for n in counts
        ]
        said.append(f"Mean loss of AUC, bits `{bits}`: {'; '.join(of_these)}.")
    pairs = [(many(int(n), "flip"), by["critical", n].lost, by["all,!critical", n].lost) for n in counts]
    return said + compared(
        pairs, "The critical bit alone against all others, at the end", ("critical", "all others")
    )


def compared(
    pairs: Sequence[Pair], what: str, names: tuple[str, str] | None = None, did: str = "lost AUC"
) -> list[str]:
    """One sentence on pairs of rates, with all tests taken together; without names, which pairs differ."""
    if not pairs:
        return []
    told = _told(pairs)
    said = (
        f"{what}: the rates of evaluations that {did} differ in {len(told)} of "
        f"{many(len(pairs), 'comparison')}"
    )
    by = {label: (a, b) for label, a, b in pairs}
    parts = [label for label, _ in told]
    if names is not None:
        parts = [
            f"{label} ({percent(by[label][0].share)} {names[0]}, {percent(by[label][1].share)} {names[1]})"
            for label in parts
        ]
    return [f"{said}{f': {listed(parts)}' if parts else ''}."]


def _told(pairs: Sequence[Pair]) -> list[tuple[str, float]]:
    """The pairs that differ, with the difference of their rates."""
    found = [compare_rates(a.events, a.trials, b.events, b.trials) for _, a, b in pairs]
    adjusted: Sequence[float] = holm([each.p_value for each in found]).tolist() if found else []
    return [
        (label, each.difference)
        for (label, _, _), each, p in zip(pairs, found, adjusted, strict=True)
        if p <= LEVEL
    ]


def _pooled(lines: Sequence[Line]) -> Rate:
    events, trials = (sum(getattr(line.lost, name) for line in lines) for name in ("events", "trials"))
    return rates(np.array([events], np.int64), trials)[0]


FINDINGS: dict[str, Finding] = {
    "T1": models, "T2": parts, "T3": sizes, "T4": rows, "T5": forms, "T5-int8": fields, "T5-int4": fields,
    "T6": training,
}  # fmt: skip
