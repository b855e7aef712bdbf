"""The score of protections: runs its specs, writes docs/results-protection.md.

    python campaigns/protection.py run        every campaigns/protection/*-small.toml, one after the other
    python campaigns/protection.py run --only S2 --trials 2 --stores /tmp/look        a quick look
    python campaigns/protection.py write      docs/results-protection.md, from the stores

`run` goes on where it was interrupted. Stores and clean runs lie in runs/protection.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from ckptflip.campaign.store import reading
from ckptflip.errors import CkptflipError
from ckptflip.report.campaign.words import many

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import protection_tables as tables  # noqa: E402
from cluster21 import carried_out, chosen, command_line, markdown, run_all  # noqa: E402
from protection_findings import LEVEL, findings  # noqa: E402
from protection_tables import Study  # noqa: E402

SPECS = HERE / "protection"
STORES = HERE.parent / "runs" / "protection"
PAGE = HERE.parent / "docs" / "results-protection.md"
_HEAD = """\
# Protections, scored on the same faults

Every trial alters a copy of a trained model, and measures that one faulty model bare and under every
contender: who noticed, and what was left. So contenders are compared trial by trial, on the same words
and bits.

**The models are small** and their log is generated; what holds here may not hold for yours. What
detection inside operators costs, and what it finds of faults in products and sums, is measured apart:
[quantised GEMM](../benchmarks/results/abft_gemm.md), [EmbeddingBag](../benchmarks/results/abft_bags.md),
[intensity-guided](../benchmarks/results/intensity.md), [clipping](../benchmarks/results/clipping.md),
[seals](../benchmarks/results/seal.md).

**The rules**, the same for all studies and made before any of them ran:

- A fault is *effective* if any output on the test set is not the clean model's, bit for bit. Detection is
  told of all faults and of effective ones; intervals are Clopper and Pearson's, exact, of 95 %.
- A *false alarm* is a contender that notices something in a model in which nothing was altered.
- What a contender leaves is the clean metric less its own, paired by trial; means have bootstrapped (BCa)
  intervals. What has no metric counts as chance. Tables round to four places: 0 (0 to 0) lies within
  0.00005 of 0. A mean alone is of trials too much alike for an interval.
- Two contenders *differ* in a cell if Wilcoxon's signed-rank test says so (p ≤ {level:g}) after Holm's
  adjustment over the cells of the study.
- Sentences are chosen by the script from the numbers. What they compare was fixed before the runs; how they
  are worded was not.
"""
_CONTENDERS = """\
| contender | what it is |
|---|---|
{rows}
"""


def main() -> int:
    """Parse the command line; the exit code is 4 where trials failed, 1 for other errors."""
    parser, _ = command_line(__doc__, STORES, PAGE, "studies, such as S1")
    return carried_out(parser.parse_args(), run, write)


def run(stores: Path, only: Sequence[str] | None, trials: int | None, workers: int | None) -> int:
    """Run what is missing of the studies; 4 where trials failed, else 0."""
    stores.mkdir(parents=True, exist_ok=True)
    return run_all(specs(only), stores, trials, workers)


def specs(only: Sequence[str] | None = None) -> dict[str, Path]:
    """The specs that run here, by study, in order.

    Raises:
        CkptflipError: one that is asked for does not exist.
    """
    found = {path.stem.removesuffix("-small"): path for path in sorted(SPECS.glob("*-small.toml"))}
    return chosen(found, only, "study")


def write(stores: Path, out: Path, only: Sequence[str] | None = None) -> Path:
    """Write the page from the stores that are there.

    Raises:
        CkptflipError: there is none, or one cannot be read.
    """
    studies = [
        Study.of(name, stores / f"{name}.db") for name in specs(only) if (stores / f"{name}.db").exists()
    ]
    if not studies:
        raise CkptflipError(f"{stores} holds no store: `python {Path(__file__).name} run` makes them")
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD.format(level=LEVEL), _contenders(), _runs(studies, stores), *map(_section, studies)]
    out.write_text("\n".join(parts), encoding="utf-8")
    return out


def _contenders() -> str:
    """What each contender is, as its class and its own words say it."""
    from ckptflip.protect.scoring.contenders import CONTENDERS
    from ckptflip.protect.scoring.int8_contenders import INT8_CONTENDERS

    told = {each.name: each.about for each in (*CONTENDERS, *INT8_CONTENDERS)}
    rows = "\n".join(f"| `{name}` | {about} |" for name, about in told.items())
    return _CONTENDERS.format(rows=rows)


def _runs(studies: Sequence[Study], stores: Path) -> str:
    trials = [study.gathered.trials for study in studies]
    done = sum(int((each.state == "done").sum()) for each in trials)
    failed = sum(len(each.id) for each in trials) - done
    seconds = 0.0
    for study in studies:
        with reading(stores / f"{study.name}.db") as reader:
            seconds += sum(attempt.seconds for attempt in reader.attempts())
    revision = studies[0].gathered.revisions[-1]
    versions = ", ".join(f"{name} {version}" for name, version in revision.versions.items())
    machine = revision.machine
    return "\n".join([
        f"**The runs**: {done} trials in {many(len(studies), 'campaign')}"
        f"{f', {failed} more failed' if failed else ''}. "
        f"{machine.get('processor')}, {machine.get('cores')} cores, "
        f"{machine.get('memory', 0) / 2**30:.0f} GiB, {machine.get('system')}; {versions}. "
        f"Begun {revision.created[:10]}, {seconds / 60:.0f} minutes of one core; "
        f"seed {studies[0].gathered.spec['seed']}. Page written {date.today().isoformat()} by",
        "",
        "```sh",
        "python campaigns/protection.py run      # goes on where it was interrupted",
        "python campaigns/protection.py write",
        "```",
        "",
    ])  # fmt: skip


def _section(study: Study) -> str:
    spec = study.gathered.spec
    file = f"{study.name}-small.toml"
    lines = [f"## {study.name}: {spec.get('title', '')}", ""]
    for line in str(spec.get("about", "")).strip().splitlines():
        word, colon, rest = line.partition(": ")
        lines += [f"**{word}:** {rest}" if colon else line, ""]
    for place, said in enumerate(findings(study)):
        lines.append(f"- {'' if place else '**Found:** '}{said}")
    lines += ["", "Who noticed, over all cells:", "", markdown(tables.noticed_table(study)), ""]
    lines += ["Of the effective faults, by cell:", "", markdown(tables.noticed_cells(study)), ""]
    lines += [
        f"Loss of {study.metric} that is left, mean and 95 %:", "", markdown(tables.left_table(study)), "",
        f"Spec: [{file}](../campaigns/protection/{file}).", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
