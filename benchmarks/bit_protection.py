"""What guarding chosen bits of a model takes: memory, encoding, and scrubs with and without flips.

    python benchmarks/bit_protection.py [--rounds N] [--output benchmarks/results/bit_protection.md]

ResNet18 (11.2 M parameters, fp32), one thread; medians of the processor's time, the codes in turn. A scrub
with flips finds, and where the code can corrects, so many critical bits. Beside them the least that reading
the weights takes: the sum of each tensor by numpy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from processes import machine

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.live.torch_tensors import TorchTarget
from ckptflip.protect.bits import CODES, Guard, guard
from ckptflip.vision.torch_models import resnet18

RESULTS = Path(__file__).parent / "results" / "bit_protection.md"
BITS = ("sign,exponent", "critical", "all")
FLIPS = 100


def spent(work: Callable[[], object]) -> float:
    """Milliseconds of the processor's time."""
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def measured(model: torch.nn.Module, rounds: int) -> list[tuple[str, str, Guard, list[float]]]:
    """The guard of each choice, and milliseconds to encode, to scrub without and with flips."""
    target = TorchTarget(model)
    armed = live.Armed(target, Policy(bits="critical", count=FLIPS))
    rows = [(bits, code, guard(model, bits, code)) for bits in BITS for code in CODES]
    found: list[list[list[float]]] = [[[], [], []] for _ in rows]
    for i in range(rounds):
        for times, (_, _, made) in zip(found, rows, strict=True):
            times[0].append(spent(made.refresh))
            times[1].append(spent(made.scrub))
            record = armed.fire(i)
            times[2].append(spent(made.scrub))
            live.undo(target, record)
    return [
        (*row, [statistics.median(each) for each in times]) for row, times in zip(rows, found, strict=True)
    ]


def report(rounds: int) -> str:
    torch.manual_seed(0)
    model = resnet18()
    arrays = [tensor.numpy() for tensor in model.state_dict().values()]
    reading = statistics.median(spent(lambda: [np.sum(array) for array in arrays]) for _ in range(rounds))
    versions = {name: metadata.version(name) for name in ("numpy", "torch")}
    lines = [
        "# Guarded bits",
        "",
        f"Made by `python benchmarks/bit_protection.py` on {machine(**versions)}.",
        f"ResNet18, 11.2 M parameters in fp32, one thread, groups of 64; medians of {rounds} rounds of the "
        "processor's time.",
        f"Reading all weights once (`numpy.sum`) takes {reading:.1f} ms.",
        "",
        f"| bits | code | memory | encode (ms) | scrub (ms) | scrub, {FLIPS} flips (ms) |",
        "|---|---|---|---|---|---|",
    ]
    for bits, code, made, (encode, clean, faulty) in measured(model, rounds):
        lines.append(
            f"| {bits} | {code} | {100 * made.cost.share:.2f} % | {encode:.1f} | {clean:.1f} | {faulty:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = report(args.rounds)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
