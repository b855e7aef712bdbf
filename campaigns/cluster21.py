"""The published checkpoint-alteration study on the digits: runs its experiments, writes docs/results.md.

    python campaigns/cluster21.py run        every campaigns/cluster21/*-digits.toml, one after the other
    python campaigns/cluster21.py run --only E3 --trials 2 --stores /tmp/look       a quick look
    python campaigns/cluster21.py write      docs/results.md and its figures, from the stores

`run` goes on where it was interrupted. Stores and clean runs lie in runs/cluster21.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign import loading
from ckptflip.campaign.events import Happened
from ckptflip.campaign.runner import run as run_campaign
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import reading
from ckptflip.errors import CkptflipError, FailedTrialsError
from ckptflip.report.campaign import bands, hits, recovery, shares, spread
from ckptflip.report.campaign.drawing import Drawn, drawing
from ckptflip.report.campaign.gathering import gather
from ckptflip.report.campaign.rates import cell_rows, noise_floors
from ckptflip.report.campaign.words import number

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import cluster21_tables as tables  # noqa: E402
from cluster21_findings import FINDINGS, LEVEL  # noqa: E402
from cluster21_tables import Study  # noqa: E402

SPECS = HERE / "cluster21"
STORES = HERE.parent / "runs" / "cluster21"
PAGE = HERE.parent / "docs" / "results.md"
IMAGES = PAGE.parent / "images" / "results"
# The experiments that a figure helps, and which of a report's it is.
FIGURES = {
    "E2": "outcomes-bits", "E3-strata": "heatmap", "E4": "convergence", "E5": "recovery",
    "E7": "propagation", "E12": "outcomes-roles",
}  # fmt: skip
# Dots per inch and colours of a figure: enough to read it, little enough to keep it.
_DPI, _COLOURS = 110, 64
_RULES = """\
**The rules**, the same for all experiments and fixed before the runs:

- A restart *ended badly* if its outcome is `degraded` or `collapsed` (the [outcomes](campaigns.md)), judged
  by the accuracy on the test set with a tolerance of {tolerance:g} (7 of the 360 test images).
- Intervals of rates are Clopper and Pearson's, exact, of 95 %; where nothing was seen the upper bound
  alone; where faults were drawn by stratum, a weighted confidence sequence's ([statistics](statistics.md)).
  Those of accuracy are bootstrapped (BCa) over the restarts that have a final accuracy (not those that
  ended in NaN or infinity); there is none where all differences are the same. *Right after* is a
  mean, before any training. "Back" is a Kaplan-Meier
  median.
- The claim that dozens of flips are *often* absorbed holds of a cell if at least half of its restarts do
  not end badly, with 95 % confidence.
- Two cells *differ* if Fisher's exact test says so (p ≤ {level:g}) after Holm's adjustment for all
  comparisons of the paragraph.
- Sentences are chosen by the script from the numbers; none was written after looking at them.
"""


def main() -> int:
    """Parse the command line; the exit code is 4 where trials failed, 1 for other errors."""
    parser, _ = command_line(__doc__, STORES, PAGE, "experiments, such as E3 E3-strata")
    return carried_out(parser.parse_args(), run, write)


def command_line(
    doc: str | None, stores: Path, page: Path, studies: str
) -> tuple[argparse.ArgumentParser, Any]:
    """The commands ``run`` and ``write`` of a script that runs studies; and where further ones are added.

    Args:
        doc: of the script; its first line describes it.
        stores: folder of the stores, unless given.
        page: what is written, unless given.
        studies: what is said of ``--only``.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "write"):
        command = commands.add_parser(name)
        command.add_argument("--stores", type=Path, default=stores, help="folder of the stores")
        command.add_argument("--only", nargs="+", metavar="NAME", help=studies)
        if name == "run":
            command.add_argument(
                "--trials", type=int, help="per cell, instead of the specs', for a quick look"
            )
            command.add_argument("--workers", type=int, help="processes; one per core unless given")
        else:
            command.add_argument("--out", type=Path, default=page, help="the page")
    return parser, commands


