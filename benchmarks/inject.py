"""Injection into HDF5 side by side with the h5py script a user would write. Whole processes, interleaved.

    python benchmarks/inject.py [--folder DIR] [--rounds N] [--output benchmarks/results/inject.md]

Written to its usual place, the result goes into the README as well.

Makes a 1 GiB file of 50 float32 datasets in DIR (some 4 GiB of room), runs every job `rounds` times with ours
and the baseline in turn and the file in the page cache, and writes medians, ratios and peak memory.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from processes import GIB, into_readme, machine, program, timed, with_bytecode

DATASETS = 50
RESULTS = Path(__file__).parent / "results" / "inject.md"

# What a sensible user would write: load the datasets that are hit, alter them, store them.
SCRIPT = """
import sys, h5py, numpy as np
path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(seed)
with h5py.File(path, "r+") as f:
    names = []
    f.visititems(lambda n, o: names.append(n) if isinstance(o, h5py.Dataset) else None)
    sizes = np.array([f[n].size for n in names])
    hits = rng.choice(sizes.sum() * 32, count, replace=False, shuffle=False) if count < 2**20 else \\
        np.unique(rng.integers(0, sizes.sum() * 32, count))
    ends = np.cumsum(sizes * 32)
    which = np.searchsorted(ends, hits, side="right")
    for d in np.unique(which):
        data = f[names[d]][...]
        words = data.reshape(-1).view(np.uint32)
        at = hits[which == d] - (ends[d] - sizes[d] * 32)
        np.bitwise_xor.at(words, at // 32, np.uint32(1) << (at % 32).astype(np.uint32))
        f[names[d]][...] = data
"""
IMPORTS = "import h5py, numpy, click"
WALK = """
import sys, h5py
with h5py.File(sys.argv[1], "r") as f:
    def row(name, o):
        if isinstance(o, h5py.Dataset):
            layout = "chunked" if o.chunks else "contiguous"
            where = o.id.get_offset()
            print(name, o.shape, o.dtype, o.name.rpartition("/")[0], layout, o.nbytes, where, o.compression)
    f.visititems(row)
"""


@dataclass
class Job:
    """One row of the table: our command, the baseline's, and what we must reach."""

    name: str
    ours: list[str]
    baseline: list[str]
    against: str
    target: str
    before: Callable[[], None]
    times: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "baseline": []})
    memory: dict[str, int] = field(default_factory=lambda: {"ours": 0, "baseline": 0})

    def once(self) -> None:
        """Both in turn."""
        for who, command in (("baseline", self.baseline), ("ours", self.ours)):
            self.before()
            spent = timed(command)
            self.times[who].append(spent.seconds)
            self.memory[who] = max(self.memory[who], spent.peak)


