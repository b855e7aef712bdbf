"""What Slurm says of jobs: their states from squeue, or from sacct where squeue has forgotten them."""

from __future__ import annotations

import getpass
import re
import subprocess
import time

from ckptflip.campaign.executors.protocol import Loss
from ckptflip.errors import CampaignError

# The states of jobs that will not run any more; all others are pending, running or between the two.
ENDED = frozenset(
    [
        "COMPLETED",
        "FAILED",
        "CANCELLED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "OUT_OF_MEMORY",
        "BOOT_FAIL",
        "DEADLINE",
        "REVOKED",
        "LAUNCH_FAILED",
        "GONE",
    ]
)
_PATIENCE = 60  # seconds for one answer of Slurm


def states(name: str) -> dict[str, str] | None:
    """The states of all jobs of this user that squeue still knows under a name, by id (``12`` or ``12_0``).

    Returns:
        None when Slurm does not answer just now.
    """
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T"]
    text = _ask([*command, f"--name={name}", f"--user={getpass.getuser()}"])
    return None if text is None else parse(text)


def past_states(ids: list[str]) -> dict[str, str]:
    """The states of jobs by the accounting; empty where there is none."""
    text = _ask(
        ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", "-j", ",".join(ids)]
    )
    return parse(text or "")


def parse(text: str) -> dict[str, str]:
    """Lines ``id|STATE``, with words behind the state.

    Example:
        >>> parse("12_0|RUNNING\\n12_1|CANCELLED by 1000\\n")
        {'12_0': 'RUNNING', '12_1': 'CANCELLED'}
    """
    found = {}
    for line in text.splitlines():
        job, _, state = line.strip().partition("|")
        if word := re.match(r"[A-Z_]+", state):
            found[job] = word[0]
    return found


def cancel(ids: list[str]) -> None:
    """Cancel jobs; those that ended before are none the worse."""
    for at in range(0, len(ids), 500):
        _ask(["scancel", *ids[at : at + 500]])


def await_end(name: str, ids: list[str] | None = None, seconds: float = 60.0) -> None:
    """Wait until jobs under a name have left their nodes: those listed, or all.

    Raises:
        CampaignError: they did not, in that time.
    """
    until = time.monotonic() + seconds
    while True:
        found = states(name)
        live = {job for job, state in (found or {}).items() if state not in ENDED}
        left = live if ids is None else live & set(ids)
        if found is not None and not left:
            return
        if time.monotonic() > until:
            listed = ", ".join(sorted(left)) or "unknown, for Slurm does not answer"
            raise CampaignError(
                f"executor slurm: jobs named {name} do not end: {listed}. Look at them with squeue, end them "
                "with scancel, and start again; what is finished is kept"
            )
        time.sleep(0.2)


def loss(job: str, state: str) -> Loss:
    """What is reported of a task that had begun in a job of Slurm that ended without its answer.

    Example:
        >>> loss("12_0", "TIMEOUT").state
        'hung'
    """
    kinds = {"TIMEOUT": "hung", "OUT_OF_MEMORY": "out-of-memory"}
    said = "is gone from the queue" if state == "GONE" else f"ended as {state}"
    return Loss(state=kinds.get(state, "crashed"), message=f"Slurm's job {job} {said} before it answered")


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except FileNotFoundError as error:
        raise CampaignError(
            f"executor slurm: {command[0]} is not on this machine: is it a login node?"
        ) from error
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
