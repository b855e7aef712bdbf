"""What a job of Slurm runs on its node: a batch of tasks, each report a file as soon as it is there."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import msgspec

from ckptflip.campaign.executors.local import Local
from ckptflip.campaign.executors.spool import Spool


def perform_batch(folder: str, names: list[str], workers: int) -> None:
    """Run the jobs of a batch that have no report yet: all of them, or the rest after a requeue.

    Args:
        folder: of the `Spool`.
        names: of the jobs' files.
        workers: how many run at once.
    """
    # submitit's handlers would requeue or go on: the driver decides, from Slurm's own state.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    spool = Spool(Path(folder))
    logs = Path(folder, "workers", os.environ.get("SLURM_JOB_ID", str(os.getpid())))
    logs.mkdir(parents=True, exist_ok=True)
    local = Local(workers, msgspec.structs.replace(spool.setting(), folder=str(logs)))
    try:
        _perform(spool, local, list(names))
    finally:
        local.close(cancel=True)


def _perform(spool: Spool, local: Local, names: list[str]) -> None:
    todo = names[::-1]
    running: dict[str, str] = {}
    while todo or running:
        while todo and len(running) < local.slots:
            name = todo.pop()
            job = spool.job(name)
            if job is None or spool.report(name) is not None:
                continue  # taken back by the driver, or done before this job was requeued
            spool.begin(name)
            running[job.key] = name
            local.submit([job])
        for report in local.wait():
            spool.put_report(running.pop(report.key), report)
