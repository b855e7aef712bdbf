"""What a driver needs of an executor: jobs in, reports out, in any order."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one task may take.

    Attributes:
        seconds: wall time; None: no limit.
        memory: resident bytes of the worker; None: no limit.
    """

    seconds: float | None = None
    memory: int | None = None


class Job(msgspec.Struct, frozen=True):
    """One task on its way.

    Attributes:
        key: names it among all jobs of a campaign, for ever: a trial that is run again has the same key.
        payload: an encoded task, for `ckptflip.campaign.worker.perform`.
        limits: what it may take.
    """

    key: str
    payload: bytes
    limits: Limits = Limits()


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that gave no answer.

    Attributes:
        state: ``crashed``, ``hung`` or ``out-of-memory``.
        signal: the signal that ended it, or None.
        message: in words.
    """

    state: str
    signal: int | None = None
    message: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one attempt: an answer or a loss.

    Attributes:
        key: the job's.
        answer: what `perform` returned, or None.
        loss: what happened to the worker, or None.
        host: where it ran, where that is known.
        pid: of the worker, likewise.
        seconds: wall time of the attempt as the executor saw it.
    """

    key: str
    answer: bytes | None = None
    loss: Loss | None = None
    host: str = ""
    pid: int = 0
    seconds: float = 0.0


class Executor(Protocol):
    """Runs `perform` on payloads, each in a process that may die alone.

    A report comes for every job that was submitted, once: retries are the driver's business. Nothing that an
    executor decides (where, when, beside what) may change an answer. Workers do not outlive a driver that
    was killed, or what they still finish is taken up by the next `start` with the same folder.
    """

    @property
    def slots(self) -> int:
        """How many tasks run at once; the driver keeps about twice as many submitted."""

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs; returns at once. A key may be submitted again once its report was handed out."""

    def wait(self, timeout: float | None = None) -> list[Report]:
        """The reports since the last call; blocks until there is one, or for `timeout` seconds.

        Empty at once when every job was reported. To call it again says that the reports handed out before
        are stored: an executor that keeps them on disk for the next driver may then forget them.
        """

    def close(self, *, cancel: bool = False) -> None:
        """Free all workers when their jobs have ended; `wait` still hands out the reports of these.

        With `cancel`, at once: running jobs are killed and not reported.
        """
