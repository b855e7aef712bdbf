"""What a ``with`` block of faults is made of, and how it says that one did not fire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct


class FaultWarning(UserWarning):
    """A fault in a running model that will not, or did not, take effect as it was asked for."""


class Count(Struct, frozen=True):
    """What happened at one place.

    Attributes:
        name: of the place: ``state``, ``gradients``, ``inputs``, ``activations/conv1``, …
        called: how often it was passed in calls that were due; of state and gradients, how often faults were
            drawn.
        fired: how often something was hit there.
        hit: bits that were drawn.
        effective: bits that differed before and after.
    """

    name: str
    called: int
    fired: int
    hit: int
    effective: int


class Part(Protocol):
    """One kind of faults in a ``with`` block.

    Attributes:
        calls: of the model so far; 0 where they are not counted.
        clamped: ids that were clamped.
    """

    @property
    def calls(self) -> int: ...

    @property
    def clamped(self) -> int: ...

    def counts(self) -> Iterable[Count]:
        """What happened at each place."""
        ...

    def doubts(self) -> list[str]:
        """Before the block: what may keep faults from firing."""
        ...

    def begin(self) -> None:
        """Put faults or hooks in."""
        ...

    def end(self) -> list[str]:
        """Take hooks off, restore what was hit; what to warn of."""
        ...

    def silences(self) -> list[str]:
        """After the block: what did not fire, and why."""
        ...
