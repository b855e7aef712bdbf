"""Names, layers and roles of a bundle's tensors: from their keys, and from the graph where there is one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.tensorbundle.graph import VARIABLE, Variable

_SUFFIX = f"/.ATTRIBUTES/{VARIABLE}"
_SLOT = "/.OPTIMIZER_SLOT/"
# Names of more parts have no endings of their own.
_MOST_PARTS = 16
# What TensorFlow 1 puts behind a variable's name for an optimizer's memory of it (adam_m: BERT's own).
_TF1_SLOT = re.compile(r"((Adam|RMSProp|Adagrad|Adadelta|Ftrl|Momentum)(_\d+)?|adam_[mv])$")
_COUNTERS = frozenset(("iteration", "iterations", "iter", "save_counter"))
# Keras' `model.export` saves each variable a second time here, and no function of the SavedModel uses it.
_COPIES = "_all_variables/"
# The name of variables that were given none.
_UNNAMED = frozenset(("", "Variable"))


class Key(Struct, frozen=True):
    """A tensor to be named.

    Attributes:
        key: its key, as text.
        number: the format of an element.
        shape: elements along each axis.
    """

    key: str
    number: NumberFormat
    shape: tuple[int, ...]


class Named(Struct, frozen=True):
    """What the catalogue says of a tensor.

    Attributes:
        name: unique in the bundle.
        aliases: other names that no other tensor has.
        layer: guessed; may be empty.
        role: guessed.
        copy_of: the tensor that this is a copy of, if nothing uses the copy; else "".
    """

    name: str
    aliases: tuple[str, ...]
    layer: str
    role: str
    copy_of: str = ""


class _Known(Struct, frozen=True):
    """A tensor on the way to its names.

    Attributes:
        key: the tensor.
        name: its name.
        variable: what the graph says.
        path: the name that tells most of what it is for.
        of: the tensor that this is an optimizer's memory of.
        is_state: whether it belongs to an optimizer.
        is_copy: whether it is a copy that nothing uses, of a tensor of the same full name.
    """

    key: Key
    name: str
    variable: Variable
    path: str
    of: str
    is_state: bool
    is_copy: bool


def named(keys: Sequence[Key], graph: Mapping[str, Variable]) -> list[Named]:
    """Name tensors. The keys are unique.

    Args:
        keys: the tensors.
        graph: what is known of each key's variable, if anything.
    """
    known = _known(keys, graph)
    by_key = {k.key.key: k for k in known}
    groups: dict[str, set[str]] = {}
    for each in known:
        group, _, leaf = each.path.rpartition("/")
        groups.setdefault(group, set()).add(leaf)
    others = [[] if k.is_copy else list(dict.fromkeys(_other_names(k, by_key))) for k in known]
    uses = Counter(k.name for k in known)
    uses.update(o for each in others for o in each)
    made = []
    for each, others_of in zip(known, others, strict=True):
        layer, role = _guessed(each, by_key, groups)
        names = [each.name, *(o for o in others_of if uses[o] == 1)]
        full = each.variable.full_name
        if each.path == full and full in names:
            # What the variable is really called comes first: some formats keep one name only.
            names.remove(full)
            names.insert(0, full)
        copy_of = full if each.is_copy else ""
        made.append(Named(names[0], tuple(names[1:]), layer, role, copy_of))
    return made


def _known(keys: Sequence[Key], graph: Mapping[str, Variable]) -> list[_Known]:
    nothing = Variable("", (), optimizer=False, of="")
    taken = {k.key for k in keys}
    full = Counter(v.full_name for key, v in graph.items() if not key.startswith(_COPIES))
    # A layer that was built outside its model has no name of its own: others are called the same.
    unsure = {name.rpartition("/")[0] for name, count in full.items() if count > 1}
    copied = _copied(keys, graph)
    known = []
    for key in keys:
        short = key.key.removesuffix(_SUFFIX)
        name = short if short and short not in taken else key.key
        variable = graph.get(key.key, nothing)
        path = _speaking(name, variable, unsure)
        of, is_state = _memory(key.key, name, variable, taken)
        is_copy = name.startswith(_COPIES) and _kind(key, variable) in copied
        known.append(_Known(key, name, variable, path, of, is_state, is_copy))
    return known


def _kind(key: Key, variable: Variable) -> tuple[str, str, tuple[int, ...]]:
    """What a variable and its copy have in common."""
    return variable.full_name, key.number.name, key.shape


def _copied(keys: Sequence[Key], graph: Mapping[str, Variable]) -> set[tuple[str, str, tuple[int, ...]]]:
    """What there are copies of: no more copies than variables of the same name, dtype and shape."""
    surplus: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for key in keys:
        if key.key in graph:
            surplus[_kind(key, graph[key.key])] += -1 if key.key.startswith(_COPIES) else 1
    return {kind for kind, count in surplus.items() if count >= 0 and kind[0] not in _UNNAMED}


def _speaking(name: str, variable: Variable, unsure: set[str]) -> str:
    """The name of a variable that tells most of what it is for."""
    group, slash, _ = variable.full_name.rpartition("/")
    if slash and (group not in unsure or not variable.paths):
        return variable.full_name
    return variable.paths[0] if variable.paths else name


def _memory(key: str, name: str, variable: Variable, taken: set[str]) -> tuple[str, bool]:
    """The key of the tensor that this is an optimizer's memory of, and whether it belongs to an optimizer."""
    owner, slot, _ = name.partition(_SLOT)
    if slot:
        return owner + _SUFFIX, True
    parent, _, leaf = name.rpartition("/")
    if _TF1_SLOT.match(leaf) and parent in taken and parent != key:
        return parent, True
    return variable.of, variable.optimizer


