"""The Terrorch study on a generated click log: runs its specs, writes docs/results-recsys.md.

    python campaigns/terrorch.py run        every campaigns/terrorch/*-small.toml, one after the other
    python campaigns/terrorch.py run --only T4 --trials 2 --stores /tmp/look        a quick look
    python campaigns/terrorch.py write      docs/results-recsys.md and its figures, from the stores
    python campaigns/terrorch.py counts campaigns/terrorch/T4.toml      access.npz, which T4 needs

`run` goes on where it was interrupted. Stores and clean runs lie in runs/terrorch.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from ckptflip.campaign import loading
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import reading
from ckptflip.errors import CkptflipError
from ckptflip.recsys import recipes
from ckptflip.recsys.data.logs import access_counts
from ckptflip.recsys.tables import write_counts
from ckptflip.report.campaign.drawing import drawing

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import terrorch_tables as tables  # noqa: E402
from cluster21 import carried_out, chosen, command_line, markdown, run_all  # noqa: E402
from terrorch_findings import FINDINGS, LEVEL  # noqa: E402
from terrorch_tables import Study  # noqa: E402

SPECS = HERE / "terrorch"
STORES = HERE.parent / "runs" / "terrorch"
PAGE = HERE.parent / "docs" / "results-recsys.md"
IMAGES = PAGE.parent / "images" / "results-recsys"
COUNTS = "access.npz"
_DPI, _COLOURS = 110, 64
_RULES = """\
**The rules**, the same for all studies and fixed before the runs:

- Each trial alters a copy of a clean checkpoint and is compared with that checkpoint's own AUC on the same
  test rows. Faults never pile up: every trial begins with the clean weights.
- An evaluation *lost* AUC if it is more than the tolerance below the clean one's. Where nothing is trained
  the tolerance is 0.001: equal weights give equal AUC, so any difference is the faults' doing. Where training
  goes on it is 0.005, since any change leads training another way. A model is *useless* if its AUC ends below
  halfway between 0.5 and the clean one's.
- A row whose output is NaN ranks below all others ([measures](recsys.md)). Intervals of rates are Clopper
  and Pearson's, exact, of 95 %; where nothing was seen the upper bound alone. Those of the mean loss of AUC
  (clean less faulty, paired) are bootstrapped (BCa) over the trials.
- Two cells *differ* if Fisher's exact test says so (p ≤ {level:g}) after Holm's adjustment for all
  comparisons of the sentence.
- Sentences are chosen by the script from the numbers; what they compare, and how, was fixed before the runs,
  but for those that begin with *Afterwards*.