def carried_out(
    given: argparse.Namespace,
    run: Callable[..., int],
    write: Callable[..., Path],
    **others: Callable[[Any], Any],
) -> int:
    """Do what the command line asks for; the exit code, 1 for errors.

    Args:
        given: the parsed command line.
        run, write: with the arguments of those here.
        others: further commands, by name, given the parsed command line; what they give back is printed.
    """
    try:
        if given.command == "run":
            return run(given.stores, given.only, given.trials, given.workers)
        if given.command in others:
            print(others[given.command](given))
        else:
            print(write(given.stores, given.out, given.only))
    except CkptflipError as why:
        print(f"Error: {why}", file=sys.stderr)
        return 1
    return 0


def chosen(found: Mapping[str, Path], only: Sequence[str] | None, what: str) -> dict[str, Path]:
    """Those of some specs that are asked for, in their order; all unless told.

    Raises:
        CkptflipError: one that is asked for does not exist.
    """
    if unknown := set(only or ()) - set(found):
        raise CkptflipError(f"there is no {what} {sorted(unknown)[0]}; there are {', '.join(found)}")
    return {name: path for name, path in found.items() if not only or name in only}


def specs(only: Sequence[str] | None = None) -> dict[str, Path]:
    """The specs that run here, by experiment, in order.

    Raises:
        CkptflipError: one that is asked for does not exist.
    """
    found = {path.stem.removesuffix("-digits"): path for path in SPECS.glob("*-digits.toml")}
    order = sorted(found, key=lambda name: (int(re.findall(r"\d+", name)[0]), name))
    return chosen({name: found[name] for name in order}, only, "experiment")


def shortened(campaign: Campaign, trials: int | None) -> Campaign:
    """A campaign with fewer trials in each cell."""
    if trials is None:
        return campaign
    fewer = msgspec.structs.replace(
        campaign.trials, per_cell=trials, control=min(trials, campaign.trials.control)
    )
    return msgspec.structs.replace(campaign, trials=fewer)


def run(stores: Path, only: Sequence[str] | None, trials: int | None, workers: int | None) -> int:
    """Run what is missing of the experiments; 4 where trials failed, else 0."""
    stores.mkdir(parents=True, exist_ok=True)
    return run_all(specs(only), stores, trials, workers)


def run_all(found: Mapping[str, Path], stores: Path, trials: int | None, workers: int | None) -> int:
    """Run what is missing of these specs, each into the store of its name; 4 where trials failed, else 0."""
    began, code = time.perf_counter(), 0
    for name, path in found.items():
        campaign = shortened(loading.load(path), trials)
        command = f"ckptflip run {path.relative_to(HERE.parent)} --store {name}.db"
        try:
            done = run_campaign(
                campaign, stores / f"{name}.db", workers=workers, extend=True, told=_told, command=command
            )
        except FailedTrialsError as why:
            print(f"{name}: {why}", file=sys.stderr)
            code = why.exit_code
            continue
        print(f"{name}: {done.ran} trials in {done.seconds:.0f} s, {done.found} were there", file=sys.stderr)
    print(f"{time.perf_counter() - began:.0f} s in all", file=sys.stderr)
    return code


def _told(happened: Happened) -> None:
    if happened.what != "trial":
        print(f"  {happened.text}", file=sys.stderr)


def write(stores: Path, out: Path, only: Sequence[str] | None = None) -> Path:
    """Write the page from the stores that are there.

    Raises:
        CkptflipError: there is none, or one cannot be read.
    """
    studies: dict[str, Study] = {}
    for name in specs(only):
        if (stores / f"{name}.db").exists():
            studies[name] = _study(name, stores / f"{name}.db")
    if not studies:
        raise CkptflipError(f"{stores} holds no store: `python {Path(__file__).name} run` makes them")
    images = out.parent / IMAGES.relative_to(PAGE.parent)
    images.mkdir(parents=True, exist_ok=True)
    parts = [_head(studies, stores)]
    with drawing():
        for study in studies.values():
            parts.append(_section(study, _figure(study, images), images.relative_to(out.parent)))
    if "E3-strata" in studies:
        parts.append(_designs(studies["E3-strata"]))
    out.write_text("\n".join(parts), encoding="utf-8")
    return out


