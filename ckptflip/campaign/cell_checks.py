"""Whether each cell of a campaign can be carried out: one draw of its policy on its clean checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptflip.campaign.cells import Planned, run_seed, trial_seed
from ckptflip.campaign.clean_stage import Runs
from ckptflip.campaign.scheduling import rounds_of
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.store import Writer
from ckptflip.campaign.store.rows import Stratum
from ckptflip.campaign.strata import CellStratum, strata_of
from ckptflip.checkpoints import opened
from ckptflip.errors import CampaignError, CkptflipError, UsageError
from ckptflip.faults.row_counts import RowCounts

Strata = dict[str, list[CellStratum]]


def check_counts(cells: Sequence[Planned]) -> None:
    """Refuse access counts that are not there before the clean runs, which may take hours."""
    policies = [cell.policy for cell in cells if cell.policy is not None]
    for path in {policy.rows_weight for policy in policies if policy.rows_weight is not None}:
        RowCounts(path)


def checked(
    campaign: Campaign,
    cells: Sequence[Planned],
    runs: Runs,
    finished: Mapping[str, Mapping[int, str]],
    writer: Writer,
) -> Strata:
    """Draw once for every cell, so that an impossible one is found before the first trial.

    Args:
        campaign: the spec.
        cells: its cells.
        runs: the clean runs.
        finished: outcomes of the trials that the store has, by key of the cell and number.
        writer: of the store.

    Returns:
        The strata of the cells that have some, by key of the cell; the store knows them then.

    Raises:
        UsageError: a cell is impossible; the message says which and why.
        CampaignError: the store's trials were drawn from other strata.
    """
    strata: Strata = {}
    for cell in cells:
        if cell.policy is None:
            continue
        if made := tried(campaign, cell, runs):
            strata[cell.key] = made
            writer.put_strata(
                cell.key,
                [Stratum(layer=s.layer, field=s.field, bits=s.bits, weight=s.weight) for s in made],
            )
    if strata:
        _check_drawn(campaign, [cell for cell in cells if cell.key in strata], strata, finished, writer)
    return strata


def tried(campaign: Campaign, cell: Planned, runs: Runs) -> list[CellStratum]:
    """Draw once for a cell that has a policy, and divide what the policy may hit.

    Args:
        campaign: the spec.
        cell: one of its cells.
        runs: at least the clean runs of `runs_tried`, with their checkpoints of the cell's epoch.

    Returns:
        The cell's strata; none where the spec asks for none.

    Raises:
        UsageError: the cell is impossible; the message says which and why.
    """
    try:
        _draw(campaign, cell, runs, _first_run(campaign, cell))
        if not campaign.trials.strata or cell.policy is None:
            return []
        with opened(runs[cell.workload_label, campaign.clean.seeds[0]].checkpoint(cell.epoch)) as target:
            return strata_of(cell.policy, target.tensors, campaign.trials.strata)
    except CkptflipError as why:
        raise UsageError(
            f"the cell {cell.label!r} of {cell.workload_label} at epoch {cell.epoch} is impossible: {why}"
        ) from None


def runs_tried(campaign: Campaign, cell: Planned) -> set[tuple[str, int]]:
    """The clean runs whose checkpoints `tried` reads: label of the workload and seed."""
    seed = _first_run(campaign, cell)
    found = {(cell.workload_label, seed)}
    if campaign.trials.strata:
        found.add((cell.workload_label, campaign.clean.seeds[0]))
    if (label := _drawn_on(campaign, cell)) is not None:
        found.add((label, seed))
    return found


def reference_of(campaign: Campaign, cell: Planned, runs: Runs, seed: int) -> str | None:
    """The checkpoint that equivalent faults are drawn on; None where they are drawn on the cell's own."""
    label = _drawn_on(campaign, cell)
    return None if label is None else runs[label, seed].checkpoint(cell.epoch)


def _drawn_on(campaign: Campaign, cell: Planned) -> str | None:
    label = campaign.trials.equivalent
    return None if label == cell.workload_label or cell.policy is None else label


def _first_run(campaign: Campaign, cell: Planned) -> int:
    """The seed of the clean run that the cell's first trial starts from."""
    return run_seed(campaign, trial_seed(campaign, cell, None, 0))


def _draw(campaign: Campaign, cell: Planned, runs: Runs, run: int) -> None:
    import ckptflip

    seed = trial_seed(campaign, cell, None, 0)
    own = runs[cell.workload_label, run].checkpoint(cell.epoch)
    reference = reference_of(campaign, cell, runs, run)
    drawn = ckptflip.inject(reference or own, policy=cell.policy, seed=seed, dry_run=True)
    if reference is not None:
        ckptflip.replay(drawn, own, map="auto", source=reference, dry_run=True)


def _check_drawn(
    campaign: Campaign,
    cells: Sequence[Planned],
    strata: Strata,
    finished: Mapping[str, Mapping[int, str]],
    writer: Writer,
) -> None:
    """Refuse a store whose trials were drawn from other strata than their outcomes say."""
    stored = writer.finished()
    for cell in cells:
        named = [(stratum.layer, stratum.field) for stratum in strata[cell.key]]
        weights = [stratum.weight for stratum in strata[cell.key]]
        drawn = rounds_of(campaign, cell, finished[cell.key], weights).drawn
        for stratum, numbers in stored.get(cell.key, {}).items():
            if any(n >= len(drawn) or named[drawn[n]] != stratum for n in numbers):
                raise CampaignError(
                    f"{writer.path}: the trials of {cell.label!r} were drawn from other strata than this "
                    "spec draws them from; begin a new store"
                )
