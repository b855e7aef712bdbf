"""The second stage of a campaign: missing trials are run, judged and stored, until every cell has enough."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from ckptflip.campaign import task as tasks
from ckptflip.campaign.attempts import Attempts, Ended
from ckptflip.campaign.cell_checks import Strata, reference_of
from ckptflip.campaign.cells import Planned, run_seed, trial_seed
from ckptflip.campaign.clean_stage import CleanRun, Runs
from ckptflip.campaign.events import Happened, Told
from ckptflip.campaign.executors import Executor, Job, Limits
from ckptflip.campaign.outcomes import Judgement, judge
from ckptflip.campaign.scheduling import Due, Past, due
from ckptflip.campaign.shards import Shard
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import Writer
from ckptflip.campaign.store.rows import NewTrial
from ckptflip.campaign.strata import CellStratum
from ckptflip.campaign.task import TrialResult, TrialTask

Finished = dict[str, dict[int, str]]


class _Ticket(msgspec.Struct, frozen=True):
    """A trial under way."""

    cell: Planned
    number: int
    stratum: CellStratum | None
    seed: int
    run_seed: int


def finished_trials(writer: Writer) -> Finished:
    """Outcomes of the finished trials (empty where one failed), by key of the cell and number."""
    keys = {cell.id: cell.key for cell in writer.reader.cells(current=False)}
    found: Finished = {key: {} for key in keys.values()}
    trials = writer.reader.trials()
    for cell, number, outcome in zip(
        trials.cell.tolist(), trials.number.tolist(), trials.outcome, strict=True
    ):
        found[keys[cell]][number] = outcome
    return found


def unfinished(
    campaign: Campaign, cells: Sequence[Planned], finished: Finished, writer: Writer, shard: Shard
) -> bool:
    """Whether any cell wants trials that are not there, as far as that is known without the clean runs.

    A cell that turns out to have all it wants, as after a merge, is marked so.
    """
    stopped = {cell.key for cell in writer.reader.cells() if cell.stopped is not None}
    found = False
    for cell in cells:
        if cell.key in stopped:
            continue
        if campaign.trials.strata and cell.policy is not None:
            found = True
            continue
        asked = due(campaign, cell, finished[cell.key])
        if _missing(asked, finished[cell.key], cell, shard):
            found = True
        elif asked.reason is not None:
            writer.stop_cell(cell.key, asked.reason)
    return found


class Stage:
    """The trials of a campaign, as they are run.

    Args:
        campaign: the spec.
        cells: its cells.
        runs: the clean runs.
        strata: of the cells that have some.
        finished: the trials that the store has; those that are run are added.
        writer: of the store.
        pool: runs the trials.
        executor: its name.
        limits: of one trial.
        shard: the part of the campaign that is run here.
        told: called when something happened.
    """

    def __init__(
        self,
        campaign: Campaign,
        cells: Sequence[Planned],
        runs: Runs,
        strata: Strata,
        finished: Finished,
        writer: Writer,
        pool: Executor,
        executor: str,
        limits: Limits,
        shard: Shard,
        told: Told,
    ) -> None:
        self._campaign, self._runs, self._strata = campaign, runs, strata
        self._writer, self._slots, self._limits, self._shard = writer, pool.slots, limits, shard
        self._told = told
        self._attempts = Attempts(writer, pool, executor, campaign.executor.retries, told)
        self._finished = finished
        self._open = {cell.key: cell for cell in cells}
        self._past = {key: Past() for key in self._open}
        self._queue: deque[_Ticket] = deque()
        self._tickets: dict[str, _Ticket] = {}
        self._outstanding = dict.fromkeys(self._open, 0)
        outcomes = [outcome for key in self._open for outcome in self._finished[key].values()]
        self._done, self._failed = len(outcomes), outcomes.count("")
        self._other_versions = False

    def work(self) -> None:
        """Run what is missing; returns when every cell has enough."""
        while True:
            self._fill()
            if not len(self._attempts):
                return
            for ended in self._attempts.some():
                self._take(ended)

    def _fill(self) -> None:
        """Keep about twice as many trials submitted as run at once."""
        room = 2 * self._slots - len(self._attempts)
        if room > len(self._queue):
            self._ask_cells()
        jobs: list[Job] = []
        while self._queue and len(jobs) < room:
            ticket = self._queue.popleft()
            key = f"trial/{ticket.cell.key}/{ticket.number}"
            self._tickets[key] = ticket
            jobs.append(Job(key, tasks.encode(self._task(ticket)), self._limits))
        if jobs:
            self._attempts.submit(*jobs)

    def _ask_cells(self) -> None:
        """Queue what open cells want next; low numbers first, so that all cells advance together."""
        wanted: list[_Ticket] = []
        for key, cell in list(self._open.items()):
            if self._outstanding[key]:
                continue
            strata = self._strata.get(key, [])
            asked = due(
                self._campaign, cell, self._finished[key], [s.weight for s in strata], self._past[key]
            )
            missing = _missing(asked, self._finished[key], cell, self._shard)
            if not missing:
                del self._open[key]
                if self._shard.of == 1:
                    self._writer.stop_cell(key, asked.reason)
                continue
            wanted += [self._ticket(cell, number, at) for number, at in missing]
            self._outstanding[key] = len(missing)
        self._queue.extend(sorted(wanted, key=lambda ticket: (ticket.number, ticket.cell.position)))

    def _ticket(self, cell: Planned, number: int, at: int | None) -> _Ticket:
        stratum = None if at is None else self._strata[cell.key][at]
        named = None if stratum is None else (stratum.layer, stratum.field)
        seed = trial_seed(self._campaign, cell, named, number)
        return _Ticket(cell, number, stratum, seed, run_seed(self._campaign, seed))

    def _task(self, ticket: _Ticket) -> TrialTask:
        cell, campaign = ticket.cell, self._campaign
        run = self._run(ticket)
        return TrialTask(
            workload=cell.workload,
            checkpoint=run.checkpoint(cell.epoch),
            epoch=cell.epoch,
            until=cell.until,
            policy=cell.policy if ticket.stratum is None else ticket.stratum.policy,
            seed=ticket.seed,
            reference=reference_of(campaign, cell, self._runs, ticket.run_seed),
            clean={e: d for e, d in run.digests.items() if cell.epoch <= e <= cell.until},
            collapsed=campaign.shortcuts.collapsed,
            # A restart without change is there to be trained.
            identical=campaign.shortcuts.identical and cell.policy is not None,
            propagation={
                cell.epoch + after: run.checkpoint(cell.epoch + after)
                for after in campaign.measure.propagation
            },
            most_flips=campaign.measure.flips,
            keras_backend=campaign.keras_backend,
        )

    def _run(self, ticket: _Ticket) -> CleanRun:
        return self._runs[ticket.cell.workload_label, ticket.run_seed]

    def _take(self, ended: Ended) -> None:
        ticket = self._tickets.pop(ended.key)
        ended = _judgeable(ended, self._campaign)
        trial = self._failure(ticket, ended)
        if isinstance(ended.result, TrialResult) and ended.state == "done":
            trial = _success(trial, ended.result, self._run(ticket), self._campaign)
            self._look_at_versions(ended.result, self._run(ticket))
        self._writer.put_trial(trial, ended.attempt)
        self._finished[ticket.cell.key][ticket.number] = trial.outcome or ""
        self._outstanding[ticket.cell.key] -= 1
        self._done += 1
        self._failed += trial.outcome is None
        became = trial.outcome or f"{trial.state}: {trial.message}"
        text = f"{ticket.cell.label}, trial {ticket.number}: {became}"
        wanted = self._done + len(self._queue) + len(self._attempts)
        self._told(Happened(what="trial", text=text, done=self._done, wanted=wanted, failed=self._failed))

    def _failure(self, ticket: _Ticket, ended: Ended) -> NewTrial:
        stratum = ticket.stratum
        return NewTrial(
            cell=ticket.cell.key,
            stratum=None if stratum is None else (stratum.layer, stratum.field),
            number=ticket.number,
            workload=ticket.cell.workload_label,
            run_seed=ticket.run_seed,
            seed=ticket.seed,
            state=ended.state,
            signal=ended.signal,
            message=ended.message,
        )

    def _look_at_versions(self, result: TrialResult, run: CleanRun) -> None:
        differ = [n for n, v in result.versions.items() if n in run.versions and run.versions[n] != v]
        if differ and not self._other_versions:
            self._other_versions = True
            self._told(
                Happened(
                    what="note",
                    text=f"the clean runs were trained with another {', '.join(differ)}: comparisons "
                    "with them may no longer be exact. Begin a new store to be sure",
                )
            )


def _missing(
    asked: Due, finished: Mapping[int, str], cell: Planned, shard: Shard
) -> list[tuple[int, int | None]]:
    return [
        (number, at)
        for number, at in asked.trials
        if number not in finished and shard.holds(cell.position, number)
    ]


def _judgeable(ended: Ended, campaign: Campaign) -> Ended:
    """The end of a trial; one without the campaign's metric at every epoch has crashed."""
    result, name = ended.result, campaign.metric.name
    if not isinstance(result, TrialResult) or ended.state != "done":
        return ended
    if result.epochs and None not in result.values.get(name, (None,)):
        return ended
    message = f"the altered workload gave no {name!r} at some epoch"
    attempt = msgspec.structs.replace(ended.attempt, state="crashed", message=message)
    return msgspec.structs.replace(ended, state="crashed", message=message, attempt=attempt)


