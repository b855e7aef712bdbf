"""What can be known of a campaign before anything is trained: its workloads, and its policies' selections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ckptflip.campaign import clean, worker
from ckptflip.campaign.cell_checks import check_counts, runs_tried, tried
from ckptflip.campaign.cells import Planned
from ckptflip.campaign.clean_stage import CleanRun, Runs, run_folder
from ckptflip.campaign.loading import label_of
from ckptflip.campaign.spec import Campaign
from ckptflip.errors import CampaignError, CkptflipError


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked for.

    Attributes:
        workloads: that were found and made.
        tried: cells whose policy was drawn once on its clean checkpoint.
        untried: cells with a policy whose clean checkpoint is not there yet.
    """

    workloads: int
    tried: int
    untried: int


def look(campaign: Campaign, cells: Sequence[Planned], folder: Path | None) -> Looked:
    """Look for each workload, and on the checkpoints that are there for what each policy may hit.

    Frameworks are imported; nothing is trained or written.

    Args:
        campaign: the spec.
        cells: its cells.
        folder: of a store's clean runs, which need not be there; None: no store is named.

    Raises:
        CampaignError: a workload is not there, or cannot be made with its options.
        UsageError: a cell is impossible; the message is that of the campaign.
        CkptflipError: access counts cannot be read.
    """
    check_counts(cells)
    for workload in campaign.workload:
        try:
            worker.made(workload, campaign.keras_backend)
        except CkptflipError as why:
            raise CampaignError(
                f"the clean run of {label_of(workload)} would fail: {why}. Nothing can be compared without it"
            ) from None
    runs = {} if folder is None else _runs(campaign, folder.resolve())
    altered = [cell for cell in cells if cell.policy is not None]
    ready = [cell for cell in altered if _is_there(campaign, cell, runs)]
    for cell in ready:
        tried(campaign, cell, runs)
    return Looked(workloads=len(campaign.workload), tried=len(ready), untried=len(altered) - len(ready))


def _is_there(campaign: Campaign, cell: Planned, runs: Runs) -> bool:
    """Whether the checkpoints that the cell would be tried on are trained."""
    needed = runs_tried(campaign, cell)
    return all(run in runs and cell.epoch in runs[run].checkpoints for run in needed)


def _runs(campaign: Campaign, folder: Path) -> Runs:
    """The clean runs as far as they are trained: their checkpoints that are whole."""
    found: Runs = {}
    for workload in campaign.workload:
        for seed in campaign.clean.seeds:
            at = run_folder(folder, workload, seed)
            noted = clean.noted(at)
            there = {epoch: name for epoch, name in noted.checkpoints.items() if name in noted.files}
            found[label_of(workload), seed] = CleanRun(
                folder=at, checkpoints=there, values={}, digests={}, versions=noted.versions
            )
    return found
