"""What a campaign costs: trials per hour beside a plain script, the runner's overhead, large stores.

    python benchmarks/campaign.py [--rounds N] [--trials N] [--workers N] [--store FILE]

Three ways to do the same trials in turn, each as a process of its own that is timed from its start to its
end: the plain script of `plain_campaign.py` (one process, PyTorch's default threads), a campaign with the
exact shortcuts off, and one with them on. The trials are those of E2 on digits-cnn: five sets of bits × 1 to
1000 flips, 10 epochs each, from a clean checkpoint that is there before. Then `status` and `report` on a
store with a million metric rows. Writes results/campaign.md and the README's table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from processes import into_readme, machine, program, timed, with_bytecode

from ckptflip.campaign.store import reading, writing
from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "campaign.md"
SETS = ("all", "all,!critical", "exponent", "mantissa", "critical")
COUNTS = (1, 10, 100, 1000)
SPEC = """
name = "benchmark"
seed = 1
[[workload]]
name = "digits-cnn"
[restart]
epochs = [5]
until = 15
[[policy]]
roles = "model"
sweep = {{ bits = {bits}, count = {counts} }}
[trials]
per_cell = {per_cell}
control = {control}
[shortcuts]
collapsed = {shortcuts}
identical = {shortcuts}
[executor]
workers = {workers}
"""


def spec(folder: Path, per_cell: int, workers: int, *, shortcuts: bool, control: int = 0) -> Path:
    path = folder / f"spec_{per_cell}_{shortcuts}.toml"
    text = SPEC.format(
        bits=json.dumps(SETS), counts=json.dumps(COUNTS), per_cell=per_cell, workers=workers,
        shortcuts=str(shortcuts).lower(), control=control,
    )  # fmt: skip
    path.write_text(text)
    return path


def prepared(folder: Path, per_cell: int) -> tuple[Path, Path, Path]:
    """The clean run in both forms: a store's folder, and what the plain script reads."""
    import torch

    from ckptflip import torch_h5

    store = folder / "clean.db"
    one = folder / "clean.toml"
    text = spec(folder, 1, 1, shortcuts=True, control=1).read_text()
    one.write_text(text.replace(json.dumps(SETS), '["all"]').replace(json.dumps(COUNTS), "[1]"))
    subprocess.run(
        [*program(), "run", str(one), "--store", str(store), "-q"], check=True, stdout=subprocess.DEVNULL
    )
    (found,) = folder.glob("clean.db.clean/*/seed_0/epoch_005.h5")
    state = torch_h5.load(found)
    plain = folder / "epoch_005.pt"
    kept = {key: state[key] for key in ("model", "optimizer", "scheduler")}
    # PyTorch 2.6's own loaders take plain containers alone.
    torch.save(json_like(kept), plain)
    conditions = folder / "conditions.json"
    rows = [(bits, count, seed) for seed in range(per_cell) for bits in SETS for count in COUNTS]
    conditions.write_text(json.dumps(rows))
    return folder / "clean.db.clean", plain, conditions


def json_like(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: json_like(item) for key, item in value.items()}
    return [json_like(item) for item in value] if isinstance(value, list | tuple) else value


