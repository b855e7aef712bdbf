"""Names in the HDF5 files of Keras 2, which Keras 3 still writes as `.h5`: groups by layer, then real names.

A whole model keeps them under ``model_weights`` and ``optimizer_weights``; weights alone lie at the top.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from ckptflip.faults.catalogue import Tensor

_OPTIMIZER = "optimizer_weights/"
_TOP_LEVEL = "top_level_model_weights"


class Named(Struct, frozen=True):
    """A tensor's real name.

    Attributes:
        name: such as ``dense/kernel`` or ``adam/momentum of dense/kernel``.
        variable: the variable's own name.
        parameter: for an optimizer's variable, the parameter it is kept for: a position in the catalogue.
        optimizer: whether it is an optimizer's.
    """

    name: str
    variable: str
    parameter: int | None = None
    optimizer: bool = False


def named(tensors: Sequence[Tensor], prefix: str) -> dict[int, Named]:
    """Real names by position in the catalogue; what is not Keras' is left out.

    Args:
        tensors: the catalogue, named by paths in the file.
        prefix: the path of the group that holds the layers, ending in ``/``; "" when they lie at the top.
    """
    found: dict[int, Named] = {}
    spelt: dict[str, int] = {}
    for i, tensor in enumerate(tensors):
        if not tensor.name.startswith(prefix) or tensor.name.startswith(_OPTIMIZER):
            continue
        layer, _, path = tensor.name[len(prefix) :].partition("/")
        if not path:
            continue
        path = re.sub(r":\d+$", "", path)
        spelt.setdefault(path, i)
        name = path if layer == _TOP_LEVEL else _joined(layer, path)
        found[i] = Named(name, name.rpartition("/")[2])
    joined = {path.replace("/", "_"): i for path, i in spelt.items()}
    owner = _only_optimizer(tensors)
    for i, tensor in enumerate(tensors):
        if tensor.name.startswith(_OPTIMIZER):
            path = re.sub(r":\d+$", "", tensor.name[len(_OPTIMIZER) :])
            found[i] = _optimizer_variable(path, owner, spelt, joined, found)
    return found


def _joined(layer: str, path: str) -> str:
    """A layer and the path in it, which may give the layer's name again, behind the model's."""
    parts = path.split("/")
    if layer in parts[:-1]:
        parts = parts[parts.index(layer) + 1 :]
    return "/".join([layer, *parts])


def _only_optimizer(tensors: Sequence[Tensor]) -> str:
    """The optimizer's name, where one group alone can give it."""
    groups = {
        t.name[len(_OPTIMIZER) :].split("/")[0]
        for t in tensors
        if t.name.startswith(_OPTIMIZER) and "/" in t.name[len(_OPTIMIZER) :]
    }
    return groups.pop() if len(groups) == 1 else "optimizer"


def _optimizer_variable(
    path: str, owner: str, spelt: Mapping[str, int], joined: Mapping[str, int], found: Mapping[int, Named]
) -> Named:
    parts = path.split("/")
    if len(parts) == 1:
        return Named(f"{owner}/{path}", path, None, True)
    optimizer, rest = parts[0], parts[1:]
    slot, parameter = _split(rest, spelt, joined)
    if parameter is None:
        return Named(f"{optimizer}/{'/'.join(rest)}", rest[-1], None, True)
    return Named(f"{optimizer}/{slot} of {found[parameter].name}", slot, parameter, True)


def _split(
    rest: Sequence[str], spelt: Mapping[str, int], joined: Mapping[str, int]
) -> tuple[str, int | None]:
    """What is kept, and for which parameter.

    Keras 3 writes ``dense_kernel_momentum``, Keras 2.11 ``m/dense/kernel``, older ones ``dense/kernel/m``.
    """
    if len(rest) == 1:
        words = rest[0].split("_")
        for at in range(len(words) - 1, 0, -1):
            parameter = joined.get("_".join(words[:at]))
            if parameter is not None:
                return "_".join(words[at:]), parameter
        return rest[0], None
    for slot, path in ((rest[0], rest[1:]), (rest[-1], rest[:-1])):
        parameter = spelt.get("/".join(path))
        if parameter is not None:
            return slot, parameter
    return rest[-1], None
