"""Activation clipping: values that no clean input brings are cut where layers give them.

`calibrate` learns bounds from clean data, `fixed` takes given ones; `clip` puts them on a model until they
are taken off, `clipped` for a ``with`` block. PyTorch and Keras models; frameworks are imported late.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec.structs import replace

from ckptflip.errors import UsageError
from ckptflip.protect.clipping.bounds import Bound, Bounds, load
from ckptflip.protect.clipping.frameworks import adapter
from ckptflip.protect.clipping.part import Clipped, Seen
from ckptflip.protect.clipping.rules import parse
from ckptflip.protect.clipping.spread import Spread

__all__ = ["Bound", "Bounds", "Clipped", "Seen", "calibrate", "clip", "clipped", "fixed", "load"]


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    rule: str = "range",
    margin: float = 0.0,
    layers: Any = None,
    outside: str = "zero",
    nan: str = "zero",
) -> Bounds:
    """Learn bounds of a clean model's layers from clean data.

    Args:
        model: a PyTorch or Keras model. It is called in evaluation mode, without gradients, and left as it
            was.
        batches: what it is called with, one after the other: an array or tensor, a tuple of arguments
            or, for PyTorch, a dict of them.
        rule: ``range`` or ``percentile:P`` (see `rules.Rule`).
        margin: added at both ends, as a share of the distance between them.
        layers: which ones: names, globs, classes. None: all that compute with parameters of their own,
            linear layers, convolutions, normalisations and embedding tables among them.
        outside, nan: what values beyond the bounds, and NaN, become: see `Bounds`.

    Returns:
        The bounds. Layers that no batch passed are named in `Bounds.missed`.

    Raises:
        UsageError: no data; a layer that gives NaN or infinities on it; an unknown rule.
        SelectionError: layers that the model does not have.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> bounds = calibrate(model, [torch.rand(8, 2) for _ in range(3)])
        >>> [bound.layer for bound in bounds.layers]
        ['0', '2']
        >>> with torch.no_grad(), clipped(model, bounds) as clipping:
        ...     outputs = model(1e6 * torch.ones(1, 2))
        >>> bool(bounds["2"].low <= outputs <= bounds["2"].high), clipping.values > 0
        (True, True)
    """
    chosen = parse(rule, margin)
    if chosen.kind == "fixed":
        raise UsageError(f"the rule {rule!r} needs no data: use fixed(model, {chosen.number:g})")
    Bounds((), rule, margin, outside, nan)  # a wrong handling is refused before anything is computed
    found = adapter(model).spreads(model, batches, layers)
    if not any(spread.count or spread.odd for spread in found.values()):
        raise UsageError("calibration saw no values: give it batches of clean data that reach the layers")
    bounds = []
    for bound, spread in found.items():
        _check_clean(bound.layer, spread)
        if spread.count:
            low, high = chosen.bounds(spread)
            bounds.append(replace(bound, low=low, high=high, mean=min(max(spread.mean, low), high)))
    missed = tuple(bound.layer for bound, spread in found.items() if not spread.count)
    return Bounds(tuple(bounds), str(chosen), margin, outside, nan, missed)


def fixed(
    model: Any, limit: float = 100.0, *, layers: Any = None, outside: str = "bound", nan: str = "zero"
) -> Bounds:
    """The same bounds for all layers, as in the Terrorch study (arXiv 2307.10244): ±100 or ±6, NaN to 0.

    Args:
        model: a PyTorch or Keras model.
        limit: values from -limit to +limit are let through.
        layers: as for `calibrate`. None: every linear (dense) layer but the last, as in the study.
        outside, nan: as for `calibrate`.

    Raises:
        UsageError, SelectionError: as for `calibrate`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
        >>> fixed(model, 6).layers
        (Bound(layer='0', kind='Linear', low=-6.0, high=6.0, mean=0.0),)
    """
    rule = parse(f"fixed:{limit}")
    low, high = rule.bounds(Spread())
    named = adapter(model).named(model, layers)
    bounds = tuple(replace(bound, low=low, high=high) for bound in named)
    return Bounds(bounds, str(rule), 0.0, outside, nan)


def clip(model: Any, bounds: Bounds, *, outside: str | None = None, nan: str | None = None) -> Clipped:
    """Clip a model's layers until `Clipped.remove`.

    Args:
        model: the model that the bounds are of, or a faulty copy of it.
        bounds: from `calibrate`, `fixed` or `load`.
        outside, nan: another handling than that of the bounds.

    Raises:
        UsageError: bounds of another model; a model that is clipped, compiled or scripted already.
    """
    if not isinstance(bounds, Bounds):
        raise UsageError(f"bounds are what calibrate, fixed or load gave, not {type(bounds).__name__}")
    return adapter(model).clip(model, bounds.handling(outside, nan))


# The name that reads well in a ``with`` statement: what `clip` gives ends with the block.
clipped = clip


def _check_clean(layer: str, spread: Spread) -> None:
    if spread.odd:
        raise UsageError(
            f"{layer} gives NaN or infinities on the calibration data ({spread.odd} of "
            f"{spread.odd + spread.count} values): calibrate a clean model on clean data"
        )
