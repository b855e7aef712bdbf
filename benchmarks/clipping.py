"""What activation clipping adds to the time of inference, for the recommendation models.

    python benchmarks/clipping.py [--rounds N] [--output benchmarks/results/clipping.md]

Forward passes without gradients on the generated click log, one thread, by the processor's time. In each
round every way does the same passes in turn, each on its own copy of the model, the order rotating; what is
shown is the median of the rounds' ratios to the plain models, of which there are two. To reach: 3 % or less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from processes import machine

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.protect import clipping
from ckptflip.protect.clipping import torch_values
from ckptflip.protect.native import kernels
from ckptflip.training import find

RESULTS = Path(__file__).parent / "results" / "clipping.md"
BATCHES = (128, 1024, 4096)
# The configuration of the reference is trained with batches of 128, its larger one with 2048.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("dlrm", {}),
    ("dlrm", {"config": "kaggle"}),
    *((name, {}) for name in ("wide-deep", "deepfm", "fm", "dcn")),
]
WAYS = ("plain", "plain again", "clipped", "clipped, faulty weights", "without the kernel", "±100")
BER = 1e-4
# Seconds of passes in one measurement, about.
SPAN = 0.012


def copies(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.nn.Module]:
    """A copy of the model for each way."""
    bounds = clipping.calibrate(model, [inputs])
    found = {way: copy.deepcopy(model) for way in WAYS}
    live.faults(found["clipped, faulty weights"], Policy(ber=BER), seed=1).__enter__()
    clipping.clip(found["clipped"], bounds)
    clipping.clip(found["clipped, faulty weights"], bounds)
    with mock.patch.object(torch_values, "kernels", lambda: None):
        clipping.clip(found["without the kernel"], bounds)
    if sum(isinstance(module, torch.nn.Linear) for module in model.modules()) > 1:
        clipping.clip(found["±100"], clipping.fixed(model, 100))
    else:
        del found["±100"]
    return found


def ratios(
    models: dict[str, torch.nn.Module], inputs: tuple[torch.Tensor, ...], rounds: int
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the plain model, and each way's share of it, less 1."""
    ways = list(models)
    for model in models.values():
        model(*inputs)
    repeat = max(1, round(SPAN / max(_spent(models["plain"], inputs, 3), 1e-6)))
    found: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds):
        turn = i % len(ways)
        for way in ways[turn:] + ways[:turn]:
            found[way].append(_spent(models[way], inputs, repeat))
    plain = [(a + b) / 2 for a, b in zip(found["plain"], found["plain again"], strict=True)]
    shares = {
        way: statistics.median(t / base for t, base in zip(found[way], plain, strict=True)) - 1
        for way in ways[1:]
    }
    return 1e3 * statistics.median(plain), shares


def _spent(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], repeat: int) -> float:
    began = time.process_time()
    for _ in range(repeat):
        model(*inputs)
    return (time.process_time() - began) / repeat


def report(rounds: int) -> str:
    ways = [*WAYS[2:], "plain again"]
    lines = [
        "# Time of activation clipping",
        "",
        "Made by `python benchmarks/clipping.py` on",
        f"{machine(torch=metadata.version('torch'))}.",
        f"One thread; medians of {rounds} rounds. *Clipped* has calibrated bounds on all layers with",
        "parameters, tables among them, and counts; *±100* is the Terrorch study's, on linear layers but the",
        "last. Both do ReLUs in the same pass and in place, which saves time. The faulty weights have a bit",
        f"error rate of {BER:g}. *Plain again* is the plain model against itself: what nothing looks like.",
        "",
        f"| model | batch | plain (ms) | {' | '.join(ways)} |",
        f"|---|---|---|{'---|' * len(ways)}",
    ]
    for name, options in MODELS:
        workload = find(name, samples=5000, per_epoch=5000, test=4096, threads=1, **options)
        workload.start(0)
        model = workload.model.eval()
        inputs = workload.inputs()
        label = f"{name} {options['config']}" if options else name
        models = copies(model, inputs)
        for batch in BATCHES:
            spent, found = ratios(models, tuple(part[:batch] for part in inputs), rounds)
            shown = [f"{100 * found[way]:+.1f} %" if way in found else "–" for way in ways]
            lines.append(f"| {label} | {batch} | {spent:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if kernels() is None:
        parser.error("the compiled kernels were not built")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    text = report(args.rounds)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
