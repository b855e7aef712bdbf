"""Bounds of a model's layers: what clipping lets through, kept as JSON."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from ckptflip.errors import CheckpointError, UsageError

SCHEMA = 1
OUTSIDE = ("bound", "zero", "mean")
_MOST = 64 << 20


class Bound(Struct, frozen=True):
    """What one layer may give.

    Attributes:
        layer: its name in the model.
        kind: its class, so that bounds of another model are noticed.
        low, high: the least and the greatest value that is let through.
        mean: of what it gave on clean data, cut to the bounds; 0 where there was none.
    """

    layer: str
    kind: str
    low: float
    high: float
    mean: float = 0.0


class Bounds(Struct, frozen=True):
    """Bounds of a model's layers, and what becomes of values beyond them.

    Attributes:
        layers: a `Bound` each.
        rule: what they follow from, as text.
        margin: share of the range that was added at both ends.
        outside: what a value beyond a bound becomes, an infinite one too: that ``bound``, ``zero`` or the
            layer's ``mean``. Zero or mean are cut to the bounds.
        nan: what a NaN becomes: ``zero``, ``mean``, or ``bound``, the upper one.
        missed: layers that no clean data passed; they are not clipped.
        schema: version of the file's layout.

    Example:
        >>> bounds = Bounds((Bound("fc", "Linear", -1.0, 2.0),), rule="fixed:1")
        >>> bounds.replacements(bounds["fc"])
        (-1.0, 2.0, 0.0)
    """

    layers: tuple[Bound, ...]
    rule: str
    margin: float = 0.0
    outside: str = "bound"
    nan: str = "zero"
    missed: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_outside(self.outside, self.nan)
        if self.schema != SCHEMA:
            raise UsageError(
                f"bounds of layout {self.schema}; this version knows {SCHEMA}: use the one that wrote them"
            )
        names = [bound.layer for bound in self.layers]
        if len(set(names)) != len(names):
            raise UsageError("bounds name a layer twice: calibrate again")
        for bound in self.layers:
            numbers = (bound.low, bound.high, bound.mean)
            if not all(map(math.isfinite, numbers)) or bound.low > bound.high:
                raise UsageError(
                    f"the bounds of {bound.layer} are {bound.low} … {bound.high}: finite numbers in "
                    "ascending order are needed; calibrate again"
                )

    def __getitem__(self, layer: str) -> Bound:
        for bound in self.layers:
            if bound.layer == layer:
                return bound
        raise UsageError(unknown(layer, [bound.layer for bound in self.layers], "the bounds have no layer"))

    def handling(self, outside: str | None = None, nan: str | None = None) -> Bounds:
        """The same bounds with another handling of what is beyond them.

        Raises:
            UsageError: no such handling.

        Example:
            >>> Bounds((), rule="range").handling(outside="mean").outside
            'mean'
        """
        return msgspec.structs.replace(
            self,
            outside=self.outside if outside is None else outside,
            nan=self.nan if nan is None else nan,
        )

    def replacements(self, bound: Bound) -> tuple[float, float, float]:
        """What values of a layer become that are too low, too high, and NaN."""
        named = {name: min(max(value, bound.low), bound.high) for name, value in
                 (("zero", 0.0), ("mean", bound.mean))}  # fmt: skip
        below, above = named.get(self.outside, bound.low), named.get(self.outside, bound.high)
        return below, above, named.get(self.nan, bound.high)

    def save(self, path: str | Path) -> None:
        """Write the bounds to a JSON file.

        Raises:
            CheckpointError: it cannot be written.
        """
        try:
            Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        except OSError as why:
            raise CheckpointError(f"bounds cannot be written to {path}: {why.strerror}") from None


def load(path: str | Path) -> Bounds:
    """Read the bounds that `Bounds.save` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or no file of bounds.

    Example:
        >>> import tempfile
        >>> bounds = Bounds((Bound("fc", "Linear", -1.0, 2.0),), rule="range")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bounds.save(f"{folder}/bounds.json")
        ...     load(f"{folder}/bounds.json") == bounds
        True
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST:
            raise CheckpointError(f"{path} is too large to be a file of bounds")
        return msgspec.json.decode(path.read_bytes(), type=Bounds)
    except OSError as why:
        raise CheckpointError(f"bounds cannot be read from {path}: {why.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as why:
        raise CheckpointError(f"{path} is no file of bounds: {why}; write one with Bounds.save") from None


def check_outside(outside: str, nan: str) -> None:
    """Raise UsageError unless both name a handling."""
    for option, value in (("outside", outside), ("nan", nan)):
        if value not in OUTSIDE:
            raise UsageError(unknown(value, OUTSIDE, f"{option}: no handling is called"))


def check_layers(bounds: Bounds, kinds: dict[str, str]) -> None:
    """Raise UsageError unless a model has every layer that the bounds name.

    Args:
        bounds: of a model.
        kinds: the classes of the model's layers, by name.
    """
    if not bounds.layers:
        raise UsageError("the bounds name no layer: there is nothing to clip")
    for bound in bounds.layers:
        if bound.layer not in kinds:
            raise UsageError(
                unknown(bound.layer, kinds, "the bounds are of another model: this one has no layer")
            )
        if kinds[bound.layer] != bound.kind:
            raise UsageError(
                f"the bounds are of another model: {bound.layer} is a {kinds[bound.layer]} here, and was a "
                f"{bound.kind}. Calibrate this one"
            )


def unknown(name: str, known: Iterable[str], said: str) -> str:
    listed = [each for each in known if each]  # a model that is a layer itself has it under no name
    near = difflib.get_close_matches(name, listed, 1)
    some = ", ".join(listed[:4]) + (" …" if len(listed) > 4 else "")
    hint = f"did you mean {near[0]!r}?" if near else f"there are {some}" if listed else "there are none"
    return f"{said} {name!r}; {hint}"