def _other_names(known: _Known, by_key: Mapping[str, _Known]) -> Iterator[str]:
    """What else a variable may be called: by its full name or an ending of it, or by another path."""
    full = known.variable.full_name
    if full not in _UNNAMED:
        yield full
        owner = by_key.get(known.of)
        if owner is not None:
            yield from _memory_names(full, owner.variable.full_name)
        else:
            yield from _endings(full)
    if known.path != full:
        yield from known.variable.paths


def _endings(name: str) -> Iterator[str]:
    """All endings of two parts or more, the whole name left out.

    Example:
        >>> list(_endings("sequential/block/dense/kernel"))
        ['block/dense/kernel', 'dense/kernel']
    """
    parts = name.split("/")
    if len(parts) <= _MOST_PARTS:
        yield from ("/".join(parts[i:]) for i in range(1, len(parts) - 1))


def _memory_names(full: str, owner: str) -> Iterator[str]:
    """Keras 3 calls the momentum of ``model/dense/kernel`` ``adam/model_dense_kernel_momentum``.

    Example:
        >>> list(_memory_names("adam/model_dense_kernel_momentum", "model/dense/kernel"))
        ['adam/momentum of model/dense/kernel', 'adam/momentum of dense/kernel']
    """
    optimizer, _, leaf = full.rpartition("/")
    start = owner.replace("/", "_") + "_"
    if owner and leaf.startswith(start):
        # A plain tf.Variable is called kernel:0 there.
        slot = leaf.removeprefix(start).removeprefix("0_")
        yield from (f"{optimizer}/{slot} of {name}" for name in (owner, *_endings(owner)))


def _guessed(known: _Known, by_key: Mapping[str, _Known], groups: Mapping[str, set[str]]) -> tuple[str, str]:
    group, _, leaf = known.path.rpartition("/")
    if not known.key.number.is_float and leaf in _COUNTERS:
        return "", "counter"
    if known.is_state:
        owner = by_key.get(known.of)
        return _layer(owner, "") if owner else "", "optimizer"
    # Keras keeps a kernel as _kernel.
    path = f"{group}/{leaf.lstrip('_')}"
    layer, role = guess(path, known.key.number, len(known.key.shape), groups[group])
    return _layer(known, layer), role


def _layer(known: _Known, guessed: str) -> str:
    """The layer of a tensor: of the graph's names, all but the last part is the layer's own."""
    if known.path != known.name:
        return known.path.rpartition("/")[0]
    return guessed or known.path.rpartition("/")[0]
