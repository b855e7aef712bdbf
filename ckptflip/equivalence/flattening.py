"""In which order a Keras model flattens a convolution's output, as far as its checkpoint tells."""

from __future__ import annotations

from collections.abc import Iterator

from ckptflip.checkpoints import Checkpoint
from ckptflip.checkpoints.keras.config import Layer, Model
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.keras.variables import class_of

CHANNELS_LAST, CHANNELS_FIRST = "channels last", "channels first"
_MOVES = frozenset(("permute", "reshape"))


def flatten_order(target: Checkpoint) -> str | None:
    """`CHANNELS_LAST`, `CHANNELS_FIRST`, or None where it cannot be told.

    Keras lists a model's layers in its files, also those without weights. A ``Flatten`` gives channels last;
    a ``Permute`` before it may have put them first, which the configuration in a ``.keras`` file tells. Of
    other formats the convention of frameworks that keep a kernel's outputs last is assumed: channels last.
    """
    marks = getattr(target, "marks", None)
    if not isinstance(marks, Marks) or not marks.vars:
        return None if target.format.startswith("keras") else CHANNELS_LAST
    classes = {class_of(name) for path, given in marks.vars.items() for name in (_group(path), given)}
    if not classes & _MOVES:
        return CHANNELS_LAST if "flatten" in classes else None
    model = getattr(target, "model", None)
    if not isinstance(model, Model) or "flatten" not in classes or "reshape" in classes:
        return None
    permuted = [each.options.get("dims") for each in _layers(model.layer) if each.klass == "permute"]
    return CHANNELS_FIRST if permuted and all(map(_puts_channels_first, permuted)) else None


def _group(path: str) -> str:
    """The last part of a path before its ``vars``."""
    return path.removesuffix("vars").strip("/").rpartition("/")[2]


def _layers(layer: Layer) -> Iterator[Layer]:
    for each in (layer.layers or {}).values():
        yield each
        yield from _layers(each)


def _puts_channels_first(dims: object) -> bool:
    """Whether a permutation moves the last axis to the front, the others kept in order.

    Example:
        >>> _puts_channels_first([3, 1, 2]), _puts_channels_first([2, 1, 3])
        (True, False)
    """
    return isinstance(dims, list) and len(dims) > 1 and dims == [len(dims), *range(1, len(dims))]
