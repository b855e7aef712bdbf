"""What the workloads of every framework check alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence, Set
from numbers import Integral
from typing import Any

from ckptflip.errors import CheckpointError, UsageError, WorkloadError

# Frameworks fail at numbers far beyond the cores of any machine, or try to start as many.
_MOST_THREADS = 4096


def check_options(workload: str, given: Iterable[str], taken: Sequence[str]) -> None:
    """Raise UsageError for an option that a workload does not take; say the nearest, or all that it takes.

    Example:
        >>> check_options("dlrm", ["confg"], ["config", "rows"])
        Traceback (most recent call last):
        ckptflip.errors.UsageError: workload dlrm has no option confg; did you mean config?
        >>> check_options("dlrm", ["x"], ["config", "rows"])
        Traceback (most recent call last):
        ckptflip.errors.UsageError: workload dlrm has no option x; it takes config, rows
    """
    for name in given:
        if name not in taken:
            near = difflib.get_close_matches(name, taken, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(taken) or 'none'}"
            raise UsageError(f"workload {workload} has no option {name}; {hint}")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise UsageError unless an option's value is a whole number within bounds."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} is a whole number {bounds}, not {value!r}")


def check_sizes(batch_size: int, test_batch: int, threads: int) -> None:
    """Raise UsageError unless each is a whole number of 1 or more, and threads are not absurdly many."""
    check_whole("batch_size", batch_size, 1)
    check_whole("test_batch", test_batch, 1)
    check_whole("threads", threads, 1, _MOST_THREADS)


def check_samples(name: str, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Raise WorkloadError unless training and test set hold samples, and a target for each input."""
    for inputs, targets in pairs:
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise WorkloadError(
                f"workload {name}: {len(inputs)} inputs and {len(targets)} targets; both sets "
                "need samples, and as many of the one as of the other"
            )


def check_parts(state: Any, parts: Set[str], name: str, path: str) -> None:
    """Raise unless a checkpoint holds a workload's parts, for those that are measured and not trained on.

    Raises:
        CheckpointError: seed and epoch are not counts.
        WorkloadError: parts are missing, or they are of another workload.
    """
    missing = parts - set(state) if isinstance(state, dict) else parts
    if missing:
        raise WorkloadError(f"{path} is no checkpoint of {name}: it lacks {', '.join(sorted(missing))}")
    if state["workload"] != name:
        raise WorkloadError(f"{path} belongs to the workload {state['workload']!r}, not to {name!r}")
    if not all(type(state[part]) is int and state[part] >= 0 for part in ("seed", "epoch")):
        raise CheckpointError(
            f"{path} is damaged: seed {state['seed']!r} and epoch {state['epoch']!r} are not counts"
        )


def no_state(name: str) -> WorkloadError:
    """The error of a workload that was neither started nor loaded."""
    return WorkloadError(f"workload {name} has no state yet: call start(seed) or load(checkpoint)")
