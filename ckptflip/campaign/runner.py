"""The driver of a campaign: what is missing is run, what comes back is judged and stored, until all is there.

It can be killed at any moment: what is finished is in the store, and the next call goes on from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign import loading
from ckptflip.campaign.cell_checks import check_counts, checked
from ckptflip.campaign.cells import Planned, expand
from ckptflip.campaign.clean_stage import clean_folder, ready
from ckptflip.campaign.events import Happened, Told
from ckptflip.campaign.executors import Limits, start
from ckptflip.campaign.machine import command_line, environment_of, machine, versions
from ckptflip.campaign.shards import WHOLE, Shard, check_shard
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import Writer, writing
from ckptflip.campaign.store.rows import Cell
from ckptflip.campaign.trial_stage import Finished, Stage, finished_trials, unfinished
from ckptflip.errors import FailedTrialsError, UsageError


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a call of `run` did.

    Attributes:
        cells: of the campaign.
        ran: trials that this call finished.
        found: trials that were finished before.
        failed: trials that crashed, hung or ran out of memory, in all.
        seconds: wall time.
        rest: whether trials are left for other shards.
    """

    cells: int
    ran: int
    found: int
    failed: int
    seconds: float
    rest: bool = False


def run(
    campaign: Campaign | str | Path,
    store: str | Path,
    *,
    executor: str | None = None,
    workers: int | None = None,
    shard: Shard = WHOLE,
    extend: bool = False,
    retry: bool = False,
    told: Told | None = None,
    command: str = "",
    cells: Sequence[Planned] | None = None,
) -> Summary:
    """Run a campaign, or what is missing of it.

    Args:
        campaign: the spec, or its TOML file.
        store: the SQLite file; made when missing. Clean runs are kept beside it, in ``<store>.clean``.
        executor: instead of the spec's.
        workers: instead of the spec's.
        shard: run only this part; `merge` unites the stores.
        extend: accept an edited spec: more cells, more trials. Finished trials stay as they are.
        retry: try trials again that crashed, hung or ran out of memory.
        told: called when something happened.
        command: the command line, for the store.
        cells: the spec's, as `expand` gave them; None: they are expanded here.

    Raises:
        UsageError: the spec makes no sense, or is another than the store's and `extend` is not given.
        CampaignError: the store cannot be used, a clean run failed, or the executor cannot be started.
        FailedTrialsError: the campaign is complete, and some of its trials failed.
    """
    began = time.perf_counter()
    spec = campaign if isinstance(campaign, Campaign) else loading.load(campaign)
    cells = expand(spec) if cells is None else cells
    check_shard(shard, spec)
    store = Path(store)
    with writing(store) as writer:
        _check_labels(writer, cells)
        edited = _revise(writer, spec, cells, extend, command)
        writer.put_cells([_row(cell) for cell in cells], reopen=edited)
        if retry:
            _drop_failed(writer, told)
        finished = finished_trials(writer)
        found, _ = _count(finished, cells)
        if unfinished(spec, cells, finished, writer, shard):
            _work(spec, cells, finished, writer, store, shard, executor, workers, told or _silent)
        # A shard may have been the last one that this store lacked.
        rest = shard != WHOLE and unfinished(spec, cells, finished, writer, WHOLE)
        total, failed = _count(finished, cells)
    if not failed:
        # Logs of workers, which nobody asks for now.
        shutil.rmtree(_spool(store), ignore_errors=True)
    summary = Summary(
        cells=len(cells),
        ran=total - found,
        found=found,
        failed=failed,
        seconds=time.perf_counter() - began,
        rest=rest,
    )
    if failed:
        raise FailedTrialsError(
            f"{failed} of {total} trials failed: `ckptflip status {store}` lists them by cell, the report "
            "says why each one did. --retry tries them again"
        )
    return summary


def _work(
    spec: Campaign,
    cells: Sequence[Planned],
    finished: Finished,
    writer: Writer,
    store: Path,
    shard: Shard,
    executor: str | None,
    workers: int | None,
    told: Told,
) -> None:
    check_counts(cells)
    name = executor or spec.executor.name
    same = name == spec.executor.name
    pool = start(
        name,
        workers=workers if workers is not None else spec.executor.workers,
        folder=_spool(store),
        environment=environment_of(spec),
        options=dict(spec.executor.options) if same else {},
    )
    complete = False
    try:
        runs = ready(spec, writer, pool, clean_folder(store), name, told)
        strata = checked(spec, cells, runs, finished, writer)
        limits = Limits(seconds=spec.executor.seconds, memory=spec.executor.memory)
        Stage(spec, cells, runs, strata, finished, writer, pool, name, limits, shard, told).work()
        complete = True
    finally:
        pool.close(cancel=not complete)