def _success(trial: NewTrial, result: TrialResult, run: CleanRun, campaign: Campaign) -> NewTrial:
    epochs, last = result.epochs, max(run.digests or run.values[campaign.metric.name])
    until = min(last, campaign.restart.end(epochs[0]))
    identical = result.ended == "identical" or (
        bool(result.digest) and epochs[-1] == until and result.digest == run.digests.get(until)
    )
    clean = {e: math.nan if v is None else v for e, v in run.values[campaign.metric.name].items()}
    made: Judgement = judge(epochs, result.values, clean, campaign.metric, identical=identical, until=until)
    return msgspec.structs.replace(
        trial,
        outcome=made.outcome,
        ended=result.ended,
        ended_epoch=epochs[-1],
        recovered=made.recovered,
        right_after=_number(made.right_after),
        final=_number(made.final),
        clean_final=_number(made.clean_final),
        counts=result.counts,
        digest=run.digests.get(until, "") if identical else result.digest,
        values=_completed(result, run, until),
        flips=result.flips,
        flips_kept=result.flips is not None or result.counts is None,
        spread=result.spread,
    )


def _completed(
    result: TrialResult, run: CleanRun, until: int
) -> tuple[tuple[int, ...], dict[str, tuple[float | None, ...]]]:
    """A trial's rows; one that became identical goes on as the clean run did."""
    if result.ended != "identical":
        return result.epochs, result.values
    more = range(result.epochs[-1] + 1, until + 1)
    nothing: dict[int, float | None] = {}
    names = dict.fromkeys([*result.values, *run.values])
    before = (None,) * len(result.epochs)
    return (*result.epochs, *more), {
        name: (*result.values.get(name, before), *(run.values.get(name, nothing).get(e) for e in more))
        for name in names
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
