"""Which parameter an optimizer's state belongs to.

PyTorch numbers parameters in the order in which the optimizer was given them. Their names are in the
parameter groups (``param_names``, where the optimizer was made from named parameters); else a state dict in
the same file with as many parameters of the same shapes tells them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptflip.checkpoints.torch_zip.trees import Tree, View
from ckptflip.checkpoints.torch_zip.values import pairs_of

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_Key = int | str


def parameter_names(tree: Tree) -> dict[str, str]:
    """The parameter's name for each tensor of an optimizer's state, by the tensor's name; as far as known."""
    slots: dict[int, dict[_Key, list[View]]] = {}
    for view in tree.views:
        if view.slot is not None:
            slots.setdefault(view.slot[0], {}).setdefault(view.slot[1], []).append(view)
    found: dict[str, str] = {}
    for number, by_key in slots.items():
        names = _names(tree.optimizers[number], by_key, tree.views)
        for key, views in by_key.items():
            # State dicts that name parameters, as those of distributed checkpoints, use the names as keys.
            name = names.get(key, key if isinstance(key, str) else "")
            found.update((v.name, name) for v in views if name)
    return found


def _names(groups: Sequence[Any], slots: Mapping[_Key, list[View]], views: Sequence[View]) -> dict[_Key, str]:
    keys: list[_Key] = []
    names: list[Any] = []
    for group in groups:
        found = {k: v for k, v in pairs_of(group) if k in ("params", "param_names")}
        params, named = found.get("params"), found.get("param_names")
        if not isinstance(params, list):
            return {}
        keys += [p for p in params if isinstance(p, int | str)]
        if isinstance(named, list):
            names += named
    if len(names) == len(keys) and all(isinstance(n, str) for n in names):
        return dict(zip(keys, names, strict=True))
    return _from_model(keys, slots, views)


def _from_model(
    keys: Sequence[_Key], slots: Mapping[_Key, list[View]], views: Sequence[View]
) -> dict[_Key, str]:
    """Names by the order of a model's state dict, if number and shapes agree."""
    models: dict[int, dict[tuple[str, int, tuple[int, ...]], str]] = {}
    for view in views:
        leaf = view.name.rpartition("/")[2]
        if view.slot is None and view.parent and leaf.rpartition(".")[2] not in _BUFFERS:
            # Tied parameters are in the state dict twice, but the optimizer knows one.
            models.setdefault(view.parent, {}).setdefault((view.storage, view.offset, view.shape), leaf)
    for model in models.values():
        if len(model) != len(keys):
            continue
        shapes = {key: shape for key, (_, _, shape) in zip(keys, model, strict=True)}
        if all(_fits(slots.get(key, ()), shapes[key]) for key in keys):
            return dict(zip(keys, model.values(), strict=True))
    return {}


def _fits(slots: Sequence[View], shape: tuple[int, ...]) -> bool:
    """Whether what an optimizer keeps for a parameter has the parameter's shape; scalars tell nothing."""
    shaped = [s.shape for s in slots if s.shape]
    return all(s == shape for s in shaped)