"""


def main() -> int:
    """Parse the command line; the exit code is 4 where trials failed, 1 for other errors."""
    parser, commands = command_line(__doc__, STORES, PAGE, "studies, such as T1 T5-int8")
    command = commands.add_parser("counts")
    command.add_argument("spec", type=Path)
    command.add_argument("-o", "--out", type=Path, default=Path(COUNTS), help="the file, an .npz")
    return carried_out(
        parser.parse_args(), run, write, counts=lambda given: count(loading.load(given.spec), given.out)
    )


def specs(only: Sequence[str] | None = None) -> dict[str, Path]:
    """The specs that run here, by study, in order.

    Raises:
        CkptflipError: one that is asked for does not exist.
    """
    found = {path.stem.removesuffix("-small"): path for path in SPECS.glob("*-small.toml")}
    # T5, then its fields: the longer codes first.
    order = sorted(found, key=lambda name: (name[:2], -int(name.partition("int")[2] or 99)))
    return chosen({name: found[name] for name in order}, only, "study")


def count(campaign: Campaign, out: Path) -> Path:
    """Write how often the training log of a campaign's first workload reads each row of each table.

    Raises:
        CkptflipError: the workload is no recommendation model, or the file exists.
    """
    workload = campaign.workload[0]
    options = {name: value for name, value in workload.options.items() if name != "config"}
    train, _ = recipes.made(workload.name, options, workload.options.get("config")).logs
    found = access_counts([train])
    write_counts(out, {f"emb_l.{table}.weight": counts for table, counts in enumerate(found)})
    return out


def run(stores: Path, only: Sequence[str] | None, trials: int | None, workers: int | None) -> int:
    """Run what is missing of the studies; 4 where trials failed, else 0."""
    stores = stores.resolve()
    stores.mkdir(parents=True, exist_ok=True)
    found = specs(only)
    for path in found.values():
        campaign = loading.load(path)
        if any(policy.rows_weight for policy in campaign.policy) and not (stores / COUNTS).exists():
            count(campaign, stores / COUNTS)
    # Trials find the access counts where they run. A path in the spec would be part of their draws.
    with contextlib.chdir(stores):
        return run_all(found, stores, trials, workers)


def write(stores: Path, out: Path, only: Sequence[str] | None = None) -> Path:
    """Write the page from the stores that are there.

    Raises:
        CkptflipError: there is none, or one cannot be read.
    """
    studies = {
        name: Study.of(name, stores / f"{name}.db")
        for name in specs(only)
        if (stores / f"{name}.db").exists()
    }
    if not studies:
        raise CkptflipError(f"{stores} holds no store: `python {Path(__file__).name} run` makes them")
    out.parent.mkdir(parents=True, exist_ok=True)
    images = out.parent / IMAGES.relative_to(PAGE.parent)
    parts = [_head(studies, stores)]
    with drawing():
        parts += [_section(study, _figure(study, images), images.name) for study in studies.values()]
    out.write_text("\n".join(parts), encoding="utf-8")
    return out


def _head(studies: dict[str, Study], stores: Path) -> str:
    all_trials = [study.gathered.trials for study in studies.values()]
    done = sum(int((trials.state == "done").sum()) for trials in all_trials)
    failed = sum(len(trials.id) for trials in all_trials) - done
    missing = [name for name in specs() if name not in studies]
    revision = next(iter(studies.values())).gathered.revisions[-1]
    versions = ", ".join(f"{name} {version}" for name, version in revision.versions.items())
    machine = revision.machine
    return "\n".join([
        "# The recommendation study on a generated log",
        "",
        "The designs of the first study of recommendation models under hardware errors (Terrorch, "
        "arXiv 2307.10244), and what it left out, as [specs](../campaigns/terrorch), run on models that "
        "train here: what was claimed, and what we find. The study's mitigations are not among them. "
        "[The checkpoint-alteration study](results.md) has a page of its own.",
        "",
        "**The log is generated and small.** 26 tables of 44,921 rows in all, 100,000 to 200,000 training "
        "rows and 10,000 test rows of a [log whose best AUC is known](recsys-data.md) (about 0.789), models "
        "of about 0.75 million parameters: no Criteo, no MovieLens. Tables in use are far larger, and most "
        "of their rows are read more rarely than any here. What holds here may not hold there. Quoted is "
        "only what abstracts and public code say; the full texts were not at hand. (T3's dummy model is "
        "another: random weights on random inputs.) `campaigns/terrorch/` has the specs at full size.",
        "",
        _RULES.format(level=LEVEL),
        f"**The runs**: {done} trials in {len(studies)} campaigns"
        + (f", {failed} more failed" if failed else "")
        + (f"; not run: {', '.join(missing)}" if missing else "")
        + ".",
        "",
        f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory', 0) / 2**30:.0f} "
        f"GiB, {machine.get('system')}; {versions}. Begun {revision.created[:10]}, "
        f"{_seconds(studies, stores) / 60:.0f} minutes of one core; seed 23. Page "
        f"written {date.today().isoformat()} by",
        "",
        "```sh",
        "python campaigns/terrorch.py run      # goes on where it was interrupted",
        "python campaigns/terrorch.py write",
        "```",
        "",
    ])  # fmt: skip


def _seconds(studies: dict[str, Study], stores: Path) -> float:
    """Time that all attempts took, one after the other."""
    total = 0.0
    for name in studies:
        with reading(stores / f"{name}.db") as reader:
            total += sum(attempt.seconds for attempt in reader.attempts())
    return total


def _section(study: Study, figure: str, images: str) -> str:
    file = f"{study.name}-small.toml"
    # A campaign's words are no part of its results: those of the spec as it is now hold.
    spec = loading.load(SPECS / file)
    lines = [f"## {study.name}: {spec.title}", ""]
    for line in spec.about.strip().splitlines():
        word, colon, rest = line.partition(": ")
        lines += [f"**{word}:** {rest}" if colon else line, ""]
    lines += [tables.size(study), ""]
    for place, said in enumerate(FINDINGS[study.name](study)):
        lines.append(f"- {'' if place else '**Found:** '}{said}")
    lines += ["", markdown(tables.table(study)), ""]
    if figure:
        lines += [f"![{study.name}: loss of AUC](images/{images}/{figure})", ""]
    lines += [f"Spec: [{file}](../campaigns/terrorch/{file}).", ""]
    return "\n".join(lines)


def _figure(study: Study, folder: Path) -> str:
    """The name of a study's figure, once it is written; empty where it has none."""
    figure = tables.figure(study)
    if figure is None:
        return ""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=_DPI)
    name = f"{study.name}.png"
    # A palette makes a drawing a third as large.
    Image.open(held).convert("RGB").quantize(_COLOURS).save(folder / name, optimize=True)
    return name


if __name__ == "__main__":
    raise SystemExit(main())
