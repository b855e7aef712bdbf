"""Stores with made-up contents that follow from their numbers alone, as a campaign's do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.campaign.store import Writer, reading, writing
from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial, Stratum
from ckptflip.campaign.task import Flips, Spread
from ckptflip.faults.record import Counts, TensorEntry

OUTCOMES = ("identical", "masked", "slowed", "degraded", "collapsed")
SPEC: dict[str, Any] = {"name": "sample", "trials": {"per_cell": 6, "stop": None}}
TENSORS = (
    TensorEntry(name="conv1.weight", shape=(8, 3, 3, 3), dtype="float32", layer="conv1", role="weight"),
    TensorEntry(name="step", shape=(), dtype="int64", layer="", role="counter"),
)
NAN, INF = float("nan"), float("inf")
NAMES = ("spec", "control", "stratified")


def cells(wanted: int = 6) -> list[Cell]:
    """A swept cell, a restart without change, and one that draws by stratum."""
    swept = {"count": 10, "fault": "flip"}
    return [
        Cell(
            key=name, position=i, workload="digits", epoch=2, until=5, label=f"cell {name}", wanted=wanted,
            policy=None if name == "control" else {"count": 10}, swept=swept if name == "spec" else {},
        )
        for i, name in enumerate(NAMES)
    ]  # fmt: skip


STRATA = [
    Stratum(layer="conv1", field="sign", bits=216, weight=0.25),
    Stratum(layer="conv1", field="", bits=648, weight=0.75),
]


def flips(seed: int, count: int = 5) -> Flips:
    """Words of both tensors, with all 64 bits in use."""
    rng = np.random.default_rng(seed)
    before, hit = rng.integers(0, 1 << 64, size=(2, count), dtype=np.uint64, endpoint=False)
    return Flips(
        tensors=TENSORS,
        tensor=np.array([0] * (count - 1) + [1], dtype="<i4").tobytes(),
        word=np.array([*range(count - 1), 0], dtype="<i8").tobytes(),
        hit=hit.astype("<u8").tobytes(),
        before=before.astype("<u8").tobytes(),
        after=(before ^ hit).astype("<u8").tobytes(),
    )


def trial(cell: str, number: int, stratum: tuple[str, str] | None = None, *, state: str = "done") -> NewTrial:
    """A trial whose contents follow from its name."""
    key = NAMES.index(cell) * 1000 + number + (500 if stratum == ("conv1", "") else 0)
    if state != "done":
        return NewTrial(
            cell=cell, number=number, stratum=stratum, run_seed=number % 2, seed=2**64 - 1 - key,
            state=state, message="killed by the system", signal=9,
        )  # fmt: skip
    rng = np.random.default_rng(key)
    layer = {
        "layer": "conv1", "elements": 216, "changed": 3, "from_zero": 0, "nev": 1, "minimum": -INF,
        "lower": 0.0, "median": 0.0, "upper": 0.5, "maximum": INF, "mean": NAN, "changes": (0.1, 0.2, INF),
    }  # fmt: skip
    return NewTrial(
        cell=cell, number=number, stratum=stratum, run_seed=number % 2, seed=2**64 - 1 - key,
        outcome=OUTCOMES[number % 5], ended="horizon", ended_epoch=5, recovered=None if number % 2 else 1,
        right_after=float(rng.random()), final=None if number % 5 == 4 else 0.5, clean_final=0.75,
        counts=Counts(bits_hit=5, bits_effective=4, words_hit=5, words_effective=4, tensors=2),
        digest=f"sha256:{key:064x}",
        values=((2, 3, 4, 5), {"accuracy": tuple(rng.random(4)), "loss": (None, 0.5, NAN, INF)}),
        flips=None if cell == "control" else flips(key),
        spread=(Spread(epoch=3, layers=(layer,)),),
    )  # fmt: skip


def attempt(name: str, state: str = "done") -> NewAttempt:
    """An attempt that took a second."""
    return NewAttempt(
        task=name, state=state, executor="local", seconds=1.0, phases={"train": 0.5}, host="here", pid=7
    )


def begin(writer: Writer, *, shift: float = 0.0, wanted: int = 6) -> None:
    """The spec, the cells and the clean runs.

    Args:
        shift: added to one value of a clean run, as on a machine that computes other bits.
    """
    writer.revise(SPEC, "f" * 64, "ckptflip run", {"numpy": "2"}, {"cores": 2})
    writer.put_cells(cells(wanted))
    writer.put_strata("stratified", STRATA)
    for seed in (0, 1):
        values = {
            "accuracy": (0.1, 0.5, 0.6 + shift, 0.7, 0.75, 0.75),
            "loss": (None, 2.0, NAN, 1.0, 0.5, INF),
        }
        digests = [f"state-{seed}-{epoch}" for epoch in range(6)]
        writer.put_run("digits", seed, 5, True, {2: f"{seed}/epoch_002.pt"}, range(6), values, digests)


def trials(shard: tuple[int, int] = (0, 1), wanted: int = 6) -> Iterator[NewTrial]:
    """All trials of the campaign, or a part of them."""
    names: list[tuple[str, tuple[str, str] | None, int]] = [
        (cell, None, number) for cell in NAMES[:2] for number in range(wanted)
    ]
    names += [("stratified", (s.layer, s.field), n) for s in STRATA for n in range(wanted // 2)]
    for i, (cell, stratum, number) in enumerate(names):
        if i % shard[1] == shard[0]:
            yield trial(cell, number, stratum)


def filled(path: Path, shard: tuple[int, int] = (0, 1), *, shift: float = 0.0, wanted: int = 6) -> Path:
    """A store with the trials of a shard."""
    with writing(path) as writer:
        begin(writer, shift=shift, wanted=wanted)
        for new in trials(shard, wanted):
            writer.put_trial(new, attempt(f"{new.cell}-{new.stratum}-{new.number}"))
    return path


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that a store's results are."""
    with reading(path) as reader:
        return reader.values()
