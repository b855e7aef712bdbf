"""Tasks on a Ray cluster, or a small one started here: Ray says where, a local worker there does it."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec

from ckptflip.campaign.executors.protocol import Executor, Job, Loss, Report
from ckptflip.campaign.executors.registry import check_options
from ckptflip.campaign.executors.worker_process import Setting
from ckptflip.errors import CampaignError, MissingExtraError, UsageError

OPTIONS: dict[str, type | tuple[type, ...]] = {
    "address": str,
    "num_cpus": (int, float),
    "num_gpus": (int, float),
    "memory": int,
    "resources": dict,
    "runtime_env": dict,
    "namespace": str,
}
# Before Ray is imported: it reads them then.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def start(
    *,
    workers: int | None,
    call: str,
    folder: Path,
    environment: dict[str, str],
    options: dict[str, Any],
) -> Executor:
    """Connect to a Ray cluster, or start one on this machine; see `registry.Starter`.

    Options: ``address`` of a cluster (``auto``, ``ray://host:10001``); ``num_cpus`` (1), ``num_gpus`` (0; a
    fraction shares one), ``memory`` (bytes) and ``resources`` that Ray sets aside for a task; ``runtime_env``
    and ``namespace`` as ``ray.init`` takes them.
    """
    check_options("ray", options, OPTIONS)
    if options.get("num_cpus", 1) <= 0 or options.get("num_gpus", 0) < 0:
        raise UsageError("executor ray: num_cpus must be above 0, and num_gpus 0 or more")
    try:
        ray = quiet_ray()
    except ImportError as error:
        raise MissingExtraError("Ray", "ray", "executor ray") from error
    ours = connect(ray, workers, options)
    executor = RayTasks(ray, Setting(call, "", environment, list(sys.path)), workers, options, ours=ours)
    if ours and not options.get("address") and not executor.room():
        total = {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        executor.close(cancel=True)
        raise CampaignError(
            f"executor ray: no task with num_cpus {options.get('num_cpus', 1)} and num_gpus "
            f"{options.get('num_gpus', 0)} fits on this machine, which has {total}"
        )
    return executor


def quiet_ray() -> ModuleType:
    """Ray, imported without usage statistics and without its warnings."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    return cast(ModuleType, ray)