def make(path: Path, size: int) -> None:
    """A file of 50 float32 datasets of normal numbers."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i in range(DATASETS):
            file.create_dataset(
                f"layer{i:02d}/weight", data=rng.standard_normal(size // 4 // DATASETS, dtype=np.float32)
            )


def jobs(folder: Path) -> list[Job]:
    """Every measured job, on files made in `folder`."""
    big, small, gzip, many = (folder / n for n in ("big.h5", "small.h5", "gzip.h5", "many.h5"))
    make(big, GIB)
    make(small, GIB // 256)
    rng = np.random.default_rng(0)
    with h5py.File(gzip, "w") as file:
        data = rng.standard_normal((1024, 1 << 14), dtype=np.float32)
        file.create_dataset("w", data=data, chunks=(16, 1 << 14), compression="gzip", compression_opts=4)
    with h5py.File(many, "w") as file:
        for i in range(10_000):
            file.create_dataset(f"block{i // 100}/layer{i}/weight", data=np.ones((3, 4), np.float32))
    record, out = folder / "record.jsonl", folder / "out.h5"
    columns = folder / "record.h5"

    def clean() -> None:
        for path in (record, columns, out, folder / "out.h5.flips.jsonl"):
            path.unlink(missing_ok=True)

    python = sys.executable
    ours = program()

    def inject(path: Path, *options: str, to: Path | None = record) -> list[str]:
        return [
            *ours,
            "inject",
            str(path),
            "--seed",
            "1",
            *(["--in-place", "--record", str(to)] if to else []),
            *options,
        ]

    def script(path: Path, count: int) -> list[str]:
        return [python, "-c", SCRIPT, str(path), str(count), "1"]

    imports = [python, "-c", IMPORTS]
    ber_count = round(1e-4 * GIB * 8)
    return [
        Job("1 flip, 1 GiB", inject(big, "--count", "1"), imports, f"`{IMPORTS}`", "≤ 1.5×", clean),
        Job("1 flip, 4 MiB", inject(small, "--count", "1"), imports, f"`{IMPORTS}`", "as for 1 GiB", clean),
        Job("1 flip, 1 GiB", inject(big, "--count", "1"), script(big, 1), "h5py script", "", clean),
        Job("1,000 flips", inject(big, "--count", "1000"), script(big, 1000), "h5py script", "", clean),
        Job(
            "100,000 flips",
            inject(big, "--count", "100000"),
            script(big, 100_000),
            "h5py script",
            "≤ 1.0 s",
            clean,
        ),
        Job(
            "1,000,000 flips, .h5 record",
            inject(big, "--count", "1000000", to=columns),
            script(big, 1_000_000),
            "h5py script",
            "≤ 2.5 s",
            clean,
        ),
        Job(
            "BER 1e-4",
            inject(big, "--ber", "1e-4"),
            script(big, ber_count),
            "h5py script, no record",
            "≤ 3 s",
            clean,
        ),
        Job(
            "1 flip, new file",
            inject(big, "--count", "1", "-o", str(out), to=None),
            ["cp", str(big), str(out)],
            "`cp`",
            "≤ 1.2×",
            clean,
        ),
        Job(
            "10 flips, gzip 64 MiB, new file",
            inject(gzip, "--count", "10", "-o", str(out), to=None),
            script(gzip, 10),
            "h5py script, in place",
            "",
            clean,
        ),
        Job(
            "`ls`, 10,000 datasets",
            [*ours, "ls", str(many)],
            [python, "-c", WALK, str(many)],
            "h5py walk",
            "≤ 2×",
            clean,
        ),
    ]


def report(done: list[Job], rounds: int) -> str:
    """The results as Markdown."""
    versions = {"numpy": np.__version__, "h5py": h5py.__version__, "HDF5": h5py.version.hdf5_version}
    lines = [
        "# Injection into HDF5",
        "",
        f"Made by `python benchmarks/inject.py` on {machine(**versions)}.",
        f"Whole processes, start included; medians of {rounds} interleaved rounds, files in the page cache.",
        f"In place on a 1 GiB file of {DATASETS} float32 datasets unless said otherwise; ours writes a full",
        "record, the script none.",
        "",
        "| job | ours (s) | baseline (s) | ours / baseline | baseline is | to reach | MB ours / baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in done:
        ours, theirs = (statistics.median(job.times[who]) for who in ("ours", "baseline"))
        peaks = " / ".join(f"{job.memory[who] / 1e6:.0f}" for who in ("ours", "baseline"))
        cells = (
            job.name,
            f"{ours:.3f}",
            f"{theirs:.3f}",
            f"{ours / theirs:.2f}",
            job.against,
            job.target,
            peaks,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run all jobs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to make the files; a temporary folder by default"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ckptflip-bench-", dir=arguments.folder))
    with_bytecode()
    try:
        todo = jobs(folder)
        for job in todo:
            job.before()
            timed(job.ours)
        for _ in range(arguments.rounds):
            for job in todo:
                job.once()
        text = report(todo, arguments.rounds)
    finally:
        shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, "utf-8")
    if arguments.output == RESULTS:
        into_readme("inject", text, 5)
    print(text)


if __name__ == "__main__":
    main()
