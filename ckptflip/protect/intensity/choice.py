"""The choice for a layer and a batch: the cheapest scheme as measured, and why, in words."""

from __future__ import annotations

from dataclasses import dataclass

from ckptflip.protect.intensity.roofline import Balance, Shape

# Between schemes whose times differ by less than this part of the layer's own time, the finer one is taken.
TIE = 0.01
_FINER = ("tile", "row", "replication", "global")
_WHY = {
    "global": "one sum for the layer, in one pass over inputs and results",
    "row": "a sum for each row, in one pass over inputs and results",
    "tile": "sums taken while results are in registers: nothing is read twice",
    "replication": "the layer itself is so cheap that running it twice costs least",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a layer and a number of rows.

    Attributes:
        layer: its name.
        module: its name in the model, empty where it is the model.
        shape: of its product.
        scheme: the cheapest.
        seconds: per call as measured, by scheme, `none` among them.
        balance: of the device.
        alone: what is cheaper for the layer by itself, where the whole model decided otherwise; else empty.
    """

    layer: str
    module: str
    shape: Shape
    scheme: str
    seconds: dict[str, float]
    balance: Balance
    alone: str = ""

    def overhead(self, scheme: str) -> float | None:
        """Time beyond that of the unchecked layer, as a part of it; None for a scheme that was not measured.

        Args:
            scheme: its name.
        """
        plain = self.seconds["none"]
        return None if scheme not in self.seconds else self.seconds[scheme] / plain - 1

    @property
    def reason(self) -> str:
        """Why this one: what the layer waits for, and how much cheaper than the next."""
        own, device = self.shape.intensity, self.balance.intensity
        side = "memory" if own < device else "arithmetic"
        first = f"{own:.3g} FLOP/B, device {device:.3g}: bound by {side}; {self.scheme}: {_WHY[self.scheme]}"
        if self.alone:
            return f"{first}; cheapest in all layers together, {self.alone} in this one alone"
        others = [name for name in self.seconds if name not in ("none", self.scheme)]
        if not others:
            return first
        nearest = min(others, key=self.seconds.__getitem__)
        more = (self.seconds[nearest] - self.seconds[self.scheme]) / self.seconds["none"]
        return f"{first}; next {nearest}, {more:+.1%} of the layer"


def cheapest(seconds: dict[str, float]) -> str:
    """The scheme that took the least time; among those within `TIE` of it, the one that finds smaller faults.

    Args:
        seconds: per call, by scheme, `none` among them.

    Example:
        >>> cheapest({"none": 1.0, "global": 1.2, "row": 1.1, "replication": 2.0})
        'row'
        >>> cheapest({"none": 1.0, "global": 1.1, "row": 1.105})
        'row'
    """
    checked = {name: taken for name, taken in seconds.items() if name != "none"}
    limit = min(checked.values()) + TIE * seconds["none"]
    return min((name for name in checked if checked[name] <= limit), key=_FINER.index)
