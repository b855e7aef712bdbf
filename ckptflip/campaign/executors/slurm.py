"""Tasks as jobs of Slurm: submitit submits arrays of batches, files in the folder bring the reports back."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign.executors import slurm_queue
from ckptflip.campaign.executors.protocol import Executor, Job, Loss, Report
from ckptflip.campaign.executors.registry import check_options
from ckptflip.campaign.executors.spool import Spool
from ckptflip.campaign.executors.worker_process import Setting
from ckptflip.errors import CampaignError, MissingExtraError, UsageError

OPTIONS: dict[str, type | tuple[type, ...]] = {
    "per_job": int,
    "cpus": int,
    "partition": str,
    "account": str,
    "qos": str,
    "constraint": str,
    "time": (int, str),
    "mem": str,
    "gpus": (int, str),
    "sbatch": dict,
    "setup": list,
    "python": str,
    "poll": (int, float),
    "grace": (int, float),
}
_WORKERS = 32  # where the caller does not say
_MOST_ARRAY = 1000  # Slurm's default MaxArraySize is 1001
_MOST_SUBMISSIONS = 3  # of a task that never began in a job that ended


def start(
    *,
    workers: int | None,
    call: str,
    folder: Path,
    environment: dict[str, str],
    options: dict[str, Any],
) -> Executor:
    """Submit to the Slurm that this machine belongs to; see `registry.Starter`.

    `workers` is how many tasks run at once (32), `cpus` of them in each job. `folder` must be
    on a file system that the nodes share. The options are described in ``docs/executors.md``.
    """
    check_options("slurm", options, OPTIONS)
    for name in ("per_job", "cpus"):
        if options.get(name, 1) < 1:
            raise UsageError(f"executor slurm: {name} is {options[name]}, and must be 1 or more")
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("submitit", "slurm", "executor slurm") from error
    for program in ("sbatch", "squeue", "scancel", "srun"):
        if shutil.which(program) is None:
            raise CampaignError(
                f"executor slurm: {program} is not on this machine: is it a login node of Slurm?"
            )
    jobs = math.ceil((workers or _WORKERS) / options.get("cpus", 1))
    return SlurmJobs(jobs, Setting(call, "", environment, list(sys.path)), folder, options)


class SlurmJobs:
    """The executor ``slurm``.

    A folder serves one driver at a time. What an earlier driver's jobs have finished is reported when it is
    submitted again; those that still run or wait are adopted, and those that cannot be told are cancelled.
    """

    def __init__(self, jobs: int, setting: Setting, folder: Path, options: dict[str, Any]) -> None:
        self._most_jobs = jobs
        self._options = options
        self._per_job = int(options.get("per_job", 1))
        self.name = f"ckptflip-{sha256(str(folder).encode()).hexdigest()[:10]}"
        self._spool = Spool(folder)
        self._record = folder / "submitted.jsonl"
        self._batches: dict[str, list[str]] = {}  # of live jobs of Slurm
        self._wanted: dict[str, Job] = {}
        self._unsent: list[str] = []
        self._delivered: list[str] = []
        self._submissions: Counter[str] = Counter()
        self._ended_since: dict[str, float] = {}
        self._late: list[Report] = []
        self._asked = 0.0
        self._closed = False
        self._take_over(fresh=self._spool.put_setting(setting))

    @property
    def slots(self) -> int:
        """How many tasks fit into the jobs that run at once; more than run at once where these are small."""
        return self._most_jobs * self._per_job

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs, and send full batches; what is left over is sent by `wait` when there is room for it."""
        if self._closed:
            raise CampaignError("this executor is closed: start another")
        live = {name: batch for batch, names in self._batches.items() for name in names}
        for job in jobs:
            name = self._spool.name(job.key)
            if name is not None and name not in self._delivered:
                if self._can_take_up(name, job, name in live):
                    self._wanted[name] = job
                    continue
                if name in live:  # the same task with another payload or other limits
                    slurm_queue.cancel([live[name]])
                    slurm_queue.await_end(self.name, [live[name]])
            name = self._spool.put_job(job)
            self._wanted[name] = job
            self._unsent.append(name)
        self._send(len(self._unsent) // self._per_job * self._per_job)

    def wait(self, timeout: float | None = None) -> list[Report]:
        """The reports since the last call, which says that those of the call before are stored."""
        self._forget_delivered()
        until = math.inf if timeout is None else time.monotonic() + timeout
        pause = 0.05
        while True:
            reports = self._late + self._collect()
            self._late = []
            self._send_rest()
            if reports or not self._wanted or time.monotonic() >= until:
                return reports
            time.sleep(max(0.0, min(pause, until - time.monotonic())))
            pause = min(2 * pause, 1.0)

    def close(self, *, cancel: bool = False) -> None:
        """Free all nodes when all jobs have ended; with `cancel`, at once, the rest unreported."""
        if self._closed:
            return
        if cancel:
            self._wanted.clear()
            slurm_queue.cancel(list(self._batches))
            slurm_queue.await_end(self.name)
        else:
            late: list[Report] = []
            while self._wanted:
                late += self.wait()
            self._late = late
        self._batches.clear()
        self._write_record()
        self._closed = True

    def _take_over(self, *, fresh: bool) -> None:
        """Adopt the jobs of a driver that was killed; cancel them when workers are now set up otherwise."""
        found = slurm_queue.states(self.name)
        if found is None:
            raise CampaignError("executor slurm: squeue does not answer; is slurmctld up (scontrol ping)?")
        live = [job for job, state in found.items() if state not in slurm_queue.ENDED]
        recorded: dict[str, list[str]] = {}
        with contextlib.suppress(OSError):
            for line in self._record.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line of a driver that was killed
                    recorded.update(json.loads(line))
        self._batches = {} if fresh else {job: recorded[job] for job in live if job in recorded}
        strangers = [job for job in live if job not in self._batches]
        slurm_queue.cancel(strangers)
        if strangers:
            slurm_queue.await_end(self.name, strangers)
        self._write_record()

    def _can_take_up(self, name: str, job: Job, live: bool) -> bool:
        """Whether an earlier submission will do: answered, whatever its limits were, or the very same."""
        before, report = self._spool.job(name), self._spool.report(name)
        if before is not None and report is not None and report.answer is not None:
            return before.payload == job.payload
        return before == job and (live or report is not None)

    def _write_record(self) -> None:
        self._record.write_text(
            "".join(json.dumps({job: names}) + "\n" for job, names in self._batches.items())
        )

    def _collect(self) -> list[Report]:
        reports = []
        for name in self._spool.reported() & self._wanted.keys():
            report = self._spool.report(name)
            if report is not None:
                reports.append(self._deliver(name, report))
        self._drop_answered_batches()
        if not reports and time.monotonic() - self._asked > self._options.get("poll", 10):
            reports = self._lost()
            self._asked = time.monotonic()
        return reports

    def _deliver(self, name: str, report: Report) -> Report:
        del self._wanted[name]
        self._submissions.pop(name, None)
        self._delivered.append(name)
        return report

    def _forget_delivered(self) -> None:
        for name in self._delivered:
            self._spool.forget(name)
        self._delivered.clear()

    def _drop_answered_batches(self) -> None:
        for job, names in list(self._batches.items()):
            # Not the adopted ones that nobody asked for yet: their jobs are still there.
            if all(name not in self._wanted and self._spool.job(name) is None for name in names):
                del self._batches[job]
                for path in (self._spool.folder / "submitit").glob(f"{job}_*"):
                    path.unlink(missing_ok=True)

    def _lost(self) -> list[Report]:
        """What jobs that ended have left without a report."""
        found = slurm_queue.states(self.name)
        if found is None or not self._batches:
            return []
        past = (
            slurm_queue.past_states(gone)
            if (gone := [job for job in self._batches if job not in found])
            else {}
        )
        reports = []
        for job in list(self._batches):
            state = found.get(job) or past.get(job, "GONE")
            if state not in slurm_queue.ENDED:
                self._ended_since.pop(job, None)
                continue
            # A file written on a node may be seen here a little later.
            since = self._ended_since.setdefault(job, time.monotonic())
            if time.monotonic() - since >= self._options.get("grace", 60):
                reports += self._write_off(job, state)
        return reports

    def _write_off(self, job: str, state: str) -> list[Report]:
        del self._ended_since[job]
        reports = []
        for name in self._batches.pop(job):
            if name not in self._wanted or name in self._unsent or self._spool.report(name) is not None:
                continue
            task, begun = self._wanted[name], self._spool.begun(name)
            if not begun and state != "CANCELLED" and self._submissions[name] < _MOST_SUBMISSIONS:
                self._unsent.append(name)  # not an attempt: the job ended before its turn came
                continue
            reports.append(self._deliver(name, Report(key=task.key, loss=self._explained(job, state))))
        return reports

    def _explained(self, job: str, state: str) -> Loss:
        from ckptflip.campaign.executors.losses import quoting

        loss, said = slurm_queue.loss(job, state), ""
        with contextlib.suppress(OSError, IndexError):
            log = sorted((self._spool.folder / "submitit").glob(f"{job}_*.err"))[-1]
            said = log.read_text(errors="replace").strip()[-2000:]
        return msgspec.structs.replace(loss, message=quoting(loss.message, said))

    def _send_rest(self) -> None:
        """Submit all batches, one that is not full when there is room for it now."""
        full = len(self._unsent) // self._per_job
        room = len(self._batches) + full < self._most_jobs
        self._send(len(self._unsent) if room else full * self._per_job)

    def _send(self, count: int) -> None:
        """Submit the first tasks that wait, in arrays of batches."""
        names, self._unsent = self._unsent[:count], self._unsent[count:]
        batches = [names[at : at + self._per_job] for at in range(0, len(names), self._per_job)]
        for at in range(0, len(batches), _MOST_ARRAY):
            self._send_array(batches[at : at + _MOST_ARRAY])

    def _send_array(self, batches: list[list[str]]) -> None:
        from submitit.core.utils import FailedJobError
        from submitit.slurm.slurm import SlurmExecutor

        from ckptflip.campaign.executors.slurm_job import perform_batch

        n, workers = len(batches), self._options.get("cpus", 1)
        executor = SlurmExecutor(self._spool.folder / "submitit", python=self._options.get("python"))
        executor.update_parameters(**self._parameters(batches))
        try:
            sent = executor.map_array(perform_batch, [str(self._spool.folder)] * n, batches, [workers] * n)
        except FailedJobError as error:
            said = str(error).strip().split("\n")[-1]
            raise CampaignError(f"executor slurm: sbatch refused the jobs: {said}") from error
        with self._record.open("a") as record:
            for job, names in zip(sent, batches, strict=True):
                self._batches[job.job_id] = names
                self._submissions.update(names)
                record.write(json.dumps({job.job_id: names}) + "\n")

    def _parameters(self, batches: list[list[str]]) -> dict[str, Any]:
        options = self._options
        extra: dict[str, Any] = {"requeue": True}
        if isinstance(options.get("time"), str):
            extra["time"] = options["time"]
        if "gpus" in options:
            extra["gpus"] = options["gpus"]
        for name in ("mem", "account", "qos", "constraint", "partition"):
            if name in options:
                extra[name] = options[name]
        extra |= {str(name).lstrip("-"): value for name, value in options.get("sbatch", {}).items()}
        return {
            "job_name": self.name,
            "cpus_per_task": options.get("cpus", 1),
            "time": options["time"] if isinstance(options.get("time"), int) else self._minutes(batches),
            "array_parallelism": self._most_jobs,
            "setup": options.get("setup"),
            "wckey": None,
            "additional_parameters": extra,
        }

    def _minutes(self, batches: list[list[str]]) -> int | None:
        """Enough for the longest batch, when every task has a time limit; else as the partition has it."""
        limits = [[self._wanted[name].limits.seconds for name in names] for names in batches]
        known = [[seconds for seconds in names if seconds is not None] for names in limits]
        if known != limits:
            return None
        lanes = int(self._options.get("cpus", 1))
        most = max(max(names) * math.ceil(len(names) / lanes) for names in known)
        return math.ceil(most / 60 * 1.1) + 5
