"""Parts of a campaign, for as many machines as there are parts: `ckptflip run --shard 2/4`."""

from __future__ import annotations

import re

import msgspec

from ckptflip.errors import UsageError


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
