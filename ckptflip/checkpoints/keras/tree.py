"""The groups of a Keras weights file as a tree of layers with their real names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints.keras import variables
from ckptflip.checkpoints.keras.config import UNKNOWN, Layer
from ckptflip.faults.catalogue import Tensor

# Groups that hold layers without being one, whose names say nothing.
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies", "container", "vars")


class Node(Struct, eq=False):
    """A group of the file.

    Attributes:
        key: its name in the file.
        path: its path in the file, without the group ``vars`` in it.
        given: the real name that the file gives it, or "".
        is_layer: whether it holds variables, or may: it is a layer, an optimizer or another object of its
            own, and no mere container of such.
        tensors: its variables: positions in the catalogue by their numbers.
        children: the groups in it, by their names in the file.
        config: its configuration, as far as it is known.
        klass: its class as files spell it, or "".
        name: the real names from the top to it, joined by ``/``.
        variables: what its variables are called, in their order; None where that cannot be told.
    """

    key: str
    path: str
    given: str = ""
    is_layer: bool = False
    tensors: dict[int, int] = {}
    children: dict[str, Node] = {}
    config: Layer = UNKNOWN
    klass: str = ""
    name: str = ""
    variables: tuple[str | None, ...] = ()

    @property
    def positions(self) -> list[int]:
        """Its variables in the order of their numbers: positions in the catalogue."""
        return [self.tensors[number] for number in sorted(self.tensors)]

    def below(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children.values()))


def numbered(name: str) -> tuple[str, int] | None:
    """The group and the number of a variable of a weights file, or None for any other dataset.

    Example:
        >>> numbered("layers/dense/vars/1"), numbered("vars/0"), numbered("model/conv1.weight")
        (('layers/dense/', 1), ('', 0), None)
    """
    head, _, leaf = name.rpartition("/")
    if not leaf.isdecimal() or len(leaf) > 9 or not (head == "vars" or head.endswith("/vars")):
        return None
    return head[: -len("vars")], int(leaf)


def grown(tensors: Sequence[Tensor], given: Mapping[str, str], config: Layer) -> Node:
    """The tree of a weights file, with classes, real names and variables worked out.

    Args:
        tensors: the catalogue, named by paths in the file.
        given: the real name, or "", of every group called ``vars``, by path.
        config: of the whole model.
    """
    root = Node("", "", is_layer=True)
    for path, name in given.items():
        node = _at(root, path[: -len("vars")])
        node.is_layer = True
        node.given = name if _is_usable(name) else ""
    for i, tensor in enumerate(tensors):
        found = numbered(tensor.name)
        if found is not None:
            node = _at(root, found[0])
            node.is_layer = True
            node.tensors[found[1]] = i
    _settle(root, tensors, config)
    return root


def _at(root: Node, prefix: str) -> Node:
    """The node at a path that ends in ``/``, made where it is missing."""
    node = root
    for part in prefix.split("/")[:-1]:
        if part not in node.children:
            node.children[part] = Node(part, f"{node.path}/{part}".lstrip("/"))
        node = node.children[part]
    return node


def _settle(root: Node, tensors: Sequence[Tensor], config: Layer) -> None:
    """Work out configuration, class, real name and variables of every node."""
    root.config, root.klass, root.name = config, config.klass, ""
    own = root.given or config.name
    _name_variables(root, tensors)
    waiting: list[tuple[Node, Node, str]] = [(root, root, "")]
    while waiting:
        node, layer, kept = waiting.pop()
        for child in node.children.values():
            if not child.is_layer:
                known = child.key in _CONTAINERS or variables.class_of(child.key) == "container"
                waiting.append((child, layer, kept if known else f"{kept}{child.key}/"))
                continue
            child.config = _configuration(child, node, layer)
            child.klass = _class(child, node, layer)
            label = child.given or child.config.name
            inner = variables.INNER_NAMES.get(child.key.lstrip("_"))
            if not label and inner and layer.klass in variables.INNER_ORDER:
                label = inner
            elif not label and child.key == "cell" and child.klass:
                label = child.klass
            # A container is worth a part of the name where its layers have no names of their own.
            label = label or f"{kept}{child.key}"
            child.name = f"{layer.name}/{label}" if layer.name else label
            _name_variables(child, tensors)
            waiting.append((child, child, ""))
    root.name = own


def _configuration(child: Node, parent: Node, layer: Node) -> Layer:
    """What is configured for a layer of a model; what is frozen with its model is so itself."""
    known = UNKNOWN
    if parent is not layer and parent.key == "layers" and layer.config.layers is not None:
        group = layer.config.groups.get(child.given, "") if child.given else child.key
        known = layer.config.layers.get(group, UNKNOWN)
    return known if layer.config.trained else replace(known, trained=False)


def _class(child: Node, parent: Node, layer: Node) -> str:
    """The class of a layer: configured, or told by the names of its group, its attribute or itself."""
    if child.config.klass:
        return child.config.klass
    if parent is not layer:  # in a container, groups are named after classes
        return variables.class_of(child.key)
    if child.key.lstrip("_") in variables.INNER_NAMES and layer.klass in variables.INNER_ORDER:
        return "einsum_dense"
    if child.key == "cell" and f"{layer.klass}_cell" in variables.CLASSES:
        return f"{layer.klass}_cell"
    guessed = variables.class_of(child.given)
    if guessed in variables.CLASSES or guessed in variables.INNER_ORDER:
        return guessed
    return child.key if not child.given and child.key in variables.CLASSES else ""


def _name_variables(node: Node, tensors: Sequence[Tensor]) -> None:
    own = [tensors[i] for i in node.positions]
    if own and sorted(node.tensors) == list(range(len(own))):
        node.variables = tuple(variables.names_of(node.klass, own, node.config.options))
    else:
        node.variables = (None,) * len(own)


def _is_usable(name: str) -> bool:
    """Whether a name that the file gives can be a part of a path."""
    return bool(name) and "/" not in name and name.isprintable() and name not in (".", "..")
