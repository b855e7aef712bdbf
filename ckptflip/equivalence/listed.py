"""What a map lists, checked against the two checkpoints before anything is placed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from ckptflip.equivalence.layouts import Shape
from ckptflip.equivalence.names import Logical, normal_layer
from ckptflip.equivalence.rules import Pair, Rules
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor

_Found = Sequence[Logical | None]


class Listed:
    """What a map lists, turned around where it was written for the way back.

    Args:
        rules: the map.
        entries: the tensors that a record hits.
        found: what they are, and what the tensors of the record's own checkpoint are, if it is at hand.
        target: what the other checkpoint's tensors are.
        names: where each name stands in its catalogue.

    Attributes:
        pairs: tensors by name, with their counterparts.
        entries: the same by position among `entries`.
        layers: layers, with those of the other checkpoint.
        flatten: shapes before flattening, by layer.

    Raises:
        UsageError: it names tensors or layers that there are not, or gives two tensors one counterpart.
    """

    def __init__(
        self,
        rules: Rules,
        entries: Sequence[Tensor],
        found: _Found,
        target: _Found,
        names: Mapping[str, int],
    ) -> None:
        hit = {k.layer for k in found[: len(entries)] if k is not None}
        here = {k.layer for k in target if k is not None}
        self.pairs = _pairs(rules, names)
        self.entries = _entries(self.pairs, entries)
        self.layers = _layers(rules, here, hit)
        self.flatten: dict[str, Shape] = {normal_layer(n): shape for n, shape in rules.flatten.items()}
        known = here | {k.layer for k in found if k is not None}
        for name in self.flatten:
            if name not in known:
                raise UsageError(
                    f"[flatten] names a layer {name!r}, which neither checkpoint has{_near(name, known)}"
                )


def _pairs(rules: Rules, names: Mapping[str, int]) -> dict[str, Pair]:
    pairs = rules.pairs()
    lost = [p.to for p in pairs.values() if p.to not in names]
    if lost and all(name in names for name in pairs):
        pairs = {p.to: _turned(name, p) for name, p in pairs.items()}
    elif lost:
        raise UsageError(
            f"the map pairs a tensor with {lost[0]!r}, which the target does not have{_near(lost[0], names)}"
        )
    if len({names[p.to] for p in pairs.values()}) < len(pairs):
        raise UsageError("the map gives two tensors the same counterpart")
    return pairs


def _entries(pairs: Mapping[str, Pair], entries: Sequence[Tensor]) -> dict[int, Pair]:
    listed: dict[int, Pair] = {}
    for name, pair in pairs.items():
        called = [i for i, e in enumerate(entries) if name in (e.name, *e.aliases)]
        called = called or [i for i, e in enumerate(entries) if name in _short_names(e)]
        if len(called) > 1:
            both = " and ".join(entries[i].name for i in called[:2])
            raise UsageError(f"the map's {name!r} could be {both}: give all of the name")
        listed.update(dict.fromkeys(called, pair))
    return listed


def _layers(rules: Rules, here: set[str], hit: set[str]) -> dict[str, str]:
    layers = {normal_layer(a): normal_layer(b) for a, b in rules.layers.items()}
    lost = [b for b in layers.values() if b not in here]
    # A map may be written for the way back.
    if lost and len(lost) == len(layers) and layers.keys() <= here - hit:
        return {b: a for a, b in layers.items()}
    if lost:
        raise UsageError(
            f"the map names a layer {lost[0]!r}, which the target does not have{_near(lost[0], here)}"
        )
    return layers


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _short_names(tensor: Tensor) -> list[str]:
    """A tensor's names without what stands before the layer's."""
    names = [tensor.name, *tensor.aliases]
    return [n.rpartition("/")[2] for n in names] + [n.partition("/")[2] for n in names]


def _turned(name: str, pair: Pair) -> Pair:
    """A pair for the way back."""
    layout = pair.layout
    if layout is not None and "->" in layout:
        left, _, right = (part.strip() for part in layout.partition("->"))
        layout = f"{right}->{left}"
    return Pair(name, layout, pair.flatten)
