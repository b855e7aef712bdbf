"""How close DLRM comes to the best AUC that the generated click log allows, and how long it takes.

    python benchmarks/dlrm.py [--samples N] [--threads N] [--output benchmarks/results/dlrm.md]

Trains the workload `dlrm` with its `small` configuration once through the log, in ten epochs, and measures it
on 50,000 rows of its own. The best AUC is that of the planted click probabilities on the same rows. To reach:
within 0.01 of it in two minutes on 2 cores, generating the log included.

One thread is the default: where other programs want the cores too, two threads wait for each other. An epoch
that takes 1.1 s on one was seen to take 54 s on two.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from processes import machine

from ckptflip.recsys import measures, recipes
from ckptflip.recsys.data.best import BestAuc
from ckptflip.recsys.measures import Comparison
from ckptflip.training import find

RESULTS = Path(__file__).parent / "results" / "dlrm.md"
EPOCHS = 10
MOST_BELOW, MOST_SECONDS = 0.01, 120


class Reached(NamedTuple):
    """What an epoch reached, and the seconds since the start; those of the log are in the first."""

    epoch: int
    seconds: float
    auc: float
    error: float
    entropy: float
    calibration: float


class Run(NamedTuple):
    """A whole run: the workload's name, a row per epoch, the best AUC, and the model against the truth."""

    name: str
    epochs: list[Reached]
    best: BestAuc
    against: Comparison


def trained(samples: int, threads: int) -> Run:
    """Train and measure."""
    options = {"samples": samples, "per_epoch": samples // EPOCHS}
    workload = find("dlrm", threads=threads, **options)
    found, began = [], time.perf_counter()
    workload.start(0)
    for epoch in range(1, EPOCHS + 1):
        workload.train_epoch()
        said = workload.evaluate()
        values = (said[name] for name in ("auc", "auc_se", "ne", "calibration"))
        found.append(Reached(epoch, time.perf_counter() - began, *values))
    recipe = recipes.made("dlrm", options)
    outputs, labels = workload.outputs()
    return Run(
        workload.name, found, recipe.best, measures.compare(labels.numpy(), recipe.truth, outputs.numpy())
    )


def page(samples: int, threads: int) -> str:
    """The results as a page."""
    run = trained(samples, threads)
    last, best, pair = run.epochs[-1], run.best.auc, run.against
    verdict = "yes" if best - last.auc <= MOST_BELOW and last.seconds <= MOST_SECONDS else "NO"
    lines = [
        "# DLRM on the generated click log", "",
        f"Made by `python benchmarks/dlrm.py` on {machine(numpy=np.__version__, torch=torch.__version__)}.",
        f"`{run.name}`, seed 0, PyTorch threads: {threads}.",
        f"{samples:,} rows, each seen once, and 50,000 test rows. Seconds count from the start: those of",
        "making the log and of all evaluations are in them.", "",
        f"The best AUC that any model can expect on the test rows is {best:.4f}; chance moves it by",
        f"{run.best.spread:.4f} (a standard deviation). With the labels as they were drawn, the planted",
        f"click probabilities have {pair.first:.4f}, and DLRM has {-pair.difference:.4f} less (95 % interval",
        f"{-pair.high:.4f} to {-pair.low:.4f}, paired).", "",
        f"**{best - last.auc:.4f} below the best AUC after {last.seconds:.0f} s.**",
        f"To reach: at most {MOST_BELOW} in {MOST_SECONDS} s. Reached: {verdict}.", "",
        "| epoch | seconds | AUC | below the best | standard error | normalised entropy | calibration |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in run.epochs:
        lines.append(
            f"| {row.epoch} | {row.seconds:.1f} | {row.auc:.4f} | {best - row.auc:.4f} | {row.error:.4f} "
            f"| {row.entropy:.4f} | {row.calibration:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    written = page(given.samples, given.threads)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(written, "utf-8")
    print(written)


if __name__ == "__main__":
    main()
