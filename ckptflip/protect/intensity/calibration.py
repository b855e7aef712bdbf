"""How long each scheme takes for a shape on this device: measured in turn, medians, warm.

On the CPU with one thread the thread's processor time is taken: other programs then do not count. Elsewhere
it is the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from ckptflip.protect.intensity.roofline import settled
from ckptflip.protect.intensity.schemes import SCHEMES, Scheme
from ckptflip.protect.intensity.weights import prepared

BUCKETS = tuple(1 << power for power in range(13))  # 1, 2, 4 … 4096 rows
_ROUNDS = 15
_SLICE = 2e-4  # seconds that one scheme runs in one round
_LONGEST = 1.0  # seconds after which a shape has been measured often enough, but not before _FEWEST rounds
_FEWEST = 5


def bucket(rows: int) -> int:
    """The power of two that stands for so many rows: the next one, at most the largest.

    Example:
        >>> [bucket(rows) for rows in (1, 2, 3, 100, 9000)]
        [1, 2, 4, 128, 4096]
    """
    return min(1 << max(rows - 1, 0).bit_length(), BUCKETS[-1])


def measured(
    weight: torch.Tensor, bias: torch.Tensor | None, rows: int, schemes: Sequence[Scheme]
) -> dict[str, float]:
    """Seconds per call of each scheme that fits, and of `none`.

    Every round runs every scheme for a while, the order rotating; of the rounds the median is taken.

    Args:
        weight: (n, k).
        bias: (n,) or None.
        rows: m.
        schemes: which.
    """
    weights = prepared(weight, bias)
    drawn = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, weights.inputs, generator=drawn).to(weight.device, weight.dtype)
    fitting = [SCHEMES["none"], *(scheme for scheme in schemes if not scheme.unfit(weights))]
    with torch.no_grad():
        runs = {scheme.name: scheme.prepare(weights) for scheme in fitting}
        return timed({name: _call(run, x) for name, run in runs.items()}, weight.device)


def _call(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> Callable[[], object]:
    return lambda: run(x)


def timed(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int = _ROUNDS
) -> dict[str, float]:
    """Median seconds of each call, measured in turn.

    Args:
        calls: what to measure, by name.
        device: what to wait for.
        rounds: how often each is measured.

    Example:
        >>> sorted(timed({"a": lambda: None, "b": lambda: None}, torch.device("cpu"), rounds=2))
        ['a', 'b']
    """
    clock = clock_of(device)
    repeats = {name: _repeats(call, device, clock) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, began = list(calls), time.perf_counter()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(_slice(calls[name], repeats[name], device, clock))
        if turn + 1 >= _FEWEST and time.perf_counter() - began > _LONGEST:
            break
    return {name: median(values) for name, values in taken.items()}


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that timings on a device are taken with.

    Args:
        device: CPU or GPU.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _repeats(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> int:
    for _ in range(3):
        call()
    return max(1, round(_SLICE / max(_slice(call, 1, device, clock), 1e-9)))


def _slice(
    call: Callable[[], object], repeats: int, device: torch.device, clock: Callable[[], float]
) -> float:
    # What another scheme keeps has left the caches meanwhile.
    call()
    settled(device)
    began = clock()
    for _ in range(repeats):
        call()
    settled(device)
    return (clock() - began) / repeats
