"""How much of the AUC that faults in weights cost is recovered by clipping, way by way, on the same faults.

    python benchmarks/clipping_recovery.py [--faults N] [--output benchmarks/results/clipping_recovery.md]

DLRM and DeepFM, trained for four epochs on the generated click log; every bit of every weight flips with the
given probability. For each draw of faults the AUC on 20,000 other rows is taken without clipping and with
each kind; bounds are learnt from 40,960 training rows. The difference to the Terrorch study's ±100 is paired
over draws, with a 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from processes import machine
from scipy import stats

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.protect import clipping
from ckptflip.protect.clipping import Bounds
from ckptflip.training import find

RESULTS = Path(__file__).parent / "results" / "clipping_recovery.md"
RATES = (1e-5, 1e-4, 1e-3)
EPOCHS, CALIBRATION = 4, 40_960
STUDY = "±100"


def kinds(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Bounds]:
    """What is compared, by name."""
    batches = list(zip(*(part[:CALIBRATION].split(4096) for part in inputs), strict=True))
    ranges = clipping.calibrate(model, batches)
    shares = clipping.calibrate(model, batches, rule="percentile:99.99")
    layers = [bound.layer for bound in ranges.layers]
    without = [name for name in layers if name not in ("emb_l", "linear_emb")]
    return {
        STUDY: clipping.fixed(model, 100),
        "±6": clipping.fixed(model, 6),
        "±100 on all layers": clipping.fixed(model, 100, layers=layers),
        "range, bound": ranges.handling("bound", "zero"),
        "range, zero": ranges,
        "range, mean": ranges.handling("mean", "mean"),
        "range, zero, without the tables": clipping.calibrate(model, batches, layers=without),
        "99.99 %, zero": shares,
    }


def measured(workload: Any, chosen: dict[str, Bounds], rate: float, faults: int) -> dict[str, NDArray[Any]]:
    """The AUC of each draw of faults, without clipping and with each kind."""
    found: dict[str, list[float]] = {"none": [], **{name: [] for name in chosen}}
    for seed in range(faults):
        with live.faults(workload.model, Policy(ber=rate), seed=seed):
            found["none"].append(workload.evaluate()["auc"])
            for name, bounds in chosen.items():
                with clipping.clipped(workload.model, bounds):
                    found[name].append(workload.evaluate()["auc"])
    return {name: np.array(values) for name, values in found.items()}


def rows(name: str, faults: int) -> list[str]:
    """The table of one model."""
    workload = find(name, samples=400_000, per_epoch=100_000, test=20_000, threads=1)
    workload.start(0)
    for _ in range(EPOCHS):
        workload.train_epoch()
    chosen = kinds(workload.model, workload.inputs())
    clean, error = (workload.evaluate()[key] for key in ("auc", "auc_se"))
    unfaulty = {}
    for kind, bounds in chosen.items():
        with clipping.clipped(workload.model, bounds):
            unfaulty[kind] = workload.evaluate()["auc"] - clean
    heads = [f"BER {rate:g}: AUC | recovered | against ±100" for rate in RATES]
    lines = [
        f"## {name}",
        "",
        f"Clean AUC {clean:.4f}, standard error {error:.4f}.",
        "",
        f"| clipping | clean AUC changes by | {' | '.join(heads)} |",
        f"|---|---|{'---|' * 3 * len(RATES)}",
    ]
    results = [measured(workload, chosen, rate, faults) for rate in RATES]
    for kind in ("none", *chosen):
        cells = [f"{unfaulty[kind]:+.1e}" if kind in unfaulty else "–"]
        for found in results:
            lost = clean - found["none"].mean()
            share = (found[kind].mean() - found["none"].mean()) / lost
            cells += [f"{found[kind].mean():.4f}", f"{100 * share:.1f} %" if kind != "none" else "–"]
            cells.append(_paired(found[kind] - found[STUDY]) if kind != STUDY else "–")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return [*lines, ""]


def _paired(differences: NDArray[Any]) -> str:
    half = stats.t.ppf(0.975, differences.size - 1) * stats.sem(differences)
    return f"{differences.mean():+.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that some outputs are NaN is the point
    versions = {name: metadata.version(name) for name in ("numpy", "torch")}
    lines = [
        "# AUC recovered by activation clipping",
        "",
        "Made by `python benchmarks/clipping_recovery.py` on",
        f"{machine(**versions)}.",
        f"{args.faults} draws of faults for each rate, the same for every kind. *Recovered* is the",
        "share of the AUC that the faults cost without clipping, in the mean. ±100 and ±6 are the Terrorch",
        "study's: linear layers but the last, the bound for what lies beyond it, 0 for NaN.",
        "",
        *rows("dlrm", args.faults),
        *rows("deepfm", args.faults),
    ]
    text = "\n".join(lines)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
