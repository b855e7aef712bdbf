"""The first stage of a campaign: every clean run is there, as this machine computes it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from ckptflip.campaign import task as tasks
from ckptflip.campaign.attempts import Attempts
from ckptflip.campaign.cells import workload_key
from ckptflip.campaign.events import Happened
from ckptflip.campaign.executors import Executor, Job
from ckptflip.campaign.loading import label_of
from ckptflip.campaign.outcomes import collapsed, nonfinite
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import Writer
from ckptflip.campaign.task import CleanResult, CleanTask, WorkloadSpec
from ckptflip.errors import CampaignError, UsageError


class CleanRun(msgspec.Struct, frozen=True, kw_only=True):
    """A clean run that trials start from.

    Attributes:
        folder: where its checkpoints lie.
        checkpoints: their file names by epoch.
        values: by metric, then by epoch; None: not measured.
        digests: of the whole state by epoch; empty where the workload gives none.
        versions: of the libraries it was trained with.
    """

    folder: Path
    checkpoints: dict[int, str]
    values: dict[str, dict[int, float | None]]
    digests: dict[int, str]
    versions: dict[str, str]

    def checkpoint(self, epoch: int) -> str:
        """The path of a checkpoint."""
        return str(self.folder / self.checkpoints[epoch])


Runs = dict[tuple[str, int], CleanRun]


def clean_folder(store: Path) -> Path:
    """Where a store's clean runs lie."""
    return store.with_name(f"{store.name}.clean")


def run_folder(folder: Path, workload: WorkloadSpec, seed: int) -> Path:
    """Where one clean run lies in the folder of all."""
    return folder / workload_key(workload) / f"seed_{seed}"


def ready(
    campaign: Campaign,
    writer: Writer,
    pool: Executor,
    folder: Path,
    executor: str,
    told: Callable[[Happened], None],
) -> Runs:
    """Train the clean runs, or take up those that lie in their folder.

    Returns:
        The runs by label of the workload and seed.

    Raises:
        CampaignError: one failed, or this machine computes other bits than the store holds.
        UsageError: the runs lack the campaign's metric.
    """
    attempts = Attempts(writer, pool, executor, campaign.executor.retries, told)
    asked: dict[str, tuple[str, CleanTask]] = {}
    for task in _tasks(campaign, writer, folder.resolve()):
        label = label_of(task.workload)
        key = f"clean/{label}/{task.seed}"
        asked[key] = label, task
        # No limit: one trial's time is not a whole training's.
        attempts.submit(Job(key, tasks.encode(task)))
    runs: Runs = {}
    for ended in attempts.ended():
        label, task = asked[ended.key]
        result = ended.result
        if not isinstance(result, CleanResult) or result.state != "done":
            raise CampaignError(
                f"the clean run of {label}, seed {task.seed}, failed ({ended.state}): {ended.message}. "
                "Nothing can be compared without it"
            )
        attempts.note(ended)
        writer.put_run(
            label, task.seed, result.epochs[-1], result.exact, result.checkpoints, result.epochs,
            result.values, result.digests,
        )  # fmt: skip
        runs[label, task.seed] = _run(result, Path(task.folder))
        _check_metric(campaign, label, result)
        _check_clean(campaign, label, result)
        told(Happened(what="clean", text=_said(label, task, result)))
    return runs


def _tasks(campaign: Campaign, writer: Writer, folder: Path) -> list[CleanTask]:
    restart, after = campaign.restart, (0, *campaign.measure.propagation)
    keep = tuple(sorted({epoch + more for epoch in restart.epochs for more in after}))
    until = max(restart.end(epoch) for epoch in restart.epochs)
    # A spec that now ends earlier leaves longer runs as they are.
    known = {(run.workload, run.seed): run for run in writer.reader.runs()}
    found = []
    for workload in campaign.workload:
        for seed in campaign.clean.seeds:
            run = known.get((label_of(workload), seed))
            found.append(
                CleanTask(
                    workload=workload,
                    seed=seed,
                    until=max(until, run.until if run else 0),
                    keep=tuple(sorted({*keep, *(run.checkpoints if run else ())})),
                    folder=str(run_folder(folder, workload, seed)),
                    keras_backend=campaign.keras_backend,
                )
            )
    return found


def _run(result: CleanResult, folder: Path) -> CleanRun:
    return CleanRun(
        folder=folder,
        checkpoints=result.checkpoints,
        values={
            name: dict(zip(result.epochs, values, strict=True)) for name, values in result.values.items()
        },
        digests=dict(zip(result.epochs, result.digests, strict=False)),
        versions=result.versions,
    )


def _check_metric(campaign: Campaign, label: str, result: CleanResult) -> None:
    name = campaign.metric.name
    if name not in result.values or None in result.values[name]:
        whole = [metric for metric, values in result.values.items() if None not in values]
        near = difflib.get_close_matches(name, whole, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it gives {', '.join(whole)}"
        raise UsageError(f"metric.name: workload {label} gives no {name!r} at every epoch; {hint}")


def _check_clean(campaign: Campaign, label: str, result: CleanResult) -> None:
    """Refuse a clean run by which every trial would have collapsed."""
    metric = campaign.metric
    values = dict(zip(result.epochs, result.values[metric.name], strict=True))
    for epoch in campaign.restart.epochs:
        end = campaign.restart.end(epoch)
        broken = [e for i, e in enumerate(result.epochs) if epoch <= e <= end and nonfinite(result.values, i)]
        measured = values[end]
        final = math.nan if measured is None else measured
        if broken:
            raise UsageError(
                f"the clean run of {label} itself has weights or a loss that are NaN or infinite at epoch "
                f"{broken[0]}: nothing can be compared with it"
            )
        if collapsed(final, final, metric):
            raise UsageError(
                f"metric: the clean run of {label} ends with {metric.name} {final:g}, which counts as "
                f"collapsed (chance {metric.chance:g}, {metric.better} is better): correct better or chance"
            )


def _said(label: str, task: CleanTask, result: CleanResult) -> str:
    exact = {True: "a resume repeats it bit for bit", False: "A RESUME DOES NOT REPEAT IT", None: ""}
    return f"clean run of {label}, seed {task.seed}: {task.until} epochs; {exact[result.exact]}".rstrip("; ")