def campaign(folder: Path, clean: Path, path: Path) -> tuple[float, list[dict[str, float]]]:
    """Seconds of a campaign, and those of each phase of each of its trials."""
    store = folder / "runs.db"
    for old in folder.glob("runs.db*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.copytree(clean, folder / "runs.db.clean")
    spent = timed([*program(), "run", str(path), "--store", str(store), "-q"])
    with reading(store) as reader:
        phases = [a.phases for a in reader.attempts() if a.task.startswith("trial/")]
    return spent.seconds, phases


def throughput(folder: Path, rounds: int, trials: int, workers: int) -> dict[str, Any]:
    per_cell = trials // (len(SETS) * len(COUNTS))
    clean, plain, conditions = prepared(folder, per_cell)
    count = per_cell * len(SETS) * len(COUNTS)
    seconds: dict[str, list[float]] = {"plain": [], "off": [], "on": []}
    overheads, others = [], []
    for turn in range(rounds):
        order = ["plain", "off", "on"]
        for name in order[turn % 3 :] + order[: turn % 3]:
            if name == "plain":
                command = [sys.executable, str(HERE / "plain_campaign.py"), str(plain), str(conditions)]
                seconds[name].append(timed(command).seconds)
                continue
            path = spec(folder, per_cell, workers, shortcuts=name == "on")
            took, phases = campaign(folder, clean, path)
            seconds[name].append(took)
            assert len(phases) == count
            if name == "off":
                overheads += [(each["total"] - each["train"]) / each["train"] for each in phases]
                others.append(took * workers / sum(each["train"] for each in phases) - 1)
    ratios = {
        name: [plain / ours for plain, ours in zip(seconds["plain"], seconds[name], strict=True)]
        for name in ("off", "on")
    }
    return {
        "trials": count,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratios": {name: statistics.median(each) for name, each in ratios.items()},
        "least": {name: min(each) for name, each in ratios.items()},
        "overhead": statistics.median(overheads),
        "whole": statistics.median(others),
    }


def large_store(path: Path, trials: int = 10_000, epochs: int = 20) -> None:
    """A made-up store: 20 cells, five metrics, about a million rows."""
    generator = np.random.default_rng(0)
    metrics = ("accuracy", "loss", "train_loss", "grad_norm", "nan")
    cells = [
        Cell(
            key=f"{i:016x}", position=i, workload="made up", epoch=5, until=5 + epochs - 1,
            label=f"bits {bits}, {count} faults", wanted=trials // 20, policy={"bits": bits, "count": count},
            swept={"bits": bits, "count": count},
        )
        for i, (bits, count) in enumerate((b, c) for b in SETS for c in COUNTS)
    ]  # fmt: skip
    spans = tuple(range(5, 5 + epochs))
    plain = {
        "name": "made up", "workload": [{"name": "digits-cnn", "label": "made up"}],
        "restart": {"epochs": [5], "until": 5 + epochs - 1},
        "policy": [{"sweep": {"bits": list(SETS), "count": list(COUNTS)}}],
    }  # fmt: skip
    with writing(path) as writer:
        from ckptflip.campaign import loading

        made = loading.convert(plain)
        writer.revise(loading.plain_of(made), loading.fingerprint(made), "benchmark", {}, {})
        writer.put_cells(cells)
        clean = 0.95 - 0.5 / (1 + np.arange(5 + epochs))
        values = {name: tuple(clean.tolist()) for name in metrics}
        writer.put_run("made up", 0, 5 + epochs - 1, True, {}, range(5 + epochs), values)
        for n in range(trials):
            curve = clean[5:] - 0.3 * generator.random() / (1 + np.arange(epochs))
            bad = generator.random() < 0.2
            drawn = {name: tuple(curve.tolist()) for name in metrics}
            trial = NewTrial(
                cell=cells[n % 20].key, number=n // 20, run_seed=0, seed=n,
                outcome="degraded" if bad else "slowed",
                recovered=None if bad else int(generator.integers(1, 9)), ended="horizon",
                ended_epoch=5 + epochs - 1, right_after=float(curve[0]),
                final=float(curve[-1]), clean_final=float(clean[-1]), values=(spans, drawn),
            )  # fmt: skip
            writer.put_trial(
                trial, NewAttempt(task=f"trial/{n}", state="done", executor="local", seconds=0.6)
            )


def reports(store: Path, folder: Path, rounds: int) -> dict[str, float]:
    if not store.exists():
        large_store(store)
    with reading(store) as reader:
        rows = reader.connection.execute("SELECT COUNT(*) FROM trial_values").fetchone()[0]
    found: dict[str, list[float]] = {"status": [], "report": []}
    for _ in range(rounds):
        found["status"].append(timed([*program(), "status", str(store)]).seconds)
        command = [*program(), "report", str(store), "-o", str(folder / "report"), "--overwrite"]
        found["report"].append(timed(command).seconds)
    return {"rows": float(rows), **{name: statistics.median(each) for name, each in found.items()}}


def text_of(args: argparse.Namespace, ran: dict[str, Any], large: dict[str, float]) -> str:
    versions = {name: metadata.version(name) for name in ("numpy", "torch")}
    hour = {name: ran["trials"] * 3600 / seconds for name, seconds in ran["seconds"].items()}
    lines = [
        "# Campaigns",
        "",
        f"Made by `python benchmarks/campaign.py` on {machine(**versions)}.",
        f"{ran['trials']} trials of 10 epochs of digits-cnn, as in E2; each way as a process of its own, in "
        f"turn, {args.rounds} round{'s'[: args.rounds != 1]};",
        f"medians of the seconds, and of the ratios of each round (in brackets the least of them). "
        f"{args.workers} workers.",
        "",
        "| way | trials per hour | against the plain script | to reach |",
        "|---|---|---|---|",
        f"| plain script, one process, default threads | {hour['plain']:,.0f} | 1 | |",
    ]
    for name, label, goal in (("off", "shortcuts off", "≥ 1.7"), ("on", "exact shortcuts on", "≥ 3")):
        ratio = f"{ran['ratios'][name]:.2f} ({ran['least'][name]:.2f})"
        lines.append(f"| `ckptflip run`, {label} | {hour[name]:,.0f} | {ratio} | {goal} |")
    lines += [
        "",
        "What a trial costs beside its training and evaluation (altering a copy, loading it), median: "
        f"{100 * ran['overhead']:.1f} % (to reach: ≤ 5 %).",
        "The workers' time that was no training, start of all processes and imports included: "
        f"{100 * ran['whole']:.1f} %.",
        "",
        f"A store with {large['rows']:,.0f} metric rows of 10,000 trials: `status` in "
        f"{large['status']:.2f} s (≤ 0.5 s), `report` in {large['report']:.1f} s (≤ 20 s).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--store", type=Path, help="the large store, kept for other calls; by default made anew"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with_bytecode()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        large = reports(args.store or Path(folder) / "large.db", Path(folder), args.rounds)
        print(large, flush=True)
        ran = throughput(Path(folder), args.rounds, args.trials, args.workers)
    text = text_of(args, ran, large)
    args.output.write_text(text, "utf-8")
    if args.output == RESULTS:
        into_readme("campaign", text, 4)
    print(f"{text}\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
