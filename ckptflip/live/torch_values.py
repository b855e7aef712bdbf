"""Tensors inside what modules take and give: found by name in nested values, and put back altered."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


def leaves(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in tuples, lists, dicts and dataclasses inside each other, with where they are.

    Example:
        >>> x = torch.zeros(2)
        >>> [path for path, _ in leaves((x, {"hidden": [x, None]}))]
        ['0', '1/hidden/0']
    """
    if isinstance(value, torch.Tensor):
        yield "", value
        return
    for key, item in _items(value):
        for path, tensor in leaves(item):
            yield f"{key}/{path}" if path else str(key), tensor


def rebuilt(value: Any, new: Mapping[int, torch.Tensor]) -> Any:
    """A nested value with some of its tensors replaced; what holds none of them stays the same object.

    Args:
        value: as for `leaves`.
        new: by the `id` of the tensor that each one replaces.

    Example:
        >>> x, y = torch.zeros(2), torch.ones(2)
        >>> rebuilt([x, {"hidden": x}], {id(x): y})
        [tensor([1., 1.]), {'hidden': tensor([1., 1.])}]
    """
    if isinstance(value, torch.Tensor):
        return new.get(id(value), value)
    old = _items(value)
    changed = {key: made for key, item in old if (made := rebuilt(item, new)) is not item}
    return _with(value, changed) if changed else value


def _items(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key."""
    if isinstance(value, PackedSequence):
        return [("data", value.data)]  # the rest says how it is packed
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return []


def _with(value: Any, changed: Mapping[Any, Any]) -> Any:
    """A container like this one with some of its items replaced."""
    if isinstance(value, PackedSequence):
        return value._replace(data=changed["data"])
    if isinstance(value, tuple):
        items = [changed.get(i, item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping | list):
        made = copy.copy(value)
        for key, item in changed.items():
            made[key] = item  # type: ignore[index]
        return made
    return dataclasses.replace(value, **changed)
