"""What a layer's bounds are made from: the range of clean data, percentiles of it, or a fixed number."""

from __future__ import annotations

import difflib
import math

from msgspec import Struct

from ckptflip.errors import UsageError
from ckptflip.protect.clipping.spread import Spread

RULES = ("range", "percentile", "fixed")


class Rule(Struct, frozen=True):
    """How bounds follow from what a layer gives on clean data.

    ``range`` takes the least and the greatest value seen, as Ranger does (Chen et al., DSN 2021, arXiv
    2003.13874). ``percentile:P`` takes the values between which P percent of all lie, cut off alike at both
    ends. ``fixed:X`` takes ±X and needs no data; the Terrorch study has 100 and 6.

    Attributes:
        kind: of `RULES`.
        number: P or X; 0 for a range.
        margin: what is added at both ends, as a share of the distance between them. None for ``fixed``.

    Example:
        >>> parse("percentile:99.9", 0.1)
        Rule(kind='percentile', number=99.9, margin=0.1)
    """

    kind: str
    number: float = 0.0
    margin: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "range" else f"{self.kind}:{self.number:g}"

    def bounds(self, spread: Spread) -> tuple[float, float]:
        """The least and the greatest value to let through.

        Args:
            spread: what the layer gave.

        Example:
            >>> import numpy as np
            >>> spread = Spread()
            >>> spread.add(np.array([-1.0, 0.0, 3.0], np.float32))
            >>> parse("range", 0.5).bounds(spread)
            (-3.0, 5.0)
        """
        if self.kind == "fixed":
            return -self.number, self.number
        low, high = spread.low, spread.high
        if self.kind == "percentile":
            low, high = spread.between(self.number / 100)
        more = self.margin * (high - low)
        return low - more, high + more


def parse(text: str, margin: float = 0.0) -> Rule:
    """A rule from its text: ``range``, ``percentile:99.99``, ``fixed:100``.

    Raises:
        UsageError: no such rule, or a number that makes no sense.
    """
    kind, colon, given = text.partition(":")
    if kind not in RULES:
        near = difflib.get_close_matches(kind, RULES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "use range, percentile:P or fixed:X"
        raise UsageError(f"no rule of clipping is called {text!r}; {hint}")
    if not (math.isfinite(margin) and margin >= 0):
        raise UsageError(f"a margin is a share of the range, 0 or more, not {margin}")
    if kind == "range":
        if colon:
            raise UsageError(f"the rule range takes no number: {text!r}; a margin is given as margin=")
        return Rule(kind, 0.0, margin)
    try:
        number = float(given) if given else 99.99 if kind == "percentile" else 100.0
    except ValueError:
        raise UsageError(f"{given!r} in the rule {text!r} is no number") from None
    if kind == "percentile" and not 0 < number <= 100:
        raise UsageError(f"a percentile is more than 0 and at most 100, not {given}")
    if not (math.isfinite(number) and number > 0):
        raise UsageError(f"a fixed bound is more than 0 and finite, not {given}")
    return Rule(kind, number, 0.0 if kind == "fixed" else margin)
