"""Stores of campaigns that were never run: a tiny one counted by hand, and drawn ones of any size."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.campaign.store.rows import Cell, NewAttempt, NewTrial, Stratum
from ckptflip.campaign.store.writing import Writer, writing
from ckptflip.campaign.task import Flips, Spread
from ckptflip.faults.record import Counts, TensorEntry

ATTEMPT = NewAttempt(task="t", state="done", executor="local", seconds=1.5, host="here")
LAYERS = ("conv1", "conv2", "fc1", "fc2")
CLEAN = {epoch: 0.97 - 0.6 * 0.6**epoch for epoch in range(30)}


def spec(**changes: Any) -> dict[str, Any]:
    """A spec as the store keeps it."""
    return {
        "name": "flips-digits",
        "title": "Accuracy after a restart with 1 to 100 flips",
        "about": "How much accuracy is lost when bits of a checkpoint flip before training goes on?",
        "seed": 21,
        "workload": [{"name": "digits-cnn"}],
        "clean": {"seeds": [0, 1, 2]},
        "trials": {"per_cell": 100, "stop": None},
        "metric": {"name": "accuracy", "better": "higher", "tolerance": 0.01},
    } | changes


def begin(
    writer: Writer, said: dict[str, Any], command: str = "ckptflip run e4.toml --store runs.db"
) -> None:
    writer.revise(
        said,
        "0123456789abcdef",
        command,
        {"python": "3.12.3", "torch": "2.9.0"},
        {"processor": "x86-64", "cores": 8},
    )


def cell(key: str, position: int, label: str, **fields: Any) -> Cell:
    given = {
        "workload": "digits-cnn",
        "epoch": 5,
        "until": 15,
        "wanted": 100,
        "policy": {"bits": "all", "count": 1},
    }
    return Cell(key=key, position=position, label=label, **(given | fields))


def flips(*hits: tuple[str, str, int, int, float], shape: tuple[int, ...] = (8, 8)) -> Flips:
    """Single-bit flips in float32: name, layer, element, bit and the value before."""
    tensors = tuple(
        TensorEntry(name=name, shape=shape, dtype="float32", layer=layer, role="weight")
        for name, layer in dict.fromkeys((name, layer) for name, layer, *_ in hits)
    )
    place = {entry.name: at for at, entry in enumerate(tensors)}
    before = [struct.unpack("<I", struct.pack("<f", value))[0] for *_, value in hits]
    masks = [1 << bit for *_, bit, _ in hits]
    return Flips(
        tensors=tensors,
        tensor=np.array([place[hit[0]] for hit in hits], "<i4").tobytes(),
        word=np.array([hit[2] for hit in hits], "<i8").tobytes(),
        hit=np.array(masks, "<u8").tobytes(),
        before=np.array(before, "<u8").tobytes(),
        after=np.array([b ^ m for b, m in zip(before, masks, strict=True)], "<u8").tobytes(),
    )


def counts(bits: int) -> Counts:
    return Counts(bits_hit=bits, bits_effective=bits, words_hit=bits, words_effective=bits, tensors=1)


def clean_runs(
    writer: Writer,
    workload: str = "digits-cnn",
    seeds: Sequence[int] = (0, 1, 2),
    until: int = 15,
    exact: bool | None = True,
    apart: float = 0.002,
) -> None:
    for seed in seeds:
        values = tuple(CLEAN[epoch] + apart * (seed - 1) for epoch in range(until + 1))
        loss = tuple(1 - value for value in values)
        writer.put_run(
            workload,
            seed,
            until,
            exact,
            {5: "e5"},
            tuple(range(until + 1)),
            {"accuracy": values, "loss": loss},
        )


def trial(
    number: int,
    outcome: str | None,
    values: Sequence[float | None],
    *,
    key: str = "a",
    run_seed: int = 1,
    start: int = 5,
    **fields: Any,
) -> NewTrial:
    """A trial with these accuracies from `start` on."""
    finals = {"final": None if outcome == "collapsed" else values[-1] if values else None}
    given = {
        "seed": 1000 + number,
        "state": "done" if outcome else "crashed",
        "ended": "horizon",
        "ended_epoch": start + len(values) - 1,
        "right_after": values[0] if values else None,
        "clean_final": CLEAN[15],
        "values": (tuple(range(start, start + len(values))), {"accuracy": tuple(values)}),
        "counts": counts(1),
    } | finals
    return NewTrial(cell=key, number=number, run_seed=run_seed, outcome=outcome, **(given | fields))


def tiny(path: Path) -> None:
    """Two altered cells and a control: 4 + 2 trials, of which one crashed; every number is known.

    Cell a, one flip: identical, masked (0.002 below at the end), degraded (0.05 below), collapsed. Cell b,
    ten flips: one slowed (back 3 epochs after the restart, 0.004 below at the end), one crashed with SIGKILL.
    """
    clean = [CLEAN[epoch] for epoch in range(5, 16)]
    with writing(path) as writer:
        begin(writer, spec())
        writer.put_cells(
            [
                cell("c", 0, "restart without change", policy=None, wanted=1),
                cell("a", 1, "1 flip", swept={"count": 1}, wanted=4),
                cell("b", 2, "10 flips", swept={"count": 10}, wanted=2, policy={"bits": "all", "count": 10}),
            ]
        )
        clean_runs(writer)
        writer.put_trial(trial(0, "identical", clean, key="c", counts=None, recovered=0), ATTEMPT)
        same = trial(
            0,
            "identical",
            clean[:3],
            recovered=0,
            ended="identical",
            final=clean[-1],
            flips=flips(("conv1.weight", "conv1", 9, 3, 0.5)),
        )
        writer.put_trial(same, ATTEMPT)
        masked = [value - 0.002 for value in clean]
        writer.put_trial(
            trial(1, "masked", masked, recovered=0, flips=flips(("conv1.weight", "conv1", 3, 22, 0.5))),
            ATTEMPT,
        )
        low = [value - 0.05 for value in clean]
        writer.put_trial(trial(2, "degraded", low, flips=flips(("fc1.weight", "fc1", 17, 29, 0.25))), ATTEMPT)
        lost = trial(
            3,
            "collapsed",
            [0.1, 0.1],
            ended="collapsed",
            flips=flips(("conv1.weight", "conv1", 10, 30, 1.5)),
        )
        writer.put_trial(lost, ATTEMPT)
        slow = [0.5, 0.6, 0.7] + [value - 0.004 for value in clean[3:]]
        writer.put_trial(trial(0, "slowed", slow, key="b", recovered=3, counts=counts(10)), ATTEMPT)
        writer.put_trial(
            trial(1, None, [], key="b", message="killed", signal=9, counts=None, ended_epoch=None), ATTEMPT
        )


def drawn(
    path: Path,
    *,
    counts_swept: Sequence[int] = (1, 10, 100, 1000),
    workloads: Sequence[str] = ("digits-cnn",),
    epochs: Sequence[int] = (5,),
    until: int = 15,
    trials: int = 100,
    spread: Sequence[int] = (1, 10),
    strata: bool = False,
    failed: float = 0.01,
    label: str = "{} flips in all but critical bits",
    seed: int = 0,
    layers: Sequence[str] = LAYERS,
    stop: dict[str, Any] | None = None,
    **said: Any,
) -> None:
    """A campaign whose trials are drawn: the more flips, the worse."""
    rng = np.random.default_rng(seed)
    with writing(path) as writer:
        writer._connection.execute("PRAGMA synchronous = OFF")
        begin(writer, spec(**said) | {"trials": {"per_cell": trials, "stop": stop}})
        for workload in workloads:
            clean_runs(writer, workload, until=until)
        cells = [
            cell(
                f"{workload}-{epoch}-{count}",
                at,
                label.format(count),
                workload=workload,
                epoch=epoch,
                until=until,
                swept={"count": count},
                policy={"bits": "all", "count": count},
                wanted=trials,
            )
            for at, (workload, epoch, count) in enumerate(
                (w, e, c) for w in workloads for e in epochs for c in counts_swept
            )
        ]
        control = [
            cell(
                f"control-{w}-{e}",
                1000 + at,
                "restart without change",
                workload=w,
                epoch=e,
                until=until,
                policy=None,
            )
            for at, (w, e) in enumerate((w, e) for w in workloads for e in epochs)
        ]
        writer.put_cells([*cells, *control])
        for one in control:
            values = [CLEAN[epoch] for epoch in range(one.epoch, until + 1)]
            same = trial(0, "identical", values, key=one.key, start=one.epoch, recovered=0, counts=None)
            writer.put_trial(same, ATTEMPT)
        for one in cells:
            if strata:
                shares = {"sign": 1 / 32, "critical": 1 / 32, "exponent": 7 / 32, "mantissa": 23 / 32}
                writer.put_strata(
                    one.key,
                    [
                        Stratum(layer="", field=name, bits=int(32000 * share), weight=share)
                        for name, share in shares.items()
                    ],
                )
            for number in range(trials):
                writer.put_trial(_drawn_trial(rng, one, number, layers, spread, failed, strata), ATTEMPT)


def _drawn_trial(
    rng: np.random.Generator,
    one: Cell,
    number: int,
    layers: Sequence[str],
    spread: Sequence[int],
    failed: float,
    strata: bool,
) -> NewTrial:
    count = one.swept["count"]
    run_seed = int(rng.integers(3))
    length = one.until - one.epoch + 1
    clean = np.array([CLEAN[one.epoch + k] + 0.002 * (run_seed - 1) for k in range(length)])
    number_of = {"run_seed": run_seed, "key": one.key, "start": one.epoch, "clean_final": float(clean[-1])}
    if rng.random() < failed:
        state = ["crashed", "hung", "out-of-memory"][int(rng.integers(3))]
        message = {"crashed": "the worker was killed", "hung": "no end within 10 minutes"}.get(
            state, "4 GiB were used up"
        )
        return trial(
            number,
            None,
            [],
            state=state,
            message=message,
            signal=9 if state == "crashed" else None,
            counts=None,
            ended_epoch=None,
            **number_of,
        )
    bits = rng.integers(32, size=count)
    field = ("sign", "critical", "exponent", "mantissa")[number % 4] if strata else None
    if field:
        low, high = {"sign": (31, 32), "critical": (30, 31), "exponent": (23, 30), "mantissa": (0, 23)}[field]
        bits = rng.integers(low, high, size=count)
    number_of |= {"stratum": ("", field) if field else None}
    if strata:
        number_of["number"] = number // 4
    hit_at = [
        (str(rng.choice(layers)), int(rng.integers(64)), int(bit), float(rng.normal())) for bit in bits[:50]
    ]
    kept = {tuple(h[:2]): (f"{h[0]}.weight", *h) for h in hit_at}
    number_of |= {
        "counts": counts(count),
        "flips": flips(*kept.values()) if count <= 50 else None,
        "flips_kept": count <= 50,
        "spread": tuple(_spread(rng, layers, one.epoch + k) for k in spread) if number < 40 else (),
    }
    number = number_of.pop("number", number)
    hurt = (bits == 30).any() or rng.random() < count / 4000
    if hurt and rng.random() < 0.7:
        last = int(rng.integers(1, 4))
        return trial(number, "collapsed", [0.1] * last, ended="collapsed", **number_of)
    if (bits < 16).all() and rng.random() < 0.5:
        return trial(number, "identical", clean.tolist(), ended="identical", recovered=0, **number_of)
    depth = 0.5 * rng.random() * np.log10(1 + count) / 3
    noise = rng.normal(0, 0.002, length)
    values = (
        clean
        - depth * np.exp(-np.arange(length) / (1 + 2 * rng.random()))
        + noise
        - (0.1 * rng.random() if hurt else 0)
    )
    outside = np.flatnonzero(values < clean - 0.01)
    recovered = (
        None if outside.size and outside[-1] == length - 1 else int(outside[-1] + 1) if outside.size else 0
    )
    outcome = "degraded" if recovered is None else "slowed" if recovered else "masked"
    return trial(number, outcome, values.tolist(), recovered=recovered, **number_of)


def _spread(rng: np.random.Generator, layers: Sequence[str], epoch: int) -> Spread:
    rows = []
    for layer in layers:
        changes = np.sort(10 ** rng.normal(-3, 1.5, 5)).tolist() if rng.random() < 0.8 else []
        rows.append(
            {
                "layer": layer,
                "elements": 640,
                "changed": 100 if changes else 0,
                "from_zero": 0,
                "nev": int(rng.random() < 0.05),
                "minimum": 0.0,
                "lower": 0.0,
                "median": 0.0,
                "upper": 0.0,
                "maximum": 1.0,
                "mean": 0.0,
                "changes": changes,
            }
        )
    return Spread(epoch=epoch, layers=tuple(rows))