def _study(name: str, store: Path) -> Study:
    gathered = gather(store)
    strange: set[int] = set()
    with reading(store) as reader:
        for metric in ("nan", "inf", "extreme"):
            curves = reader.curves(metric)
            strange.update(curves.owner[~(curves.value == 0)].tolist())
    return Study(name, gathered, cell_rows(gathered), frozenset(strange))


def _head(studies: dict[str, Study], stores: Path) -> str:
    first = next(iter(studies.values())).gathered
    done = sum(int((s.gathered.trials.state == "done").sum()) for s in studies.values())
    failed = sum(len(s.gathered.trials.id) for s in studies.values()) - done
    missing = [name for name in specs() if name not in studies]
    revision = first.revisions[-1]
    versions = ", ".join(f"{name} {version}" for name, version in revision.versions.items())
    machine = revision.machine
    lines = [
        "# The published study's experiments on the digits",
        "",
        "The experiments of Rojas et al., *Understanding Soft Error Sensitivity of Deep Learning Models and "
        "Frameworks through Checkpoint Alteration* "
        "(IEEE CLUSTER 2021), as [specs](../campaigns/README.md), run on scikit-learn's handwritten digits "
        "in PyTorch and in Keras: what was claimed, "
        "and what we find. Recommendation models have [a page of their own](results-recsys.md).",
        "",
        "**Digits are not CIFAR-10.** A small network (two convolutions, two dense layers) on 1437 images of "
        "8×8 pixels, trained for 15 epochs, says "
        "nothing certain of AlexNet, VGG16 or ResNet50; what holds here may not hold there, and the other "
        "way round. Only what abstracts and public "
        "code say is quoted; the full texts were not at hand. `campaigns/cluster21/` has the specs at full "
        "size.",
        "",
        _RULES.format(tolerance=first.judged.tolerance, level=LEVEL),
        f"**The runs**: {done} restarts in {len(studies)} campaigns"
        + (f", {failed} more failed" if failed else "")
        + (f"; not run: {', '.join(missing)}" if missing else "")
        + f". {_noise(studies)}",
        "",
        f"{machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory', 0) / 2**30:.0f} "
        f"GiB, {machine.get('system')}; {versions}. "
        f"Begun {revision.created[:10]}, {_seconds(studies, stores) / 60:.0f} minutes of one core; seed "
        f"{first.spec.get('seed', 0)}. Page "
        f"written {date.today().isoformat()} by",
        "",
        "```sh",
        "python campaigns/cluster21.py run      # goes on where it was interrupted",
        "python campaigns/cluster21.py write",
        "```",
        "",
    ]
    return "\n".join(lines)


def _noise(studies: dict[str, Study]) -> str:
    """What clean runs of different seeds differ by: a smaller effect may be another seed's."""
    said = []
    for study in studies.values():
        floors = [floor for floor in noise_floors(study.gathered) if floor.floor is not None]
        if study.name in ("E0", "E3", "E4") and floors:
            for floor in floors:
                assert floor.floor is not None
                said.append(
                    f"{floor.workload} {number(floor.floor.mean)} (clean runs with other seeds lie up to "
                    f"{number(floor.floor.spread, 2)} apart, "
                    f"{floor.floor.seeds} seeds)"
                )
            break
    return f"Final accuracy of the clean runs: {'; '.join(said)}." if said else ""


def _seconds(studies: dict[str, Study], stores: Path) -> float:
    """Time that all attempts took, one after the other."""
    total = 0.0
    for name in studies:
        with reading(stores / f"{name}.db") as reader:
            total += sum(attempt.seconds for attempt in reader.attempts())
    return total


