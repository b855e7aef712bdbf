"""Embedding bags with checks beside the stock operator: what they cost, and what they find.

    python benchmarks/abft_bags.py [--rounds N] [--rows N] [--dims 32,64] [--output FILE]

Tables of 4,000,000 rows in row-wise int8 and int4, and of 10,000 that the caches hold; bags of 100 random
rows, one thread. Schemes take turns with the stock operator, each call with fresh ids; medians. Speed is
measured on random bytes, what is found on tables that were quantised from floats, with one fault at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from processes import machine

from ckptflip.protect.embeddings import protect_table
from ckptflip.protect.embeddings.look_up import ArithmeticFault, aten_bags, bags_of, look_up
from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag
from ckptflip.protect.embeddings.rows import Row
from ckptflip.protect.embeddings.unfused import InRow, Published
from ckptflip.protect.native import kernels
from ckptflip.recsys.tables import quantise

RESULTS = Path(__file__).parent / "results" / "abft_bags.md"
POOLING = 100
SMALL = 10_000
BATCHES = (10, 64, 256)
SCHEMES = ("fused", "in-row, plain", "published, plain", "running twice")
Cell = tuple[str, int, int, dict[str, float]]
Call = Callable[[torch.Tensor, torch.Tensor, int], object]


def two_tables(layout: str, dim: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A table as ATen packs it and a protected one, in the same memory: neither has the better pages.

    The bytes are random, from 32 to 95, so that scales and biases are floats of ordinary size. No row fits
    its check bytes then; every kernel here takes the same time for rows that do and rows that do not.
    """
    row = Row(layout, dim)
    memory = torch.randint(32, 96, (rows * row.width,), dtype=torch.uint8)
    stored = memory[: rows * row.stored_width].view(rows, row.stored_width)
    return stored, memory.view(rows, row.width)


def schemes(layout: str, stored: torch.Tensor, protected: torch.Tensor) -> dict[str, Call]:
    """What takes turns with the stock operator, which comes first."""
    operator = aten_bags(layout)

    def stock(ids: torch.Tensor, offsets: torch.Tensor, count: int) -> torch.Tensor:
        return operator(stored, ids, offsets, False, 0, False, None)

    def twice(ids: torch.Tensor, offsets: torch.Tensor, count: int) -> bool:
        return torch.equal(stock(ids, offsets, count), stock(ids, offsets, count))

    bag = ProtectedEmbeddingBag(protected, layout, on_error="count")
    calls: dict[str, Call] = {"stock": stock, "fused": lambda ids, offsets, count: bag(ids, offsets)}
    if layout == "int8":
        calls["in-row, plain"] = InRow(protected)
        calls["published, plain"] = Published(stored)
    return {**calls, "running twice": twice}


