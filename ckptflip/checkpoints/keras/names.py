"""Real names for the tensors of Keras files: `dense/kernel` instead of `layers/dense/vars/0`.

A pure function from what is in a file to names, layers and roles. Paths in the file stay as aliases.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints.keras import legacy, slots, variables
from ckptflip.checkpoints.keras.config import UNKNOWN, Layer, Model, inner_optimizer
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.keras.tree import Node, grown, numbered
from ckptflip.faults.catalogue import Tensor


class _Names(Struct, frozen=True):
    """What a tensor is called: its name, a second one (or ""), its layer and its role."""

    name: str
    second: str
    layer: str
    role: str


def renamed(tensors: Sequence[Tensor], marks: Marks, model: Model | None = None) -> list[Tensor]:
    """The catalogue of an HDF5 file with Keras' real names, if it is Keras'; else as it is.

    Args:
        tensors: the catalogue, named by paths in the file; its order is kept.
        marks: of the file.
        model: the model's configuration, where there is one.
    """
    if marks.layers is not None:
        found = _legacy(tensors, marks.layers)
    elif _is_keras3(tensors, marks):
        found = _keras3(tensors, marks, model)
    else:
        return list(tensors)
    taken = {t.name for i, t in enumerate(tensors) if i not in found}
    made = [_with_names(t, found.get(i), taken) for i, t in enumerate(tensors)]
    # A second name that is another tensor's first one would select both.
    return [
        replace(t, aliases=tuple(a for a in t.aliases if a not in taken)) if t.aliases else t for t in made
    ]


def _is_keras3(tensors: Sequence[Tensor], marks: Marks) -> bool:
    if not marks.vars or not any(numbered(t.name) for t in tensors):
        return False
    tops = {path.split("/")[0] for path in marks.vars}
    return any(marks.vars.values()) or bool(tops & {"vars", "layers", "_layer_checkpoint_dependencies"})


def _with_names(tensor: Tensor, names: _Names | None, taken: set[str]) -> Tensor:
    if names is None:
        return tensor
    name, number = names.name, 2
    while name in taken:
        name, number = f"{names.name}~{number}", number + 1
    taken.add(name)
    others = dict.fromkeys((tensor.name, *tensor.aliases, names.second))
    aliases = tuple(n for n in others if n and n != name)
    return replace(tensor, name=name, aliases=aliases, layer=names.layer, role=names.role)


def _keras3(tensors: Sequence[Tensor], marks: Marks, model: Model | None) -> dict[int, _Names]:
    root = grown(tensors, marks.vars, UNKNOWN if model is None else model.layer)
    found: dict[int, _Names] = {}
    optimizers: list[Node] = []
    for node in root.below():
        if not node.is_layer:
            continue
        if slots.is_optimizer(node, tensors):
            optimizers.append(node)
            continue
        for i, variable in zip(node.positions, node.variables, strict=True):
            found[i] = _variable(node, variable, tensors[i])
    for node in optimizers:
        config = _configured(node, model)
        kept = slots.slots_of(node, root, tensors, config)
        # Loading takes a wrapped optimizer's own variables last: they are what counts, and have its name.
        owner = node.given or (config.name if config else "") or node.name.rpartition("/")[2]
        for i, slot in zip(node.positions, kept, strict=True):
            found[i] = _slot(owner, slot, tensors[i], found)
    return found


def _configured(node: Node, model: Model | None) -> Layer | None:
    """The configuration of an optimizer, where there is one."""
    if model is None or model.optimizer is None:
        return None
    if node.path == "optimizer/inner_optimizer":
        return inner_optimizer(model.optimizer)
    return model.optimizer if node.path == "optimizer" else None


def _variable(node: Node, variable: str | None, tensor: Tensor) -> _Names:
    if variable is None:
        number = tensor.name.rpartition("/")[2]
        name = f"{node.name}/vars/{number}" if node.name else f"vars/{number}"
        return _Names(name, "", node.name, tensor.role)
    path = f"{node.name}/{variable}" if node.name else variable
    siblings = [v for v in node.variables if v is not None]
    role = variables.role_of(path, node.klass, tensor, siblings)
    by_attribute = f"{node.path}/{variable}" if "layers" not in node.path.split("/") else ""
    return _Names(path, by_attribute, node.name, role)


def _slot(owner: str, slot: slots.Slot, tensor: Tensor, found: dict[int, _Names]) -> _Names:
    inside = f"{owner}/{slot.inner}" if slot.inner else owner
    if slot.name is None or (slot.parameter is None and slot.name not in slots.OWN):
        return _Names(f"{owner}/vars/{tensor.name.rpartition('/')[2]}", "", "", "optimizer")
    if slot.parameter is None:
        role = "counter" if slot.name in slots.COUNTS else "optimizer"
        return _Names(f"{inside}/{slot.name}", "", "", role)
    of = found[slot.parameter]
    return _Names(f"{inside}/{slot.name} of {of.name}", "", of.layer, "optimizer")


def _legacy(tensors: Sequence[Tensor], prefix: str) -> dict[int, _Names]:
    named = legacy.named(tensors, prefix)
    found: dict[int, _Names] = {}
    for i, each in named.items():
        if each.optimizer:
            layer = "" if each.parameter is None else named[each.parameter].name.rpartition("/")[0]
            role = "counter" if each.variable in slots.COUNTS else "optimizer"
            found[i] = _Names(each.name, "", layer, role)
            continue
        layer = each.name.rpartition("/")[0]
        klass = variables.class_of(layer.rpartition("/")[2])
        role = variables.role_of(each.name, klass, tensors[i], ())
        found[i] = _Names(each.name, "", layer, role)
    return found