def connect(ray: ModuleType, workers: int | None, options: dict[str, Any]) -> bool:
    """Connect unless the caller has; whether it is ours to disconnect.

    Raises:
        CampaignError: there is no such cluster, or none can be started.
    """
    if ray.is_initialized():
        return False
    arguments: dict[str, Any] = {
        name: options[name] for name in ("runtime_env", "namespace") if name in options
    }
    address = options.get("address") or os.environ.get("RAY_ADDRESS", "")
    if address:
        reach(address)
        arguments["address"] = address
    else:
        from ckptflip.campaign.executors.local import usable_cores

        each = max(1, math.ceil(options.get("num_cpus", 1)))
        arguments |= {"num_cpus": workers * each if workers else usable_cores(), "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(logging_level="error", log_to_driver=False, **arguments)
    except Exception as error:  # Ray raises many kinds
        raise CampaignError(
            f"executor ray: no connection to {address or 'a local cluster'}: {type(error).__name__}: "
            f"{str(error).rstrip('. ')}. Is the cluster running (ray status), with the same versions of "
            "Python and Ray as here?"
        ) from error
    return True


def reach(address: str, seconds: float = 10.0) -> None:
    """Refuse an address where nothing answers: Ray itself would try for minutes.

    Raises:
        CampaignError: no connection to ``host:port`` or ``ray://host:port`` within `seconds`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" and the like are Ray's to find
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        raise CampaignError(
            f"executor ray: nothing answers at {address}: {error}. Is the cluster's head running, and is "
            "this its GCS port (6379) or, behind ray://, its client port (10001)?"
        ) from error


class RayTasks:
    """The executor ``ray``."""

    def __init__(
        self, ray: ModuleType, setting: Setting, workers: int | None, options: dict[str, Any], *, ours: bool
    ) -> None:
        self._ray = ray
        self._workers = workers
        self._ours = ours
        self._cpus = float(options.get("num_cpus", 1))
        self._gpus = float(options.get("num_gpus", 0))
        self._setting = msgspec.json.encode(setting)
        self._running: dict[Any, tuple[Job, float]] = {}
        self._late: list[Report] = []
        self._closed = False
        demand = {name: options[name] for name in ("memory", "resources") if name in options}
        # Retries are the driver's business: it counts attempts.
        self._task = ray.remote(perform_here).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, **demand
        )

    @property
    def slots(self) -> int:
        """How many tasks the cluster has room for now; it may grow, and so may this."""
        room = self.room()
        return max(1, min(room, self._workers) if self._workers else room)

    def room(self) -> int:
        """How many tasks fit on the nodes there are."""
        total = self._ray.cluster_resources()
        room = int(total.get("CPU", 0) / self._cpus)
        return min(room, int(total.get("GPU", 0) / self._gpus)) if self._gpus else room

    def submit(self, jobs: list[Job]) -> None:
        """Take jobs; returns at once."""
        if self._closed:
            raise CampaignError("this executor is closed: start another")
        for job in jobs:
            self._running[self._task.remote(self._setting, msgspec.msgpack.encode(job))] = (
                job,
                time.monotonic(),
            )

    def wait(self, timeout: float | None = None) -> list[Report]:
        """The reports since the last call; empty at once when nothing was submitted that is not reported."""
        late, self._late = self._late, []
        if late or not self._running:
            return late
        ray = self._ray
        refs = list(self._running)
        done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        if done:  # and whatever else is there
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [self._report(ref) for ref in done]

    def close(self, *, cancel: bool = False) -> None:
        """Free all workers when all jobs have ended; with `cancel`, at once, the rest unreported."""
        if self._closed:
            return
        self._closed = True
        refs = list(self._running)
        if cancel:
            for ref in refs:
                self._ray.cancel(ref, force=True)
            self._running.clear()
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=30 if cancel else None)
        self._late = [self._report(ref) for ref in list(self._running)]
        if self._ours:
            self._ray.shutdown()

    def _report(self, ref: Any) -> Report:
        job, since = self._running.pop(ref)
        try:
            report: Report = msgspec.msgpack.decode(self._ray.get(ref), type=Report)
        except (
            Exception
        ) as error:  # whatever ended the task: its worker's death, its node's, Ray's own trouble
            return Report(key=job.key, loss=_loss(self._ray, error), seconds=time.monotonic() - since)
        return report


def _loss(ray: ModuleType, error: Exception) -> Loss:
    first = str(error).strip().split("\n")[0]
    message = f"{type(error).__name__}: {first}"
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return Loss(state="out-of-memory", message=message)
    return Loss(state="crashed", message=message)


def perform_here(setting: bytes, job: bytes) -> bytes:
    """What Ray runs: it hands a job to this process' own worker, so limits and losses are as everywhere."""
    executor = _own_worker(setting)
    executor.submit([msgspec.msgpack.decode(job, type=Job)])
    return msgspec.msgpack.encode(executor.wait()[0])


_own: dict[tuple[bytes, str], Executor] = {}


def _own_worker(setting: bytes) -> Executor:
    """Started once in a process of Ray, and warm for all its tasks; it ends with it."""
    from ckptflip.campaign.executors.local import Local

    # Ray may give the next task another GPU, which a framework that has started would not notice.
    ours = (setting, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if ours not in _own:
        while _own:
            _own.popitem()[1].close(cancel=True)
        folder = tempfile.mkdtemp(prefix="ckptflip-ray-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        given = msgspec.json.decode(setting, type=Setting)
        _own[ours] = Local(1, msgspec.structs.replace(given, folder=folder))
    return _own[ours]