def _section(study: Study, figure: tuple[str, str], images: Path) -> str:
    spec = study.gathered.spec
    file = f"{study.name}-digits.toml"
    lines = [f"## {study.name}: {spec.get('title', '')}", ""]
    for line in str(spec.get("about", "")).strip().splitlines():
        word, colon, rest = line.partition(": ")
        lines += [f"**{word}:** {rest}" if colon else line, ""]
    lines += [_size(study), ""]
    for said in FINDINGS[study.name](study):
        lines.append(f"- **Found:** {said}" if not lines[-1].startswith("- ") else f"- {said}")
    lines.append("")
    if study.name == "E0":
        lines += [markdown(tables.control_table(study)), ""]
    elif study.name == "E3-strata":
        lines += [markdown(tables.strata_table(study)), ""]
    else:
        lines += [markdown(tables.table(study)), ""]
    name, caption = figure
    if name:
        lines += [f"![{study.name}: {caption.partition('.')[0]}]({images / name})", "", f"*{caption}*", ""]
    lines += [f"Spec: [{file}](../campaigns/cluster21/{file}).", ""]
    return "\n".join(lines)


def _size(study: Study) -> str:
    gathered = study.gathered
    spec = gathered.spec
    trials = len(gathered.trials.id)
    epochs = ", ".join(str(epoch) for epoch in spec["restart"]["epochs"])
    until = {cell.until for cell in (*gathered.cells, *gathered.controls)}
    seeds = len(spec["clean"]["seeds"])
    return (
        f"{trials} restarts in {len(gathered.cells) + len(gathered.controls)} cells, from checkpoints of "
        f"epoch {epochs} of {seeds} clean "
        f"{'run' if seeds == 1 else 'runs'} per workload, followed to epoch "
        f"{', '.join(str(each) for each in sorted(until))}."
    )


def _designs(study: Study) -> str:
    rows = tables.designs_table(study)
    if len(rows) == 1:
        return "## Uniform or stratified sampling\n\nNo trial of E3-strata ended badly: nothing to compare.\n"
    lines = [
        "## Uniform or stratified sampling",
        "",
        "How many trials each way of drawing single flips needs until its 95 % interval of the rate of bad "
        "ends is this narrow: 100 simulated "
        "campaigns of each, at the strata's rates that E3-strata recorded "
        "(`ckptflip.campaign.statistics.compare_designs`). The first columns are of "
        "confidence sequences, which may be looked at all the time (*held*: how many of their intervals hold "
        "the rate), the last of designs whose "
        "number of trials is fixed beforehand. Strata in which nothing was seen count with a rate of 0.",
        "",
        markdown(rows),
        "",
    ]
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table, the head first."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _figure(study: Study, folder: Path) -> tuple[str, str]:
    """An experiment's figure, once it is written: its name, and what it shows; empty where it has none."""
    wanted = FIGURES.get(study.name, "-")
    drawn = next((each for each in _drawn(study, wanted) if each.stem.startswith(wanted)), None)
    if drawn is None:
        return "", ""
    from PIL import Image

    held = io.BytesIO()
    drawn.figure.savefig(held, format="png", dpi=_DPI)
    name = f"{study.name}-{wanted}.png"
    # A palette makes a drawing a third as large.
    Image.open(held).convert("RGB").quantize(_COLOURS).save(folder / name, optimize=True)
    return name, f"{drawn.title}. {drawn.caption}"


def _drawn(study: Study, wanted: str) -> Iterator[Drawn]:
    match wanted.partition("-")[0]:
        case "outcomes":
            yield from shares.figures(study.gathered, hits.hits(study.gathered))
        case "heatmap":
            yield from hits.figures(study.gathered, hits.hits(study.gathered))
        case "convergence":
            yield from bands.figures(study.gathered)
        case "recovery":
            yield from recovery.figures(study.gathered, study.rows)
        case "propagation":
            yield from spread.figures(study.gathered)


if __name__ == "__main__":
    raise SystemExit(main())
