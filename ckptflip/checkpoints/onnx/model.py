"""The tensors of an ONNX model: where each lies in the nested messages of its file.

Source: ``onnx-ml.proto`` of ONNX 1.23. Weights are initialisers of the graph, of the graphs inside its nodes
(the branches of an If, the body of a Loop), and of what trains it; constants are attributes of nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.protobuf import (
    LENGTH,
    VARINT,
    Bytes,
    Field,
    expect,
    fields,
    repeated_varints,
    signed,
    text,
)
from ckptflip.checkpoints.splice import Edit

# Far above real models, and below what would take minutes: fields and tensors in all, graphs in graphs, bytes
# of a name.
_MOST_FIELDS = 1 << 23
_MOST_TENSORS = 1 << 18
_DEEPEST = 32
_LONGEST_NAME = 1 << 16
# Fields of a TensorProto that hold its numbers.
FLOAT_DATA, INT32_DATA, INT64_DATA, RAW_DATA, DOUBLE_DATA, UINT64_DATA = 4, 5, 7, 9, 10, 11
_DATA = frozenset((FLOAT_DATA, INT32_DATA, INT64_DATA, RAW_DATA, DOUBLE_DATA, UINT64_DATA))
EXTERNAL = 1
# Fields of an AttributeProto that may hold tensors.
_VALUES = {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"}


class Span(Struct, frozen=True, gc=False):
    """The value of a field of variable length, and what it lies in.

    Attributes:
        length_at: where its length is stored, right before it.
        start: its first byte.
        end: the byte after its last.
        parent: the message that it lies in; None for one of the file itself.
    """

    length_at: int
    start: int
    end: int
    parent: Span | None


class Entry(Struct, frozen=True):
    """A key of a tensor's ``external_data``: its value, and where that lies."""

    value: str
    span: Span


class Stored(Struct, frozen=True):
    """A TensorProto.

    Attributes:
        name: unique as far as the model's names are; with the path of what it lies in.
        dims: its shape.
        kind: the number of its data type.
        data: where its numbers lie, by the number of the field.
        scattered: whether a field of numbers is given more than once, or number by number.
        external: what is said of the file that holds its numbers; None where the model holds them.
        segment: whether it is a part of a larger tensor.
    """

    name: str
    dims: tuple[int, ...]
    kind: int
    data: dict[int, Span]
    scattered: bool
    external: dict[str, Entry] | None
    segment: bool


class _Node(Struct):
    """What is known of a node before its attributes are read."""

    name: str = ""
    operator: str = ""
    output: str = ""


def tensors(data: Bytes) -> list[Stored]:
    """All tensors of a model, in the order of the file.

    Args:
        data: the file's bytes.

    Raises:
        ProtobufError: it is no protocol buffer.
        DamagedError: it is none that a model could be.
    """
    found = list(islice(_Walk(data).model(), _MOST_TENSORS + 1))
    if len(found) > _MOST_TENSORS:
        raise DamagedError(f"it has more than {_MOST_TENSORS} tensors")
    return found


def with_lengths(edits: Sequence[tuple[Span, Edit]]) -> list[Edit]:
    """Edits of values, and those of all the lengths that follow from them.

    Args:
        edits: each with the innermost span that it lies in.
    """
    spans: dict[int, Span] = {}
    growth: dict[int, int] = {}
    for span, edit in edits:
        each: Span | None = span
        while each is not None and each.length_at not in spans:
            spans[each.length_at], growth[each.length_at] = each, 0
            each = each.parent
        growth[span.length_at] += len(edit.data) - edit.length
    found = [edit for _, edit in edits]
    # What lies inside begins later.
    for at in sorted(spans, reverse=True):
        span, grown = spans[at], growth[at]
        if not grown:
            continue
        length = encoded(span.end - span.start + grown)
        found.append(Edit(at, span.start - at, length))
        if span.parent is not None:
            growth[span.parent.length_at] += grown + len(length) - (span.start - at)
    return found


def encoded(value: int) -> bytes:
    """A number as a varint.

    Example:
        >>> encoded(150).hex()
        '9601'
    """
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


