"""What the workloads of every framework check alike."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

from ckptflip.errors import CheckpointError, UsageError, WorkloadError


def check_sizes(batch_size: int, test_batch: int, threads: int) -> None:
    """Raise UsageError unless each is 1 or more."""
    if min(batch_size, test_batch, threads) < 1:
        raise UsageError(
            f"batch_size ({batch_size}), test_batch ({test_batch}) and threads ({threads}) must be 1 or more"
        )


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
