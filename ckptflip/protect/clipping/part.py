"""What clipping gives its user: what was clipped so far, and how to take it off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from msgspec import Struct

from ckptflip.protect.clipping.bounds import Bounds


class Seen(Struct, frozen=True):
    """How often a layer was clipped.

    Attributes:
        layer: its name.
        calls: how often it was called.
        fired: in how many of them a value was beyond the bounds, or NaN.
        values: how many such values there were.
    """

    layer: str
    calls: int
    fired: int
    values: int


class Clipped:
    """A model whose layers are clipped, until `remove` or the end of a ``with`` block.

    Attributes:
        bounds: what is let through.
    """

    def __init__(
        self, bounds: Bounds, seen: Sequence[Callable[[], Seen]], undo: Sequence[Callable[[], object]]
    ) -> None:
        self.bounds = bounds
        self._seen, self._undo = list(seen), list(undo)

    def counts(self) -> list[Seen]:
        """What was clipped so far, by layer; it stays readable when the clipping is off."""
        return [seen() for seen in self._seen]

    @property
    def values(self) -> int:
        """Values clipped so far in all layers: on inputs like those of the calibration, a sign of a fault."""
        return sum(seen.values for seen in self.counts())

    @property
    def active(self) -> bool:
        """Whether the clipping is on."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take the clipping off; the model is as before. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Clipped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
