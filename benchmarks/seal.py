"""Sealing and verifying a 2 GiB checkpoint against b2sum on the same file.

    python benchmarks/seal.py [--folder DIR] [--rounds N] [--output benchmarks/results/seal.md]

Makes checkpoints of 256 MiB and 2 GiB in DIR, runs all commands in turn, and writes medians, ratios to b2sum
and peak memory. b2sum is what a user without a tool would run; it hashes on one thread and finds no more than
that something changed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from processes import GIB, Spent, into_readme, machine, program, timed, with_bytecode

RESULTS = Path(__file__).parent / "results" / "seal.md"
PAGE = Path(__file__).parent.parent / "docs" / "seals.md"
SIZES = {"256 MiB": GIB // 4, "2 GiB": 2 * GIB}
LARGE = "2 GiB"
TARGETS = {"seal": 1.5, "verify": 1.5, "seal --repair": 4.0}


class Case(NamedTuple):
    """A command: its name in the table, its threads, what it runs on a checkpoint and its seals."""

    name: str
    threads: int
    command: list[str]


def cases(path: Path) -> list[Case]:
    """All commands on one checkpoint. Those that write a seal replace their own."""
    found = [Case("b2sum", 1, ["b2sum", str(path)])]
    for threads in (1, 2):
        run = ["--workers", str(threads)]
        plain, mending = f"{path}.{threads}.seal", f"{path}.{threads}.repair.seal"
        found += [
            Case("seal", threads, [*program(), "seal", str(path), "-o", plain, "--overwrite", *run]),
            Case("verify", threads, [*program(), "verify", str(path), "--seal", plain, *run]),
            Case(
                "seal --repair",
                threads,
                [*program(), "seal", str(path), "-o", mending, "--overwrite", "--repair=5%", *run],
            ),
        ]
    return found


def write(path: Path, size: int) -> None:
    """A checkpoint of one tensor of random numbers."""
    data = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(size // 4,))
    rng = np.random.default_rng(0)
    step = 1 << 24
    for start in range(0, data.size, step):
        data[start : start + step] = rng.standard_normal(min(step, data.size - start), np.float32)
    data.flush()


def measure(folder: Path, rounds: int) -> dict[str, dict[tuple[str, int], list[Spent]]]:
    """All commands in turn; the small checkpoint once, for its memory."""
    found: dict[str, dict[tuple[str, int], list[Spent]]] = {}
    for label, size in SIZES.items():
        path = folder / f"{label.replace(' ', '')}.npy"
        write(path, size)
        every = cases(path)
        spent = found[label] = {(c.name, c.threads): [] for c in every}
        timed(["cat", str(path)])
        for _ in range(rounds if label == LARGE else 1):
            for case in every:
                spent[case.name, case.threads].append(timed(case.command))
        path.unlink()
    return found


def report(found: dict[str, dict[tuple[str, int], list[Spent]]], rounds: int) -> str:
    """The results as Markdown."""
    large, small = found[LARGE], found["256 MiB"]
    base = large["b2sum", 1]
    rows = []
    for (name, threads), spent in large.items():
        # Each round against b2sum in the same round: what else the machine did hits both.
        ratio = statistics.median(s.seconds / b.seconds for s, b in zip(spent, base, strict=True))
        cells = (
            name,
            str(threads),
            f"{statistics.median(s.seconds for s in spent):.2f}",
            f"{ratio:.2f}",
            f"{TARGETS[name]:.1f}" if name in TARGETS else "–",
            f"{max(s.peak for s in small[name, threads]) / 1e6:.0f}",
            f"{max(s.peak for s in spent) / 1e6:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    titles = ("command", "threads", "s", "b2sum = 1", "to reach", "MB, 256 MiB", "MB, 2 GiB")
    return "\n".join(
        [
            "# Seals against b2sum",
            "",
            f"Made by `python benchmarks/seal.py` on {machine(numpy=np.__version__)}.",
            "Whole processes, start and imports included, on a .npy file of 2 GiB in the page cache;",
            f"medians of {rounds} interleaved rounds, ratios within each round. b2sum hashes on one thread.",
            "`--repair` adds shares of 5 % of the size. The last columns are peak memory for a small and the",
            "large file.",
            "",
            f"| {' | '.join(titles)} |",
            "|---" * len(titles) + "|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measure all commands and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with_bytecode()
    folder = Path(tempfile.mkdtemp(prefix="ckptflip-bench-", dir=arguments.folder))
    try:
        text = report(measure(folder, arguments.rounds), arguments.rounds)
    finally:
        shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, "utf-8")
    if arguments.output == RESULTS:
        into_readme("seal", text, 7, PAGE)
    print(arguments.output)


if __name__ == "__main__":
    main()
