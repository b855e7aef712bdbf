"""What became of a worker that gave no answer, from its exit code and the end of its log."""

from __future__ import annotations

import contextlib
import signal

import msgspec

from ckptflip.campaign.executors.guards import OUT_OF_MEMORY
from ckptflip.campaign.executors.protocol import Job, Loss
from ckptflip.campaign.executors.worker_process import Mark, log_path, mark_path

_QUOTED = 2_000  # characters of a log


def read_mark(folder: str, key: str) -> Mark | None:
    """Which process took a job, or None when none did."""
    try:
        return msgspec.json.decode(mark_path(folder, key).read_bytes(), type=Mark)
    except (OSError, msgspec.DecodeError):
        return None


def forget_mark(folder: str, key: str) -> None:
    """Remove the mark of a job, if there is one."""
    with contextlib.suppress(OSError):
        mark_path(folder, key).unlink()


def from_exit(code: int | None, job: Job, said: str = "") -> Loss:
    """The loss of a job whose worker ended.

    Args:
        code: its exit code, negative for a signal; None where unknown.
        job: what it was doing.
        said: the end of its log.

    Example:
        >>> from_exit(-11, Job("a", b""))
        Loss(state='crashed', signal=11, message='the worker was ended by SIGSEGV')
    """
    if code == OUT_OF_MEMORY:
        limit = f"{job.limits.memory:,}" if job.limits.memory else "its limit of"
        return Loss(state="out-of-memory", message=quoting(f"the worker took more than {limit} bytes", said))
    if code is None:
        return Loss(state="crashed", message=quoting("the worker is gone", said))
    if code < 0:
        message = f"the worker was ended by {_signal(-code)}"
        return Loss(state="crashed", signal=-code, message=quoting(message, said))
    return Loss(state="crashed", message=quoting(f"the worker exited with code {code} amid the job", said))


def before_a_job(code: int | None) -> Loss:
    """What jobs are lost with when workers end again and again before they take one.

    Example:
        >>> before_a_job(1).message
        'workers die before they take a job (exit code 1)'
        >>> before_a_job(-11)
        Loss(state='crashed', signal=11, message='workers die before they take a job, by SIGSEGV')
    """
    if code is not None and code < 0:
        return Loss(
            state="crashed", signal=-code, message=f"workers die before they take a job, by {_signal(-code)}"
        )
    return Loss(state="crashed", message=f"workers die before they take a job (exit code {code})")


def overdue(job: Job, said: str = "") -> Loss:
    """The loss of a job that was stopped at its time limit."""
    return Loss(state="hung", message=quoting(f"no answer within {job.limits.seconds:g} s", said))


def last_words(folder: str, mark: Mark | None) -> str:
    """What a worker's log says since it took its last job; at most 2,000 characters, the last ones."""
    if mark is None:
        return ""
    try:
        with log_path(folder, mark.pid).open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(mark.log, size - 4 * _QUOTED))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return text.strip()[-_QUOTED:]


def quoting(message: str, said: str) -> str:
    """A message, and the end of a log behind it where there is one."""
    return f"{message}; its log ends with:\n{said}" if said else message


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, as the kernel does when memory runs out" if number == signal.SIGKILL else name
