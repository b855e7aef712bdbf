"""A thousand flips in the hottest hundredth of a 10 GiB embedding table, in place.

    python benchmarks/tables.py [--folder DIR] [--rounds N] [--output benchmarks/results/tables.md]

Makes tables of 10 GiB in DIR, sparse on disk, and an access count for each of their rows (320 MB), then flips
bits in place, and the same in a table of 4 MiB with as many flips, in turn. What the large one takes more is
the price of its size; what both take more than an import is that of the flips.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from processes import GIB, Spent, machine, program, timed, with_bytecode

RESULTS = Path(__file__).parent / "results" / "tables.md"
FLIPS = 1000
ROW = 256
SIZES = {"4 MiB": GIB // 256, "10 GiB": 10 * GIB}
STARTUP = [sys.executable, "-c", "import numpy, click, h5py"]
NAME = "emb_l.0.weight"


class Case(NamedTuple):
    """A kind of table: what to call it, its file's ending, its dtype, further options."""

    name: str
    suffix: str
    dtype: str
    options: tuple[str, ...] = ()


CASES = (
    Case("safetensors, fp32, D 64", ".safetensors", "float32"),
    Case("HDF5, fp32, D 64", ".h5", "float32"),
    Case("safetensors, row-wise int8, D 248", ".safetensors", "uint8", ("--rowwise", "int8")),
    Case("HDF5, row-wise int4, D 504", ".h5", "uint8", ("--rowwise", "int4")),
    Case("HDF5, scales of row-wise int8", ".h5", "uint8", ("--rowwise", "int8", "--fields", "scale")),
)


def make_table(path: Path, size: int, dtype: str) -> None:
    """A table of zeros of so many bytes, which take no room on disk."""
    shape = (size // ROW, ROW // np.dtype(dtype).itemsize)
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
            h5py.h5d.create(file.id, NAME.encode(), kind, space, early)
        return
    code = {"float32": "F32", "uint8": "U8"}[dtype]
    header = json.dumps({NAME: {"dtype": code, "shape": shape, "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def make_counts(path: Path, rows: int) -> None:
    """Access counts as skewed as those of a log, in no order of the rows."""
    random = np.random.default_rng(0)
    draws = (random.random(max(rows, 1 << 16)) ** 4 * rows).astype(np.int64)
    counts = np.bincount(draws, minlength=rows)
    random.shuffle(counts)
    np.save(path, counts)


def commands(case: Case, folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    """What to run: its label, the command, the record that must not exist."""
    for label, size in SIZES.items():
        table = folder / f"{label.replace(' ', '')}{case.suffix}"
        counts = folder.parent / f"{size}.npy"
        make_table(table, size, case.dtype)
        if not counts.exists():
            make_counts(counts, size // ROW)
        record = folder / f"{label}.jsonl"
        selection = ["--rows", "hot:1%", "--rows-weight", str(counts), "--count", str(FLIPS)]
        common = ["--in-place", "--seed", "1", "--record", str(record), *case.options]
        yield label, [*program(), "inject", str(table), *selection, *common], record


def measure(case: Case, folder: Path, rounds: int) -> dict[str, list[Spent]]:
    """The small and the large table in turn, an import between them."""
    prepared = list(commands(case, folder))
    found: dict[str, list[Spent]] = {label: [] for label in (*SIZES, "start")}
    for turn in range(rounds + 1):
        for label, command, record in prepared:
            record.unlink(missing_ok=True)
            spent = timed(command)
            if turn:
                found[label].append(spent)
        found["start"] += [timed(STARTUP)] if turn else []
    return found


def row(case: Case, found: dict[str, list[Spent]]) -> str:
    """One line of the table."""
    start, small, large = (statistics.median(s.seconds for s in found[n]) for n in ("start", *SIZES))
    peak = max(s.peak for s in found["10 GiB"]) / 1e6
    numbers = (f"{start:.3f}", f"{small:.3f}", f"{large:.3f}", f"{large - start:.3f}", f"{peak:.0f}")
    return f"| {' | '.join((case.name, *numbers))} |"


def report(rows: list[str], rounds: int) -> str:
    """The results as Markdown."""
    versions = {name: metadata.version(name) for name in ("numpy", "h5py")}
    titles = ("table", "import (s)", "4 MiB (s)", "10 GiB (s)", "beyond the import (s)", "MB at the peak")
    lines = [
        "# A thousand flips in the hottest hundredth of a table",
        "",
        f"Made by `python benchmarks/tables.py` on {machine(**versions)}.",
        f"Whole processes, start included; medians of {rounds} interleaved rounds. {FLIPS:,} bits",
        "flipped in place, with a full record, in the 1 % of rows read most: 419,430 of 41,943,040 rows of",
        "the 10 GiB, found in an int64 count per row (336 MB, in the page cache). The import is of numpy,",
        "click and h5py. To reach: at most 0.5 s beyond the start, and 200 MB of memory.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure all kinds of tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with_bytecode()
    top = Path(tempfile.mkdtemp(prefix="ckptflip-bench-", dir=arguments.folder))
    rows = []
    try:
        for number, case in enumerate(CASES):
            folder = top / str(number)
            folder.mkdir()
            rows.append(row(case, measure(case, folder, arguments.rounds)))
            print(rows[-1], flush=True)
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(top)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(report(rows, arguments.rounds), "utf-8")
    print(arguments.output)


if __name__ == "__main__":
    main()