def _revise(writer: Writer, spec: Campaign, cells: Sequence[Planned], extend: bool, command: str) -> bool:
    """Take note of a new or edited spec, or refuse it; whether it is edited."""
    revisions = writer.reader.revisions()
    mark = loading.fingerprint(spec)
    if revisions and revisions[-1].fingerprint != mark:
        old = loading.convert(revisions[-1].spec)
        _check_edited(old, spec, extend, writer.reader.path)
        if old.trials.stop is None and spec.trials.stop is None:  # how far a rule went is its own affair
            _check_amounts(writer, cells)
    if not revisions or revisions[-1].fingerprint != mark:
        writer.revise(
            spec=loading.plain_of(spec), fingerprint=mark, command=command or command_line(),
            versions=versions(), machine=machine(),
        )  # fmt: skip
        return bool(revisions)
    return False


def _spool(store: Path) -> Path:
    """The executor's folder of a store."""
    return store.with_name(f"{store.name}.spool")


def _check_labels(writer: Writer, cells: Sequence[Planned]) -> None:
    """Refuse another label for a workload that has cells: its clean runs and trials go by the old one."""
    known = {cell.key: cell.workload for cell in writer.reader.cells(current=False)}
    for cell in cells:
        label = known.get(cell.key, cell.workload_label)
        if label != cell.workload_label:
            raise UsageError(
                f"workload {cell.workload_label!r} is called {label!r} in {writer.path}: keep its label, or "
                "name another store"
            )


def _check_amounts(writer: Writer, cells: Sequence[Planned]) -> None:
    """Refuse a spec that fixes fewer trials of a cell than it has: a finished one is never taken away."""
    counts, asked = writer.reader.counts(), {cell.key: cell.wanted for cell in cells}
    for row in writer.reader.cells():
        done = counts[row.id].trials if row.id in counts else 0
        if done > asked.get(row.key, done):
            raise UsageError(
                f"{writer.path} has {done} trials of {row.label!r}, and the spec wants {asked[row.key]}: "
                f"--extend adds trials and takes none away. Ask for {done} or more, or name another store"
            )


def _drop_failed(writer: Writer, told: Told | None) -> None:
    """Make room for failed trials to be tried again, where that changes nothing else."""
    drawn = {stratum.cell for stratum in writer.reader.strata()}
    cells = writer.reader.cells()
    writer.drop_failed([cell.key for cell in cells if cell.id not in drawn])
    if drawn and told is not None:
        told(
            Happened(
                what="note",
                text="trials that are drawn by stratum are not tried again: their outcomes decided where "
                "later ones were drawn",
            )
        )


def _check_edited(old: Campaign, new: Campaign, extend: bool, store: Path) -> None:
    before, after = loading.core(old), loading.core(new)
    if changed := [name for name in after if before.get(name) != after[name]]:
        raise UsageError(
            f"{store} was begun with another spec; it differs in: {', '.join(changed)}, so that its trials "
            "would not be comparable with new ones. Name another store"
        )
    if not extend:
        plain = [loading.plain_of(campaign) for campaign in (old, new)]
        differ = [key for key in plain[0] if plain[0][key] != plain[1][key]]
        raise UsageError(
            f"{store} was begun with another spec; it differs in: {', '.join(differ)}. --extend adds what is "
            "new and keeps what is finished; or name another store (one without finished trials may go)"
        )


def _row(cell: Planned) -> Cell:
    policy: Any = None if cell.policy is None else msgspec.to_builtins(cell.policy)
    return Cell(
        key=cell.key, position=cell.position, workload=cell.workload_label, epoch=cell.epoch,
        until=cell.until, label=cell.label, wanted=cell.wanted, policy=policy, swept=cell.swept,
    )  # fmt: skip


def _count(finished: Finished, cells: Sequence[Planned]) -> tuple[int, int]:
    """Finished trials of the spec's cells, and how many of them failed."""
    outcomes = [outcome for cell in cells for outcome in finished[cell.key].values()]
    return len(outcomes), outcomes.count("")


def _silent(_: Happened) -> None:
    """Tell nobody."""