def timings(calls: dict[str, Call], rows: int, batch: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds: of the stock operator, and of each scheme in turns with it.

    Each scheme takes turns with the stock operator alone: among several, the table that more of them read
    would have the warmer caches. Seconds of schemes are scaled to the first pair's stock operator.
    """
    offsets = torch.arange(0, batch * POOLING, POOLING)
    stock, found = 0.0, {}
    for name, call in calls.items():
        if name == "stock":
            continue
        both: dict[str, list[float]] = {"stock": [], name: []}
        for turn in range(rounds + 3):
            for which, each in (("stock", calls["stock"]), (name, call)):
                ids = torch.randint(0, rows, (batch * POOLING,))
                start = time.thread_time()
                each(ids, offsets, batch)
                if turn >= 3:
                    both[which].append(time.thread_time() - start)
        middle = {which: statistics.median(times) for which, times in both.items()}
        stock = stock or middle["stock"]
        found[name] = middle[name] / middle["stock"] * stock
    return {"stock": stock, **found}


def speed(rows: int, dims: list[int], rounds: int) -> Iterator[Cell]:
    """All cells: layout, dimension, batch, seconds of each scheme."""
    torch.manual_seed(0)
    for layout in ("int8", "int4"):
        for dim in dims:
            calls = schemes(layout, *two_tables(layout, dim, rows))
            for batch in BATCHES:
                yield layout, dim, batch, timings(calls, rows, batch, max(rounds // batch, 15))


def tables_found(dim: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The tables of the study of what is found, float32[rows, dim]."""
    rows = 5000
    return {
        "zero-mean": random.uniform(-1, 1, (rows, dim)).astype(np.float32),
        "one-signed": random.random((rows, dim)).astype(np.float32),
        "large mean": (100 + random.standard_normal((rows, dim))).astype(np.float32),
    }


# Parts of the kernel's arithmetic: see `ArithmeticFault`.
REGISTERS = {
    "register: sum": ("sum",),
    "register: scale or bias": ("scale", "bias"),
    "register: unpacked code": ("value",),
    "register: the check's own sums": ("plain", "weighted"),
}
TARGETS = ("code, high 4 bits", "code, low 4 bits", "scale", "bias", "wrong row")


class Study:
    """One table and one flip at a time: of bags that read the row, how many are found by each scheme.

    Args:
        values: float32[rows, D].
        seed: of all draws.
    """

    def __init__(self, values: np.ndarray, seed: int) -> None:
        self.dim, self.random = values.shape[1], np.random.default_rng(seed)
        self.stored = torch.from_numpy(quantise(values, "int8"))
        self.protected = protect_table(self.stored, "int8")
        self.bag = ProtectedEmbeddingBag(self.protected, "int8", on_error="count")
        self.schemes: dict[str, Call] = {
            "in-row, plain": InRow(self.protected),
            "in-row, sound": InRow(self.protected, sound=True),
            "published, plain": Published(self.stored),
        }

    def ids(self, bags: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random bags: ids and offsets."""
        ids = torch.from_numpy(self.random.integers(0, self.stored.shape[0], bags * POOLING))
        return ids, torch.arange(0, bags * POOLING, POOLING)

    def verdicts(self, ids: torch.Tensor, offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each scheme says of each bag."""
        self.bag(ids, offsets)
        found = {"fused": self.bag.verdict != 0}
        return found | {n: call(ids, offsets, offsets.numel())[1] for n, call in self.schemes.items()}  # type: ignore[index]

    def false_alarms(self, bags: int) -> dict[str, int]:
        """Of so many bags of the sound table, how many are flagged."""
        total: dict[str, int] = {}
        for _ in range(0, bags, 1000):
            for name, flagged in self.verdicts(*self.ids(min(bags, 1000))).items():
                total[name] = total.get(name, 0) + int(flagged.sum())
        return total

    def fault(self, target: str, row: int) -> None:
        """Put the same fault into both tables."""
        if target == "wrong row":
            other = (row + 1 + int(self.random.integers(self.stored.shape[0] - 1))) % self.stored.shape[0]
            self.stored[row], self.protected[row] = self.stored[other].clone(), self.protected[other].clone()
            return
        if target.startswith("code"):
            byte = int(self.random.integers(self.dim))
            bit = int(self.random.integers(4)) + (4 if "high" in target else 0)
            self.stored[row, byte] ^= 1 << bit
            self.protected[row, byte] ^= 1 << bit
            return
        byte = int(self.random.integers(4)) + (0 if target == "scale" else 4) - 8
        bit = 1 << int(self.random.integers(8))
        self.stored[row, byte] ^= bit
        self.protected[row, byte] ^= bit

    def found(self, target: str, faults: int) -> dict[str, tuple[int, int, int]]:
        """For each scheme: found of all, found of the effective, and the effective."""
        tally: dict[str, np.ndarray] = {}
        for _ in range(faults):
            ids, offsets = self.ids(1)
            row = int(ids[int(self.random.integers(POOLING))])
            clean = self.stored[row].clone(), self.protected[row].clone()
            before = aten_bags("int8")(self.stored, ids, offsets, False, 0, False, None)
            self.fault(target, row)
            after = aten_bags("int8")(self.stored, ids, offsets, False, 0, False, None)
            effective = not np.array_equal(before.numpy(), after.numpy(), equal_nan=True)
            for name, flagged in self.verdicts(ids, offsets).items():
                hit = bool(flagged[0])
                tally.setdefault(name, np.zeros(3, int))[:] += (hit, hit and effective, effective)
            self.stored[row], self.protected[row] = clean
        return {name: tuple(int(n) for n in each) for name, each in tally.items()}  # type: ignore[misc]

    def found_in(self, parts: tuple[str, ...], faults: int) -> tuple[int, int, int]:
        """The same for the fused kernel, of flips in its registers."""
        row, tally = self.bag.row, np.zeros(3, int)
        plan = row.plan(self.protected.shape[0])
        wide = kernels().isa() == "avx512"  # type: ignore[union-attr]
        for _ in range(faults):
            part = parts[int(self.random.integers(len(parts)))]
            # Registers of 16 lanes; the last of a check's sums is that of the digits or tags.
            lanes = {"sum": self.dim, "value": self.dim, "scale": 16, "bias": 16}.get(part, 17)
            place = int(self.random.integers(lanes if wide or lanes == self.dim else 1))
            step, bit = (int(self.random.integers(n)) for n in (POOLING, 32))
            bags = bags_of(*self.ids(1), None, False, "table")
            fault = ArithmeticFault(0, step, part, place, bit)
            before, after = (look_up(self.protected, row, plan, bags, fault=f) for f in (None, fault))
            effective = not np.array_equal(before.values.numpy(), after.values.numpy(), equal_nan=True)
            tally += (after.unsound, after.unsound and effective, effective)
        found, found_effective, effective_ones = (int(n) for n in tally)
        return found, found_effective, effective_ones


def shares(found: tuple[int, int, int], faults: int) -> str:
    """Found of all and of the effective, in per cent."""
    effective = f"{100 * found[1] / found[2]:.1f}" if found[2] else "–"
    return f"{100 * found[0] / faults:.1f} / {effective}"


def detection(faults: int, bags: int) -> list[str]:
    """The study as lines of Markdown."""
    names = ("fused", "in-row, plain", "in-row, sound", "published, plain")
    lines = [
        f"| table | D | fault | effective of {faults} | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    alarms = [f"| table | D | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for dim in (64, 256):
        for kind, values in tables_found(dim, np.random.default_rng(dim)).items():
            study = Study(values, seed=dim)
            false = study.false_alarms(bags)
            alarms.append(f"| {kind} | {dim} | {' | '.join(f'{false[n]:,}' for n in names)} |")
            for target in TARGETS:
                each = study.found(target, faults)
                cells = (shares(each[n], faults) for n in names)
                lines.append(f"| {kind} | {dim} | {target} | {each['fused'][2]} | {' | '.join(cells)} |")
            for target, parts in REGISTERS.items() if kernels() is not None else ():
                fused = study.found_in(parts, faults)
                cells = (shares(fused, faults), *["–"] * (len(names) - 1))
                lines.append(f"| {kind} | {dim} | {target} | {fused[2]} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return [
        "## Found",
        "",
        "One fault in a row of a bag of 100: of all faults / of those that alter the bag's sum, in per cent.",
        "`register`: one bit of a register of the fused kernel at one look-up; the operators of the others",
        "cannot be told to have such a fault.",
        "",
        *lines,
        "",
        "## False alarms",
        "",
        f"In {bags:,} bags of 100 rows of sound tables.",
        "",
        *alarms,
        "",
    ]


def times(cells: list[Cell], schemes: tuple[str, ...]) -> list[str]:
    """Times of cells, and the overheads' medians, as lines of Markdown."""
    lines = []
    overheads: dict[str, list[float]] = {}
    for layout, dim, batch, found in cells:
        shown = []
        for name in schemes:
            if name not in found:
                shown.append("–")
                continue
            more = 100 * (found[name] / found["stock"] - 1)
            shown.append(f"{more:+.1f}")
            overheads.setdefault(f"{layout} {name}", []).append(more)
        lines.append(f"| {layout} | {dim} | {batch} | {found['stock'] * 1e6:.0f} | {' | '.join(shown)} |")
    medians = [
        f"| {name} | {statistics.median(each):+.1f} | {max(each):+.1f} |"
        for name, each in sorted(overheads.items())
    ]
    return [
        f"| rows | D | batch | stock (µs) | {' | '.join(f'{n} (%)' for n in schemes)} |",
        "|---" * (4 + len(schemes)) + "|",
        *lines,
        "",
        "| scheme | median overhead (%) | largest (%) |",
        "|---|---|---|",
        *medians,
        "",
    ]


def report(cells: list[Cell], small: list[Cell], study: list[str], rows: int) -> str:
    """The results as Markdown."""
    native = kernels()
    return "\n".join(
        [
            "# Embedding bags with checks",
            "",
            f"Made by `python benchmarks/abft_bags.py` on {machine(torch=metadata.version('torch'))}.",
            f"Kernel: {'none' if native is None else native.isa()}.",
            f"Tables of {rows:,} rows, bags of {POOLING}, one",
            "thread, fresh random ids for each call, each scheme in turn with the stock operator;",
            "medians of CPU time.",
            "All tables of a cell lie in the same memory. `fused` is a call of",
            "`ProtectedEmbeddingBag`, all its Python included.",
            "",
            "## Time",
            "",
            *times(cells, SCHEMES),
            f"## Time, tables of {SMALL:,} rows",
            "",
            "The caches hold them: there is no waiting for memory for the checks to hide in.",
            "",
            *times(small, ("fused", "running twice")),
            *study,
        ]
    )


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10000, help="bags of one cell and scheme")
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--dims", default="32,64,128,256")
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--bags", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=("speed", "study", "all"), default="all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[int, list[Cell]] = {arguments.rows: [], SMALL: []}
    dims = [int(d) for d in arguments.dims.split(",")]
    for rows, done in cells.items() if arguments.part != "study" else ():
        for cell in speed(rows, dims, arguments.rounds):
            done.append(cell)
            more = {n: f"{100 * (s / cell[3]['stock'] - 1):+.1f}" for n, s in cell[3].items()}
            print(rows, *cell[:3], more, flush=True)
    study = detection(arguments.faults, arguments.bags) if arguments.part != "speed" else []
    arguments.output.write_text(report(cells[arguments.rows], cells[SMALL], study, arguments.rows), "utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