class _Walk:
    """A walk through all messages that may hold tensors."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._left = _MOST_FIELDS

    def model(self) -> Iterator[Stored]:
        """The tensors of a ModelProto."""
        trainings = functions = 0
        for field, tag_at in self._fields(None):
            match field.number:
                case 7:
                    yield from self._graph(self._span(field, tag_at, None), "", _DEEPEST)
                case 20:
                    yield from self._training(self._span(field, tag_at, None), f"training/{trainings}/")
                    trainings += 1
                case 25:
                    yield from self._function(self._span(field, tag_at, None), f"functions/{functions}/")
                    functions += 1

    def _training(self, span: Span, prefix: str) -> Iterator[Stored]:
        for field, tag_at in self._fields(span):
            if field.number in (1, 2):
                name = "initialization" if field.number == 1 else "algorithm"
                yield from self._graph(self._span(field, tag_at, span), f"{prefix}{name}/", _DEEPEST)

    def _function(self, span: Span, prefix: str) -> Iterator[Stored]:
        nodes = 0
        for field, tag_at in self._fields(span):
            match field.number:
                case 7:
                    yield from self._node(self._span(field, tag_at, span), prefix, nodes, _DEEPEST)
                    nodes += 1
                case 11:
                    yield from self._attribute(self._span(field, tag_at, span), prefix, _Node(), _DEEPEST)

    def _graph(self, span: Span, prefix: str, depth: int) -> Iterator[Stored]:
        if not depth:
            raise DamagedError(f"it has graphs in graphs, more than {_DEEPEST} deep")
        nodes = unnamed = 0
        for field, tag_at in self._fields(span):
            match field.number:
                case 1:
                    yield from self._node(self._span(field, tag_at, span), prefix, nodes, depth)
                    nodes += 1
                case 5:
                    unnamed += 1
                    found = self._tensor(self._span(field, tag_at, span))
                    yield replace(found, name=prefix + (found.name or f"initializer/{unnamed - 1}"))
                case 15:
                    yield from self._sparse(self._span(field, tag_at, span), prefix, "")

    def _node(self, span: Span, prefix: str, position: int, depth: int) -> Iterator[Stored]:
        node = _Node()
        attributes: list[Span] = []
        for field, tag_at in self._fields(span):
            match field.number:
                case 2 if not node.output:
                    node.output = self._text(field)
                case 3:
                    node.name = self._text(field)
                case 4:
                    node.operator = self._text(field)
                case 5:
                    attributes.append(self._span(field, tag_at, span))
        node.name = node.name or node.output or f"{node.operator}_{position}"
        for attribute in attributes:
            yield from self._attribute(attribute, prefix, node, depth)

    def _attribute(self, span: Span, prefix: str, node: _Node, depth: int) -> Iterator[Stored]:
        name = ""
        values: list[tuple[int, Span]] = []
        for field, tag_at in self._fields(span):
            if field.number == 1:
                name = self._text(field)
            elif field.number in _VALUES:
                values.append((field.number, self._span(field, tag_at, span)))
        owner = "/".join(filter(None, (prefix.rstrip("/"), node.name, name)))
        if node.operator == "Constant":
            owner = prefix + node.output  # a constant is known by what it is called where it is used
        several = len(values) > 1
        for i, (number, value) in enumerate(values):
            label = f"{owner}/{i}" if several else owner
            match _VALUES[number]:
                case "tensor":
                    yield replace(self._tensor(value), name=label)
                case "sparse":
                    yield from self._sparse(value, "", label)
                case "graph":
                    yield from self._graph(value, f"{label}/", depth - 1)

    def _sparse(self, span: Span, prefix: str, label: str) -> Iterator[Stored]:
        """The values and the indices of a sparse tensor, which goes by the name of its values."""
        parts = {
            field.number: self._tensor(self._span(field, tag_at, span))
            for field, tag_at in self._fields(span)
            if field.number in (1, 2)
        }
        name = label or prefix + (parts[1].name if 1 in parts else "")
        for number, part in sorted(parts.items()):
            yield replace(part, name=f"{name}.{'values' if number == 1 else 'indices'}")

    def _tensor(self, span: Span) -> Stored:
        dims: list[int] = []
        kind, name, segment, scattered, location = 0, "", False, False, 0
        data: dict[int, Span] = {}
        external: dict[str, Entry] = {}
        for field, tag_at in self._fields(span):
            match field.number:
                case 1:
                    dims += [signed(v.value) for v in repeated_varints(self._data, self._short(field))]
                case 2:
                    kind = expect(field, VARINT)
                case 3:
                    segment = True
                case 8:
                    name = self._text(field)
                case 13:
                    external.update(self._entry(self._span(field, tag_at, span)))
                case 14:
                    location = expect(field, VARINT)
                case number if number in _DATA:
                    scattered = scattered or number in data or field.wire != LENGTH
                    data[number] = span if field.wire != LENGTH else self._span(field, tag_at, span)
        found = external if location == EXTERNAL else None
        return Stored(name, tuple(dims), kind, data, scattered, found, segment)

    def _entry(self, span: Span) -> dict[str, Entry]:
        key = ""
        value = None
        for field, tag_at in self._fields(span):
            if field.number == 1:
                key = self._text(field)
            elif field.number == 2:
                value = Entry(self._text(field), self._span(field, tag_at, span))
        return {} if value is None else {key: value}

    def _fields(self, span: Span | None) -> Iterator[tuple[Field, int]]:
        """The fields of a message, each with the place of its tag."""
        at, end = (0, len(self._data)) if span is None else (span.start, span.end)
        for field in fields(self._data, at, end):
            self._left -= 1
            if self._left < 0:
                raise DamagedError(f"it has more than {_MOST_FIELDS} fields")
            yield field, at
            at = field.end

    def _span(self, field: Field, tag_at: int, parent: Span | None) -> Span:
        expect(field, LENGTH)
        while self._data[tag_at] >= 0x80:
            tag_at += 1
        return Span(tag_at + 1, field.offset, field.end, parent)

    def _text(self, field: Field) -> str:
        return text(self._data, self._short(field))

    def _short(self, field: Field) -> Field:
        if field.wire == LENGTH and field.value > _LONGEST_NAME:
            raise DamagedError(f"a name or a shape at byte {field.offset} has {field.value} bytes")
        return field
