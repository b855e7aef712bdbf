"""What happens when a check finds a fault: raise, count, or compute again; and the counts that are kept.

Every protection that checks results shares this: `ON_ERROR` are the names a user gives, `settle` does what
they say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ckptflip.errors import DetectedError, UsageError

ON_ERROR = ("raise", "count", "recompute")

Result = TypeVar("Result")


@dataclass(slots=True)
class Detections:
    """What the checks of one place saw; grows as it runs.

    Attributes:
        calls: results that were checked.
        faulty: of these, results in which a fault was found.
        unchecked: results that no check could judge: NaN or infinity was given, or sums may overflow.
        recomputed: faulty results that were computed again and then held.
    """

    calls: int = 0
    faulty: int = 0
    unchecked: int = 0
    recomputed: int = 0

    def __add__(self, other: Detections) -> Detections:
        """The counts of two places together."""
        return Detections(
            self.calls + other.calls,
            self.faulty + other.faulty,
            self.unchecked + other.unchecked,
            self.recomputed + other.recomputed,
        )


def policy(name: str, allowed: tuple[str, ...] = ON_ERROR) -> str:
    """A policy's name, if it is one.

    Raises:
        UsageError: it is none of `allowed`.

    Example:
        >>> policy("count")
        'count'
    """
    if name not in allowed:
        raise UsageError(f"on_error={name!r} is no policy; there are: {', '.join(allowed)}")
    return name


def settle(
    on_error: str,
    seen: Detections,
    where: str,
    found: str,
    result: Result,
    again: Callable[[], tuple[Result, bool]],
) -> Result:
    """Do what the policy says with a faulty result, and count it.

    Args:
        on_error: `raise`, `count` or `recompute`.
        seen: the counts of this place.
        where: the place, for the message: a layer's name.
        found: what was found, for the message.
        result: the faulty result.
        again: computes it once more; gives it, and whether its check holds.

    Returns:
        The result to go on with: with `count` the faulty one, with `recompute` the new one.

    Raises:
        DetectedError: with `raise`; with `recompute` if the new result is faulty too, as with a fault in the
            weights.

    Example:
        >>> seen = Detections()
        >>> settle("recompute", seen, "fc1", "row 3 is off", 41, lambda: (42, True))
        42
        >>> seen.faulty, seen.recomputed
        (1, 1)
    """
    seen.faulty += 1
    if on_error == "count":
        return result
    if on_error == "raise":
        raise DetectedError(
            f"{where}: a fault was found: {found}; run it again, and load the weights anew if it comes back "
            "(on_error='recompute' runs it again by itself, 'count' goes on)"
        )
    renewed, holds = again()
    if not holds:
        raise DetectedError(
            f"{where}: a fault was found, and again after computing anew: {found}; its weights or its "
            "checksums are damaged: load the checkpoint anew"
        )
    seen.recomputed += 1
    return renewed
