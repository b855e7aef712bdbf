"""The graph of Python objects that a TensorFlow 2 checkpoint was made from: what variables are really called.

A variable's key is the first path by which TensorFlow found it, such as ``optimizer/_trainable_variables/0``
for a kernel that Keras calls ``sequential/hidden/kernel``. The graph, a message stored as one string tensor,
holds the latter, all other paths, and which variables are an optimizer's memory of which others.

Source: tensorflow/core/protobuf/trackable_object_graph.proto.
"""

from __future__ import annotations

import re

from msgspec import Struct, field

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.protobuf import (
    LENGTH,
    VARINT,
    Field,
    ProtobufError,
    expect,
    fields,
    signed,
    text,
)

KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
VARIABLE = "VARIABLE_VALUE"
# Names and paths beyond these are left out.
_LONGEST_NAME = 1024
_DEEPEST = 64
_MOST_NODES = 1_000_000
_MOST_ATTRIBUTES = 4_000_000
_MOST_PATHS = 4
# What a Keras 3 optimizer calls the variables that it trains, and its own.
_TRAINED = "_trainable_variables"
_OWN = "_variables"


class Variable(Struct, frozen=True):
    """What the graph says of one variable.

    Attributes:
        full_name: the name it was created with; may be empty, and is not always unique.
        paths: where it is an attribute of some object, parts joined by ``/``.
        optimizer: whether it is state of an optimizer.
        of: the key of the variable that this is an optimizer's memory of, or "".
    """

    full_name: str
    paths: tuple[str, ...]
    optimizer: bool
    of: str


class _Node(Struct):
    """An object: its attributes that are objects, by name, and its key if it is a variable."""

    children: list[tuple[int, str]] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    key: str = ""
    full_name: str = ""


def variables(data: bytes) -> dict[str, Variable]:
    """The variables of a graph, by key.

    Args:
        data: the graph's message.

    Raises:
        DamagedError: it is malformed.
    """
    try:
        nodes = _nodes(data)
    except ProtobufError as why:
        raise DamagedError(str(why)) from None
    owners, state = _optimizers(nodes)
    first = _first_paths(nodes)
    paths: dict[int, list[str]] = {}
    for number, node in enumerate(nodes):
        for child, name in node.children:
            # A number is a place in a list, which is no name.
            if child < len(nodes) and nodes[child].key and not name.isdecimal():
                known = paths.setdefault(child, [])
                if len(known) < _MOST_PATHS:
                    known += _path(number, name, first)
    return {
        node.key: Variable(node.full_name, tuple(paths.get(i, ())), i in state, _key(nodes, owners.get(i)))
        for i, node in enumerate(nodes)
        if node.key
    }


def _nodes(data: bytes) -> list[_Node]:
    nodes: list[_Node] = []
    attributes = 0
    for message in fields(data, 0, len(data)):
        if message.number == 1:
            nodes.append(_node(data, message))
            attributes += len(nodes[-1].children)
            if len(nodes) > _MOST_NODES or attributes > _MOST_ATTRIBUTES:
                raise DamagedError("it has more objects than any checkpoint")
    return nodes


def _node(data: bytes, message: Field) -> _Node:
    expect(message, LENGTH)
    node = _Node()
    for part in fields(data, message.offset, message.end):
        if part.number == 1:
            node.children.append(_child(data, part))
        elif part.number == 2:
            _attribute(data, part, node)
        elif part.number == 3:
            node.slots.append(_slot(data, part))
    return node


def _child(data: bytes, message: Field) -> tuple[int, str]:
    expect(message, LENGTH)
    number, name = 0, ""
    for part in fields(data, message.offset, message.end):
        if part.number == 1:
            number = _number(part)
        elif part.number == 2:
            if part.value > _LONGEST_NAME:
                raise ProtobufError(f"the name at byte {part.offset} has {part.value} bytes")
            name = text(data, part)
    return number, name


def _attribute(data: bytes, message: Field, node: _Node) -> None:
    """Take in a SerializedTensor, if it is a variable's value."""
    expect(message, LENGTH)
    found = {1: "", 2: "", 3: ""}
    for part in fields(data, message.offset, message.end):
        if part.number in found:
            found[part.number] = text(data, part)
    if found[1] == VARIABLE:
        node.full_name, node.key = found[2][:_LONGEST_NAME], found[3]


def _slot(data: bytes, message: Field) -> tuple[int, int]:
    """The variable of an optimizer's memory, and the memory."""
    expect(message, LENGTH)
    found = {1: 0, 3: 0}
    for part in fields(data, message.offset, message.end):
        if part.number in found:
            found[part.number] = _number(part)
    return found[1], found[3]


def _number(part: Field) -> int:
    number = signed(expect(part, VARINT))
    if number < 0:
        raise ProtobufError(f"the object at byte {part.offset} has the number {number}")
    return number


def _optimizers(nodes: list[_Node]) -> tuple[dict[int, int], set[int]]:
    """Each optimizer's memory of a variable with that variable, and all that belongs to optimizers alone."""
    owners: dict[int, int] = {}
    state: set[int] = set()
    for node in nodes:
        owners.update((memory, original) for original, memory in node.slots)
        lists = {name: child for child, name in node.children}
        if _TRAINED not in lists:
            continue
        trained = _members(nodes, lists[_TRAINED])
        theirs = set(trained.values())
        for name, child in lists.items():
            members = {} if name == _TRAINED else _members(nodes, child)
            state |= {child, *members.values()} - theirs
            if name != _OWN:
                # Such as _momentums: one entry for each trained variable.
                owners.update(
                    (m, trained[at]) for at, m in members.items() if at in trained and m not in theirs
                )
    return owners, state | set(owners)


def _members(nodes: list[_Node], number: int) -> dict[str, int]:
    """The entries of a list, by position."""
    if number >= len(nodes):
        return {}
    return {name: child for child, name in nodes[number].children if name.isdecimal()}


def _key(nodes: list[_Node], number: int | None) -> str:
    return nodes[number].key if number is not None and number < len(nodes) else ""


def _first_paths(nodes: list[_Node]) -> dict[int, tuple[int, str]]:
    """The parent of each object and its name there, on the shortest path from the root."""
    found: dict[int, tuple[int, str]] = {}
    queue = [0]
    for number in queue:
        for child, name in nodes[number].children if number < len(nodes) else ():
            if child and child not in found:
                found[child] = (number, name)
                queue.append(child)
    return found


def _path(parent: int, name: str, first: dict[int, tuple[int, str]]) -> list[str]:
    """The path of an attribute, escaped as in keys; none if it is too deep or hangs on nothing."""
    parts = [name]
    while parent:
        if len(parts) > _DEEPEST or parent not in first:
            return []
        parent, part = first[parent]
        parts.append(part)
    path = "/".join(re.sub(r"[./]", lambda c: ".." if c[0] == "." else ".S", p) for p in reversed(parts))
    return [path] if len(path) <= _LONGEST_NAME else []
