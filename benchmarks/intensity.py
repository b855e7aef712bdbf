"""What checking costs, uniformly and by the choice for each layer: DLRM's MLPs, CNN shapes, square products.

    python benchmarks/intensity.py [--device cpu|cuda] [--output benchmarks/results/intensity.md]

Every scheme in every layer, and the guided choice, against the same MLP unchecked: in turn in one process,
medians; on the CPU with one thread by the thread's processor time, so that other programs do not count. The
choice is made first, from a calibration of its own, as `protect` makes it. Twice: among all schemes, and
among those that keep PyTorch's product and its bits (the tile scheme brings a faster product of its own,
which hides what its check costs). To reach over DLRM's MLPs at batch 1 … 4096: guided never slower than the
best single scheme by more than 3 %, and 1.3 times less overhead than the worst.

glibc gives large blocks back to the system and takes them anew; the page faults of that fell on whichever way
ran, up to a quarter of a batch of 4096. The script starts itself once more with an allocator that keeps them.

Detection: single flips of any bit of a result of the product, and of a weight, in each of DLRM's layers. A
flip is effective if it changes the results.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from processes import keep_memory, machine

from ckptflip.protect.intensity import SCHEMES, CheckedLinear, protect, schemes
from ckptflip.protect.intensity.calibration import BUCKETS, timed
from ckptflip.protect.intensity.model import Protected
from ckptflip.protect.intensity.weights import Weights, prepared
from ckptflip.protect.native import kernels

RESULTS = Path(__file__).parent / "results" / "intensity.md"
MLPS = {"bottom 13-512-256-64": (13, 512, 256, 64), "top 512-512-256-1": (512, 512, 256, 1)}
NAMES = ("global", "row", "tile", "replication")
STOCK = ("global", "row", "replication")
MOST_SLOWER, LEAST_FACTOR = 0.03, 1.3
# Convolutions at 224² as products, one image: (output pixels, output channels, input channels · window).
CNN = {
    "ResNet-50 conv1": (12544, 64, 147), "ResNet-50 2.x 1×1": (3136, 64, 256),
    "ResNet-50 2.x 3×3": (3136, 64, 576), "ResNet-50 3.x 3×3": (784, 128, 1152),
    "ResNet-50 4.x 1×1": (196, 1024, 256), "ResNet-50 5.x 3×3": (49, 512, 4608),
    "VGG-16 conv1_1": (50176, 64, 27), "AlexNet conv2": (729, 192, 1600),
}  # fmt: skip
SQUARES = (32, 64, 128, 256, 512, 1024, 2048)
ROUNDS, FLIPS = 21, 400


class Timed(NamedTuple):
    """Seconds per call by scheme, `none` and `guided` among them."""

    batch: int
    seconds: dict[str, float]

    def overhead(self, name: str) -> float:
        """Beyond the unchecked model, as a part of it."""
        return self.seconds[name] / self.seconds["none"] - 1


def mlp(sizes: tuple[int, ...], device: torch.device) -> torch.nn.Module:
    """An MLP of the open-source DLRM, its initialisation."""
    drawn = torch.Generator().manual_seed(0)
    parts: list[torch.nn.Module] = []
    for k, n in pairwise(sizes):
        layer = torch.nn.Linear(k, n)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / (n + k)) ** 0.5, generator=drawn)
            layer.bias.normal_(0, (1 / n) ** 0.5, generator=drawn)
        parts += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts).eval().to(device)


def uniform(model: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """Every linear layer with the same scheme."""
    return torch.nn.Sequential(
        *(CheckedLinear(m, scheme) if isinstance(m, torch.nn.Linear) else m for m in model.children())
    )


def again(model: torch.nn.Module, guided: Protected) -> torch.nn.Module:
    """The schemes of a protected model on the weights of another: where weights lie in memory counts, too."""
    pairs = zip(model.children(), guided.model.children(), strict=True)
    return torch.nn.Sequential(
        *(CheckedLinear(m, g.schemes) if isinstance(g, CheckedLinear) else m for m, g in pairs)
    )


def compared(
    sizes: tuple[int, ...], names: tuple[str, ...], device: torch.device, folder: str
) -> tuple[Protected, list[Timed]]:
    """An MLP with every scheme and guided, at every batch."""
    plain = mlp(sizes, device)
    example = torch.rand(1, sizes[0], device=device)
    guided = protect(plain, example, batches=BUCKETS, schemes=names, cache_folder=folder)
    models = {"none": plain, **{name: uniform(plain, name) for name in names}, "guided": again(plain, guided)}
    rows = []
    for batch in BUCKETS:
        x = torch.rand(batch, sizes[0], device=device)
        calls = {name: _call(model, x) for name, model in models.items()}
        rows.append(Timed(batch, timed(calls, device, ROUNDS)))
    return guided, rows


def _call(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: model(x)


def shape_rows(shapes: dict[str, tuple[int, int, int]], device: torch.device) -> list[tuple[str, Timed]]:
    """Single layers with every scheme."""
    found = []
    for name, (m, n, k) in shapes.items():
        layer = torch.nn.Linear(k, n, bias=False).to(device)
        x = torch.rand(m, k, device=device)
        calls = {"none": _call(layer, x), **{s: _call(CheckedLinear(layer, s), x) for s in available(device)}}
        found.append((name, Timed(m, timed(calls, device, ROUNDS))))
    return found


def available(device: torch.device) -> tuple[str, ...]:
    """Schemes that can run here."""
    weights = prepared(torch.ones(2, 2, device=device), None)
    return tuple(name for name in NAMES if not SCHEMES[name].unfit(weights))


class Found(NamedTuple):
    """Shares of effective flips that were found: in results, and in weights."""

    results: float
    weights: float


def detection(weights: Weights, name: str, rows: int, seed: int) -> Found:
    """Flip a random bit of a random result of the product, or of a weight, and ask the scheme."""
    drawn = np.random.default_rng(seed)
    x = torch.from_numpy(drawn.standard_normal((rows, weights.inputs)).astype(np.float32))
    scheme, counts = SCHEMES[name], {"results": [0, 0], "weights": [0, 0]}
    run = scheme.prepare(weights)
    for place, count in counts.items():
        for _ in range(FLIPS):
            effective, found = (_in_results if place == "results" else _in_weights)(
                weights, name, run, x, drawn
            )
            count[0] += effective
            count[1] += effective and found
    return Found(*(found / max(effective, 1) for effective, found in counts.values()))


def _in_results(
    weights: Weights, name: str, run: Callable, x: torch.Tensor, drawn: np.random.Generator
) -> tuple[bool, bool]:
    row, column = int(drawn.integers(len(x))), int(drawn.integers(weights.outputs))
    mask, calls = np.uint32(1 << int(drawn.integers(32))), []
    product = schemes.linear

    def faulty(*arguments: torch.Tensor) -> torch.Tensor:
        out = product(*arguments)
        if not calls:
            out.numpy().view(np.uint32)[row, column] ^= mask
        calls.append(1)
        return out

    if name == "tile" and weights.fast:
        weights.fast.suffer(row, column, int(mask))
    schemes.linear = faulty
    try:
        out, holds = run(x)
        return True, not holds and SCHEMES[name].judge(weights, x, out).faulty
    finally:
        schemes.linear = product
        if weights.fast:
            weights.fast.suffer(-1, 0, 0)


def _in_weights(
    weights: Weights, name: str, run: Callable, x: torch.Tensor, drawn: np.random.Generator
) -> tuple[bool, bool]:
    packed = name == "tile" and weights.fast
    memory = (
        (weights.fast.packed if packed and weights.fast else weights.weight)
        .numpy()
        .view(np.uint32)
        .reshape(-1)
    )
    used = np.flatnonzero(memory)
    at, mask = int(drawn.choice(used)), np.uint32(1 << int(drawn.integers(32)))
    clean = run(x)[0]
    memory[at] ^= mask
    out, holds = run(x)
    found = not holds and SCHEMES[name].judge(weights, x, out).faulty
    memory[at] ^= mask
    return not torch.equal(out, clean), found


def percent(value: float) -> str:
    """An overhead."""
    return f"{value:+.1%}"


def factor(worse: float, better: float) -> str:
    """How many times less overhead; where nothing is left of it there is no such number."""
    return "none left" if better <= 0 < worse else f"{worse / better:.1f}×" if better > 0 else "–"


def mlp_tables(results: dict[str, tuple[Protected, list[Timed]]], names: tuple[str, ...]) -> list[str]:
    """By batch, MLP by MLP."""
    lines = []
    for title, (_, rows) in results.items():
        head = ["batch", "unchecked µs", *names, "guided", "less than the worst", "slower than the best"]
        lines += [f"**{title}**", "", f"| {' | '.join(head)} |"]
        lines += ["|---|" + "---|" * (len(names) + 4)]
        for row in rows:
            over = [row.overhead(name) for name in names]
            slower = row.seconds["guided"] / min(row.seconds[name] for name in names) - 1
            lines += [
                f"| {row.batch} | {row.seconds['none'] * 1e6:.1f} | {' | '.join(map(percent, over))} "
                f"| {percent(row.overhead('guided'))} | {factor(max(over), row.overhead('guided'))} "
                f"| {percent(slower)} |"
            ]
        lines += [""]
    return lines


def totals(
    results: dict[str, tuple[Protected, list[Timed]]], names: tuple[str, ...]
) -> tuple[list[str], float, float]:
    """Mean overhead over batches and MLPs, of equal weight; the factor; the most that guided is slower."""
    rows = [row for _, found in results.values() for row in found]
    mean = {name: float(np.mean([row.overhead(name) for row in rows])) for name in (*names, "guided")}
    worst = max(mean[name] for name in names)
    slower = max(row.seconds["guided"] / min(row.seconds[name] for name in names) - 1 for row in rows)
    lines = ["| | mean overhead | guided has less by |", "|---|---|---|"]
    lines += [
        f"| {name} everywhere | {percent(mean[name])} | {factor(mean[name], mean['guided'])} |"
        for name in names
    ]
    lines += [f"| guided | {percent(mean['guided'])} | |", ""]
    return lines, float("inf") if mean["guided"] <= 0 else worst / mean["guided"], slower


def page(device: torch.device, folder: str) -> str:
    """The results as a page."""
    names = available(device)
    stock = tuple(name for name in STOCK if name in names)
    sections: list[str] = []
    where = machine(numpy=np.__version__, torch=torch.__version__)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else where
    for title, chosen in (("All schemes", names), ("Schemes that keep PyTorch's product", stock)):
        results = {name: compared(sizes, chosen, device, folder) for name, sizes in MLPS.items()}
        total, less, slower = totals(results, chosen)
        reached = "yes" if less >= LEAST_FACTOR and slower <= MOST_SLOWER else "NO"
        said = (
            "no overhead is left"
            if less == float("inf")
            else f"{less:.1f} times less overhead than the worst"
        )
        sections += [
            f"## {title}", "",
            f"Guided: {said}; slower than the best single scheme by at most {slower:+.1%}. To reach: "
            f"{LEAST_FACTOR} times, {MOST_SLOWER:.0%}. Reached: {reached}.", "",
            *total, *mlp_tables(results, chosen),
        ]  # fmt: skip
        sections += ["<details><summary>The choices, and why</summary>", "", "```text"]
        sections += [line for guided, _ in results.values() for line in guided.table().splitlines()]
        sections += ["```", "", "</details>", ""]
    if device.type == "cpu":
        sections += detection_table(names)
    sections += single_table("CNN shapes at 224², one image", CNN, device)
    sections += single_table("Square products", {f"{n}³": (n, n, n) for n in SQUARES}, device)
    compiled = kernels()
    built = compiled.isa() if compiled else "none"
    return "\n".join([
        "# Checks of linear layers, uniform and guided", "",
        f"Made by `python benchmarks/intensity.py` on {where}.",
        f"float32, threads: {torch.get_num_threads()}; compiled kernels: {built}. In turn, medians of",
        f"{ROUNDS} rounds; the allocator keeps freed memory. All models have the same weights in memory, but",
        "tile and guided have packed copies of their own. Overheads are against the same model unchecked;",
        "below zero means faster than PyTorch's own layer. The part on GPUs is the same script with",
        "`--device cuda`; it has not been run: no GPU was at hand.", "",
        *sections,
    ])  # fmt: skip


def detection_table(names: tuple[str, ...]) -> list[str]:
    """Shares of effective single flips that each scheme finds in DLRM's layers."""
    lines = [
        "## Detection", "",
        f"{FLIPS} flips of one bit each, drawn from all 32, per layer, batch and place; normal inputs.",
        "Smallest: the smallest change of a result that is found for certain, median over rows, against the",
        "results' standard deviation. What is missed in results is smaller.", "",
        f"| layer (k-n) | batch | {' | '.join(f'{n}: results, weights, smallest' for n in names)} |",
        "|---|---|" + "---|" * len(names),
    ]  # fmt: skip
    for sizes in MLPS.values():
        for index, (k, n) in enumerate(pairwise(sizes)):
            layer = mlp(sizes, torch.device("cpu"))[2 * index]
            for batch in (1, 64):
                weights = prepared(layer.weight.detach().clone(), layer.bias.detach().clone())
                x = torch.randn(batch, k)
                spread = float((x @ weights.weight.T).std(correction=0)) or 1.0
                cells = []
                for name in names:
                    found = detection(weights, name, batch, seed=k * n + batch)
                    least = float(SCHEMES[name].least(weights, x).median())
                    cells.append(f"{found.results:.1%}, {found.weights:.1%}, {least / spread:.1g} σ")
                lines.append(f"| {k}-{n} | {batch} | {' | '.join(cells)} |")
    return [*lines, ""]


def single_table(title: str, shapes: dict[str, tuple[int, int, int]], device: torch.device) -> list[str]:
    """Single layers."""
    names = available(device)
    lines = [f"## {title}", "", f"| product | m | n | k | unchecked µs | {' | '.join(names)} | cheapest |"]
    lines += ["|---|" + "---|" * (len(names) + 5)]
    for name, row in shape_rows(shapes, device):
        m, n, k = shapes[name]
        over = {scheme: row.overhead(scheme) for scheme in names}
        lines += [
            f"| {name} | {m} | {n} | {k} | {row.seconds['none'] * 1e6:.0f} "
            f"| {' | '.join(map(percent, over.values()))} | {min(over, key=over.__getitem__)} |"
        ]
    return [*lines, ""]


def main() -> None:
    """Measure, print and write."""
    keep_memory()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="", help="a folder with measured times to start from")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    written = page(torch.device(given.device), given.cache or tempfile.mkdtemp())
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(written, "utf-8")
    print(written)


if __name__ == "__main__":
    main()
