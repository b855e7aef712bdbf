"""What an archive's `config.json` tells of a model: its layers in order, their classes, its optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from ckptflip.checkpoints.keras.variables import snake
from ckptflip.errors import CheckpointError

_MOST_DEPTH = 50


class Layer(Struct, frozen=True):
    """A layer, or the whole model, as configured.

    Attributes:
        klass: its class as files spell it: ``conv2d``.
        name: its real name, or "".
        trained: False where it and all in it is frozen.
        options: its configuration.
        layers: for a Sequential or Functional model its layers, by the names that a file gives their groups,
            in the model's order. None: not known.
        groups: the same names by the layers' real ones.
        place: which one of its model's layers it is; -1 where that is not known.
    """

    klass: str
    name: str
    trained: bool
    options: dict[str, Any]
    layers: dict[str, Layer] | None = None
    groups: dict[str, str] = {}
    place: int = -1


class Model(Struct, frozen=True):
    """A model's configuration.

    Attributes:
        layer: the model as a layer of its own.
        optimizer: its optimizer, likewise; None where it was saved without one.
    """

    layer: Layer
    optimizer: Layer | None = None


# What is known of a layer without a configuration.
UNKNOWN = Layer("", "", True, {})


def parse(data: bytes, where: str) -> Model:
    """Read a model's configuration; what is of no known form is passed over.

    Args:
        data: JSON.
        where: whose, for messages.

    Raises:
        CheckpointError: not JSON, or nested without end.
    """
    try:
        # Python's own reader, since Keras writes NaN and Infinity: the learning rate may have been hit.
        raw = json.loads(data)
    except (ValueError, RecursionError) as why:
        raise CheckpointError(f"{where} is no configuration of a Keras model: {why}") from None
    compiled = _mapping(_mapping(raw).get("compile_config"))
    return Model(_layer(raw, 0), _optimizer(compiled.get("optimizer")))


def _optimizer(raw: object) -> Layer | None:
    """An optimizer by its configuration, or by its mere name, as older versions note it."""
    if isinstance(raw, str) and raw.isidentifier():
        return Layer(raw.lower(), raw.lower(), True, {})
    return _layer(raw, 0) if _mapping(raw) else None


def inner_optimizer(optimizer: Layer) -> Layer | None:
    """The optimizer that another one wraps, to scale the loss."""
    return _optimizer(optimizer.options.get("inner_optimizer"))


def _layer(raw: object, depth: int, place: int = -1) -> Layer:
    given = _mapping(raw)
    options = _mapping(given.get("config"))
    name = options.get("name", given.get("name"))
    klass = given.get("class_name")
    layers = options.get("layers")
    within = _by_group(layers, depth + 1) if isinstance(layers, list) and depth < _MOST_DEPTH else None
    return Layer(
        snake(klass) if isinstance(klass, str) else "",
        name if isinstance(name, str) and name.isprintable() else "",
        options.get("trainable") is not False,
        dict(options),
        within,
        {each.name: group for group, each in (within or {}).items()},
        place,
    )


def _by_group(raw: list[object], depth: int) -> dict[str, Layer]:
    """Layers by the names of their groups: the class, and a number from the second of a class on."""
    found: dict[str, Layer] = {}
    seen: dict[str, int] = {}
    for each in raw:
        if "keras.src.ops" in str(_mapping(each).get("module", "")) or not _mapping(each):
            continue  # an operation in the graph, which is no layer
        layer = _layer(each, depth, len(found))
        number = seen[layer.klass] = seen.get(layer.klass, -1) + 1
        found[f"{layer.klass}_{number}" if number else layer.klass] = layer
    return found


def _mapping(raw: object) -> Mapping[str, Any]:
    return raw if isinstance(raw, dict) else {}
