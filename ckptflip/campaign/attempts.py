"""Attempts at jobs: a worker that died is tried again, each attempt is noted, each job ends once."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ckptflip.campaign import task as tasks
from ckptflip.campaign.events import Happened, Told
from ckptflip.campaign.executors import Executor, Job, Report
from ckptflip.campaign.store import Writer
from ckptflip.campaign.store.rows import NewAttempt
from ckptflip.campaign.task import Result, TrialResult


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A job that will not be tried again.

    Attributes:
        key: the job's.
        state: one of `ckptflip.campaign.task.STATES`.
        signal: that ended the worker, or None.
        message: what went wrong, else empty.
        result: what came back; None where nothing did.
        attempt: the last attempt, for the store.
    """

    key: str
    state: str
    signal: int | None
    message: str
    result: Result | None
    attempt: NewAttempt


class Attempts:
    """The jobs under way.

    Args:
        writer: attempts are noted there.
        pool: runs them.
        executor: its name.
        retries: further attempts when a worker died. What ran out of time or memory is not tried again: it
            would once more.
        told: called when an attempt was lost.
    """

    def __init__(self, writer: Writer, pool: Executor, executor: str, retries: int, told: Told) -> None:
        self._writer, self._pool, self._executor = writer, pool, executor
        self._retries, self._told = retries, told
        self._jobs: dict[str, Job] = {}
        self._lost: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, *jobs: Job) -> None:
        """Hand jobs to the executor."""
        self._jobs |= {job.key: job for job in jobs}
        self._pool.submit(list(jobs))

    def some(self) -> Iterator[Ended]:
        """Wait until some attempts ended; those jobs among them that are over."""
        for report in self._pool.wait():
            if (job := self._jobs.get(report.key)) is None:
                continue
            ended = self._ended(report)
            if report.loss is not None and report.loss.state == "crashed":
                self._lost[job.key] = self._lost.get(job.key, 0) + 1
                if self._lost[job.key] <= self._retries:
                    self.note(ended)
                    self._told(Happened(what="lost", text=f"{job.key}: {ended.message}; it is tried again"))
                    self._pool.submit([job])
                    continue
            del self._jobs[job.key]
            yield ended

    def ended(self) -> Iterator[Ended]:
        """All jobs as they end, until none is left."""
        while self._jobs:
            yield from self.some()

    def note(self, ended: Ended) -> None:
        """Note an attempt that gave no trial."""
        self._writer.put_attempt(ended.attempt)

    def _ended(self, report: Report) -> Ended:
        result: Result | None = None
        loss = report.loss
        state, signal, message = "crashed", None, "the worker gave no answer"
        if loss is not None:
            state, signal, message = loss.state, loss.signal, loss.message
        elif report.answer is not None:
            try:
                result = tasks.decode_result(report.answer)
                state, message = result.state, result.message
            except msgspec.MsgspecError as error:
                message = f"the worker's answer cannot be read: {error}"
        attempt = NewAttempt(
            task=report.key, state=state, executor=self._executor, signal=signal, message=message,
            seconds=report.seconds, phases=_phases(result), host=report.host or getattr(result, "host", ""),
            pid=report.pid, versions=result.versions if result is not None else {},
        )  # fmt: skip
        return Ended(
            key=report.key, state=state, signal=signal, message=message, result=result, attempt=attempt
        )


def _phases(result: Result | None) -> dict[str, float]:
    if isinstance(result, TrialResult):
        return result.seconds
    return {"total": result.seconds} if result is not None else {}
