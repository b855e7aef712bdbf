"""Cells that turn out to have all trials they want, in a store that several runs filled."""

from __future__ import annotations

from ckptflip.campaign import loading
from ckptflip.campaign.cells import expand
from ckptflip.campaign.shards import WHOLE
from ckptflip.campaign.store.writing import Writer
from ckptflip.campaign.trial_stage import finished_trials, unfinished
from ckptflip.errors import CkptflipError


def settle(writer: Writer) -> None:
    """Note why no more trials of a cell are run, where that is so, as the run of one machine does at its end.

    Args:
        writer: of the store.

    Raises:
        CampaignError: the store is damaged.
    """
    try:
        spec = loading.convert(writer.reader.spec())
        cells = expand(spec)
    except CkptflipError:
        return  # an older release's spec: its cells cannot be told
    finished = finished_trials(writer)
    unfinished(spec, [cell for cell in cells if cell.key in finished], finished, writer, WHOLE)
