"""Parts of a campaign, for as many machines as there are parts: `ckptflip run --shard 2/4`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec

from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from ckptflip.campaign.spec import Campaign
    from ckptflip.campaign.store.rows import Cell


class Shard(msgspec.Struct, frozen=True):
    """One part of a campaign.

    Attributes:
        index: from 1.
        of: how many parts there are.
    """

    index: int
    of: int

    def holds(self, position: int, number: int) -> bool:
        """Whether a trial, by its cell's position and its number, belongs to this part."""
        return (position + number) % self.of == self.index - 1


WHOLE = Shard(1, 1)


def parse(text: str) -> Shard:
    """A part as it is written on the command line.

    Raises:
        UsageError: it is none.

    Example:
        >>> parse("2/4")
        Shard(index=2, of=4)
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"shard {text!r}: write 2/4 for the second of four parts")
    return Shard(int(match[1]), int(match[2]))


def check_shard(shard: Shard, spec: Campaign) -> None:
    """Refuse a part of a campaign that cannot be run in parts.

    Raises:
        UsageError: it decides by the outcomes of all its trials.
    """
    if shard.of > 1 and (spec.trials.stop is not None or spec.trials.strata):
        raise UsageError(
            "a stop rule, and strata, decide by the outcomes of all trials, which a shard does not have: "
            "give trials.per_cell without strata, or run it on Ray or Slurm"
        )


def complete_shard(command: str, cells: Sequence[Cell], there: Collection[tuple[int, int]]) -> Shard | None:
    """The part of a campaign that a store holds, all of it and nothing else.

    Args:
        command: that began the store.
        cells: of the spec.
        there: finished trials, by id of the cell and number.

    Returns:
        None where the command asked for no part, or some of it is missing, or other parts' trials are there.
    """
    asked = re.search(r"--shard[ =](\S+)", command)
    if asked is None:
        return None
    try:
        shard = parse(asked[1])
    except UsageError:  # the library's callers write what they like
        return None
    wanted = {(c.id, n) for c in cells for n in range(c.wanted) if shard.holds(c.position, n)}
    return shard if set(there) == wanted else None
