"""Tasks on this machine: warm processes, one task each at a time, any of which may die alone."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign.executors import losses
from ckptflip.campaign.executors.protocol import Executor, Job, Loss, Report
from ckptflip.campaign.executors.spawning import Launcher
from ckptflip.campaign.executors.worker_process import Mark, Setting, begin, run
from ckptflip.errors import CampaignError

_TICK = 0.25  # seconds between two looks for workers that died without a word
_MOST_FAILED_STARTS = 5  # in a row and per worker, before the jobs are given up
# What a start counts for that a signal ended: it shows no broken installation, but a kernel that is short of
# memory may end the next one too.
_KILLED_START = 0.25


def start(
    *,
    workers: int | None,
    call: str,
    folder: Path,
    environment: dict[str, str],
    options: dict[str, Any],
) -> Executor:
    """Start local workers; see `registry.Starter`. There are no options."""
    from ckptflip.campaign.executors.registry import check_options

    check_options("local", options, {})
    return Local(workers or usable_cores(), Setting(call, str(folder), environment, list(sys.path)))


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Slot:
    """One worker: a Pebble pool of one process, which is replaced whenever its process died.

    A pool of several shares locks among its processes: one that is killed with a lock held stops all.
    """

    def __init__(self) -> None:
        from pebble import ProcessPool

        self.pool: ProcessPool | None = None
        self.retired: ProcessPool | None = None
        self.launcher = Launcher()
        self.job: Job | None = None
        self.future: Future[bytes] | None = None
        self.since = 0.0
        self.silent = False

    def open(self, setting: Setting) -> None:
        """Start the worker. By a thread that outlives it, for Linux ends it with that thread."""
        from pebble import ProcessPool

        self.launcher = Launcher()
        pool = ProcessPool(
            max_workers=1, context=self.launcher, initializer=begin, initargs=(msgspec.json.encode(setting),)
        )
        pool.active  # noqa: B018  (starts the process now, so that it is warm when a job comes)
        self.silent, self.pool = False, pool

    def exit_code(self) -> int | None:
        """Of the process that this pool was opened with; None while it lives."""
        return self.launcher.started[0].exitcode if self.launcher.started else None

    def settled_exit_code(self) -> int | None:
        """The same of a process that has just ended: another thread may be about to take its code."""
        for _ in range(100):
            if (code := self.exit_code()) is not None:
                return code
            time.sleep(0.01)
        return None

    def retire(self) -> None:
        """Take no more jobs; at the same time as the job is taken from it, or another would be lost here."""
        if self.pool is not None:
            self.pool.stop()
            self.retired, self.pool = self.pool, None

    def close(self) -> None:
        """Kill the worker of a pool that is retired."""
        if self.retired is None:
            return
        for process in self.launcher.started:
            with contextlib.suppress(ValueError, AttributeError):
                process.kill()
        with contextlib.suppress(RuntimeError):
            self.retired.join()
        self.retired = None


class Local:
    """The executor ``local``."""

    def __init__(self, workers: int, setting: Setting) -> None:
        self._setting = setting
        self._lock = threading.RLock()
        self._slots = [_Slot() for _ in range(workers)]
        self._waiting: deque[Job] = deque()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._outstanding = 0
        self._failed_starts = 0.0
        self._closed = False
        self._lost: queue.SimpleQueue[tuple[_Slot, Future[bytes]] | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="ckptflip workers", daemon=True)
        self._keeper.start()

    @property
    def slots(self) -> int:
        """The number of workers."""
        return len(self._slots)

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs; returns at once."""
        with self._lock:
            if self._closed:
                raise CampaignError("this executor is closed: start another")
            self._waiting.extend(jobs)
            self._outstanding += len(jobs)
        self._feed()

    def wait(self, timeout: float | None = None) -> list[Report]:
        """The reports since the last call; empty at once when nothing was submitted that is not reported."""
        reports: list[Report] = []
        with contextlib.suppress(queue.Empty):
            while True:
                reports.append(self._reports.get(timeout=0 if reports or not self._outstanding else timeout))
                with self._lock:
                    self._outstanding -= 1
        return reports

    def close(self, *, cancel: bool = False) -> None:
        """Free all workers when all jobs have ended; with `cancel`, at once, the rest unreported."""
        while not cancel and self._busy() and self._keeper.is_alive():
            time.sleep(0.02)
        with self._lock:
            self._closed = True
            self._waiting.clear()
            for slot in self._slots:
                slot.job = slot.future = None
            self._outstanding = self._reports.qsize()
        self._lost.put(None)
        self._keeper.join()
        for log in Path(self._setting.folder).glob("worker-*.log"):
            with contextlib.suppress(OSError):
                if not log.stat().st_size:
                    log.unlink()

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._waiting) or any(slot.job is not None for slot in self._slots)

    def _feed(self) -> None:
        """Give waiting jobs to idle workers."""
        with self._lock:
            for slot in self._slots:
                if not self._waiting:
                    return
                if slot.pool is not None and slot.job is None:
                    self._hand(slot, self._waiting.popleft())

    def _hand(self, slot: _Slot, job: Job) -> None:
        assert slot.pool is not None
        losses.forget_mark(self._setting.folder, job.key)
        slot.job, slot.since, slot.silent = job, time.monotonic(), False
        try:
            slot.future = slot.pool.schedule(
                run, args=(job.key, job.payload, job.limits.memory), timeout=job.limits.seconds
            )
        except RuntimeError:  # the worker died idle: the keeper will notice
            slot.job = slot.future = None
            self._waiting.appendleft(job)
            return
        slot.future.add_done_callback(partial(self._ended, slot))

    def _ended(self, slot: _Slot, future: Future[bytes]) -> None:
        """Called by a thread of Pebble when a job has ended in any way."""
        if future.cancelled() or future.exception() is not None:
            self._lost.put((slot, future))
            return
        with self._lock:
            if slot.future is not future:
                return
            self._failed_starts = 0
            self._report(slot, msgspec.msgpack.decode(future.result(), type=Report))
        self._feed()

    def _report(self, slot: _Slot, report: Report) -> None:
        slot.job = slot.future = None
        losses.forget_mark(self._setting.folder, report.key)
        self._reports.put(report)

    def _keep(self) -> None:
        """Start workers, and others for those that died; the thread that all workers are children of."""
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for slot in self._slots:
            self._open(slot)
        while not self._closed:
            with contextlib.suppress(queue.Empty):
                lost = self._lost.get(timeout=_TICK)
                if lost is None:
                    break
                self._take_loss(*lost)
            for slot in self._slots:
                self._look_after(slot)
        for slot in self._slots:
            slot.retire()
        for slot in self._slots:
            slot.close()

    def _open(self, slot: _Slot) -> None:
        slot.close()
        try:
            slot.open(self._setting)
        except Exception as error:  # no process, file or memory is to be had just now
            why = error.__cause__ or error
            message = f"no worker process can be started: {type(why).__name__}: {why}"
            self._start_failed(Loss(state="crashed", message=message))
        self._feed()

    def _look_after(self, slot: _Slot) -> None:
        """Notice a worker that died idle, or ended with code 0 amid a job: Pebble says nothing of these."""
        with self._lock:
            if self._closed:
                return
            dead = slot.pool is None or slot.exit_code() is not None
            future = slot.future
            wait_for_pebble = future is not None and not slot.silent
            slot.silent = dead
            if dead and future is None:
                slot.retire()
        if not dead or (wait_for_pebble and slot.pool is not None):
            return
        if future is not None:
            self._take_loss(slot, future)
        else:
            self._start_failed(losses.before_a_job(slot.exit_code()))
            self._open(slot)

    def _take_loss(self, slot: _Slot, future: Future[bytes]) -> None:
        with self._lock:
            if slot.future is not future or slot.job is None or self._closed:
                return
            job, error = slot.job, future.exception() if future.done() else None
            if future.done() and error is None:
                return  # it answered before it died
            mark = losses.read_mark(self._setting.folder, job.key)
            began = mark is not None or _was_taken(future, error)
            if began:
                self._failed_starts = 0
                self._report(slot, self._loss_report(slot, job, mark, error))
            else:  # no fault of the job's, however often
                slot.job = slot.future = None
                self._waiting.appendleft(job)
            slot.retire()
        if not began:
            self._start_failed(losses.before_a_job(slot.settled_exit_code()))
        self._open(slot)

    def _loss_report(self, slot: _Slot, job: Job, mark: Mark | None, error: BaseException | None) -> Report:
        said = losses.last_words(self._setting.folder, mark)
        if isinstance(error, TimeoutError):
            loss = losses.overdue(job, said)
        else:
            loss = losses.from_exit(slot.settled_exit_code(), job, said)
        return Report(
            key=job.key,
            loss=loss,
            host=os.uname().nodename,
            pid=mark.pid if mark else 0,
            seconds=time.monotonic() - slot.since,
        )

    def _start_failed(self, loss: Loss) -> None:
        """Try again a little later, but not for ever: then the waiting jobs are lost, with the reason."""
        with self._lock:
            self._failed_starts += 1 if loss.signal is None else _KILLED_START
            if self._failed_starts <= _MOST_FAILED_STARTS * len(self._slots):
                given_up: list[Job] = []
            else:
                given_up = list(self._waiting)
                self._waiting.clear()
                self._failed_starts = 0
            for job in given_up:
                self._reports.put(Report(key=job.key, loss=loss))
        time.sleep(min(0.05 * self._failed_starts, 1.0))


def _was_taken(future: Future[bytes], error: BaseException | None) -> bool:
    """Whether Pebble heard that the worker had the job: for one that could leave no mark, on a full disk."""
    from pebble import ProcessExpired

    return future.running() or isinstance(error, TimeoutError | ProcessExpired)
