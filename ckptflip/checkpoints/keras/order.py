"""Which parameters an optimizer keeps state for, in which order: told by shapes and by the model's structure.

An optimizer's variables come in the order of the model's trained parameters. A weights file does not say that
order, but most of it can be worked out: it is known inside an archive's models and inside Keras' own layers,
and layers of one class in one container are numbered by it. The rest follows from shapes, or is left open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from msgspec import Struct

from ckptflip.checkpoints.keras.tree import Node
from ckptflip.checkpoints.keras.variables import CLASSES, INNER_ORDER, class_of, counter_of, is_trained
from ckptflip.faults.catalogue import Tensor

Shape = tuple[int, ...]
# Steps of the search before an order is given up: many layers of one shape and of unknown order.
_MOST_STEPS = 300_000


class _Part(Struct, eq=False):
    """A layer with its trained parameters and what is in it.

    Attributes:
        own: its parameters, positions in the catalogue.
        chains: the layers in it: the order within each chain is known, between chains it is not.
        count: parameters of the layer and of all in it.
    """

    own: list[int]
    chains: list[list[_Part]]
    count: int


def parameters_for(root: Node, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[int | None] | None:
    """The parameter behind each shape of an optimizer's state, None where that cannot be told.

    Args:
        root: the model's layers.
        tensors: the catalogue.
        shapes: of the parameters, in the optimizer's order.

    Returns:
        None where the shapes are not those of all the model's parameters.
    """
    part = _part(root, tensors)
    found = _Search(tensors, shapes).fits(part, 0) if part.count == len(shapes) else None
    if found is None:
        return None
    return [next(iter(each)) if len(each) == 1 else None for each in found]


def parameters_by_shape(
    root: Node, tensors: Sequence[Tensor], shapes: Sequence[Shape]
) -> list[int | None] | None:
    """The same when some layers are frozen: told by shapes that one parameter and one place alone have."""
    by_shape: dict[Shape, list[int]] = {}
    for p in _all(_part(root, tensors)):
        by_shape.setdefault(tensors[p].shape, []).append(p)
    counts: dict[Shape, int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    if any(counts[shape] > len(by_shape.get(shape, ())) for shape in counts):
        return None  # the state of other parameters than the file's
    return [by_shape[s][0] if len(by_shape[s]) == 1 else None for s in shapes]


def _part(node: Node, tensors: Sequence[Tensor], shared: Collection[str | None] = ()) -> _Part:
    own = [
        i
        for i, name in zip(node.positions, node.variables, strict=True)
        if node.config.trained and is_trained(name, tensors[i]) and name not in shared
    ]
    # This wrapper keeps the kernel of what it wraps as its own too.
    shared = node.variables if node.klass == "spectral_normalization" else ()
    chains: dict[tuple[str, str], list[tuple[int, Node]]] = {}
    waiting, mixed = [node], _is_mixed(node)
    while waiting:
        holder = waiting.pop()
        for child in holder.children.values():
            if not child.is_layer:
                waiting.append(child)
            elif not _is_other(node, child):
                chain, place = _chain(node, holder, child, mixed=mixed)
                chains.setdefault(chain, []).append((place, child))
    parts = [
        [_part(child, tensors, shared) for _, child in sorted(chain, key=lambda c: c[0])]
        for chain in chains.values()
    ]
    full = [kept for chain in parts if (kept := [p for p in chain if p.count])]
    return _Part(own, full, len(own) + sum(p.count for chain in full for p in chain))


def _is_other(node: Node, child: Node) -> bool:
    """Whether a group at the top is no part of the model: the optimizer, a metric."""
    return not node.path and child.path.split("/")[0] in ("optimizer", "metrics")


def _is_mixed(node: Node) -> bool:
    """Whether a layer holds others in attributes, of which only those that sort late lie in ``layers``."""
    return any(c.is_layer or c.key != "layers" for c in node.children.values() if not _is_other(node, c))


def _chain(node: Node, holder: Node, child: Node, *, mixed: bool) -> tuple[tuple[str, str], int]:
    """What a layer's order is known against, and its place there."""
    if child.config.place >= 0:
        return ("configured", ""), child.config.place
    inner = INNER_ORDER.get(node.klass, ())
    if child.key.lstrip("_") in inner:
        return ("inner", ""), inner.index(child.key.lstrip("_"))
    named = class_of(child.given)
    if mixed and named in CLASSES:
        return ("named", named), counter_of(child.given)
    if holder is not node:
        return (holder.path, class_of(child.key)), counter_of(child.key)
    return (child.path, ""), 0


class _Search:
    """Fits layers to a list of shapes, in every way that there is."""

    def __init__(self, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> None:
        self._tensors = tensors
        self._shapes = shapes
        self._steps = 0
        self._known: dict[tuple[int, int], list[set[int]] | None] = {}

    def fits(self, part: _Part, start: int) -> list[set[int]] | None:
        """The parameters that each shape from `start` on can be of, taken for those of a layer and all in it.

        None: they cannot be those, or there are too many ways to try.
        """
        key = (id(part), start)
        if key not in self._known:
            self._known[key] = self._fits(part, start)
        return self._known[key]

    def _fits(self, part: _Part, start: int) -> list[set[int]] | None:
        own = [self._tensors[p].shape for p in part.own]
        if own != list(self._shapes[start : start + len(own)]):
            return None
        found = [{p} for p in part.own] + [set[int]() for _ in range(part.count - len(own))]
        # A state says how many layers of each chain have been placed.
        first, last = (0,) * len(part.chains), tuple(map(len, part.chains))
        steps = self._forward(part, {first: start + len(own)})
        leading_on = {last}
        for before, after, at, placed in reversed(steps):
            if after in leading_on:
                leading_on.add(before)
                for i, each in enumerate(placed):
                    found[at - start + i] |= each
        return found if first in leading_on else None

    def _forward(
        self, part: _Part, states: dict[tuple[int, ...], int]
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], int, list[set[int]]]]:
        """Every way to place one more layer: the states before and after, where, the layer's parameters."""
        steps = []
        waiting = deque(states)
        while waiting:
            before = waiting.popleft()
            at = states[before]
            for c, chain in enumerate(part.chains):
                self._steps += 1
                if self._steps > _MOST_STEPS:
                    return []
                placed = self.fits(chain[before[c]], at) if before[c] < len(chain) else None
                if placed is None:
                    continue
                after = (*before[:c], before[c] + 1, *before[c + 1 :])
                self._steps += len(placed) + len(after)
                steps.append((before, after, at, placed))
                if after not in states:
                    states[after] = at + len(placed)
                    waiting.append(after)
        return steps


def _all(part: _Part) -> list[int]:
    """All parameters of a layer and of those in it."""
    found: list[int] = []
    waiting = [part]
    while waiting:
        each = waiting.pop()
        found += each.own
        waiting += [p for chain in each.chains for p in chain]
    return found
