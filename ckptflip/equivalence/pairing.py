"""Which tensor of one checkpoint is the counterpart of which in another."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from math import prod

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints import Checkpoint
from ckptflip.checkpoints.target import position_of, positions_by_name
from ckptflip.equivalence import layouts
from ckptflip.equivalence.flattening import CHANNELS_LAST, flatten_order
from ckptflip.equivalence.layouts import Layout, MisfitError, Shape
from ckptflip.equivalence.listed import Listed
from ckptflip.equivalence.names import OUTPUTS_FIRST, Logical, by_key, logicals, torch_slot
from ckptflip.equivalence.rules import Pair, Rules
from ckptflip.equivalence.stages import Network, network
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor

_BUFFER = (
    "PyTorch's momentum_buffer sums gradients, Keras' momentum sums steps, minus the learning rate times as "
    "much: the same bit of the corresponding word is hit, but the values differ by that factor"
)
_UNLISTED = Pair("")
_SOURCE = "name the record's own checkpoint with --source"


class Paired(Struct, frozen=True):
    """The counterpart of a tensor.

    Attributes:
        position: in the other catalogue.
        layout: where its elements lie there.
        notes: what else there is to say.
    """

    position: int
    layout: Layout
    notes: tuple[str, ...] = ()


class _Side(Struct, frozen=True, eq=False):
    """One of the two checkpoints: a catalogue, what its tensors are, the order of its layers."""

    tensors: Sequence[Tensor]
    found: Sequence[Logical | None]
    network: Network
    flattens: str | None


class Pairing:
    """Finds counterparts.

    Args:
        entries: the tensors that a record hits.
        target: the other checkpoint.
        rules: how tensors are paired.
        source: the record's own checkpoint, if it is at hand.

    Raises:
        UsageError: the rules name tensors or layers that the target does not have, or a tensor twice.
    """

    def __init__(
        self, entries: Sequence[Tensor], target: Checkpoint, rules: Rules, source: Checkpoint | None
    ) -> None:
        self._entries, self._rules = entries, rules
        self._target = _side(target)
        self._source = None if source is None else _side(source)
        self._names = positions_by_name(target.tensors)
        self._found = self._of_entries(entries)
        self._keys = by_key(self._target.found)
        found = [*self._found, *(() if self._source is None else self._source.found)]
        self._listed = Listed(rules, entries, found, self._target.found, self._names)

    def find(self, entry: int) -> Paired:
        """The counterpart of a tensor that the record hits.

        Raises:
            MisfitError: there is none, or it cannot be laid onto it.
        """
        tensor, known = self._entries[entry], self._found[entry]
        pair = self._listed.entries.get(entry)
        if pair is not None:
            return self._laid(tensor, known, self._names[pair.to], pair)
        owner = self._listed_owner(known)
        if owner is not None and known is not None:
            of, (layer, variable) = owner
            known = replace(known, layer=layer, variable=variable)
            return self._laid(tensor, known, self._position(tensor, known, layer), of)
        is_listed = known is not None and known.layer in self._listed.layers
        if not self._rules.auto and not is_listed:
            raise MisfitError("the map does not list it, and says auto = false")
        named = position_of(tensor, self._names)
        if named is not None and not is_listed and self._is_alike(known, named):
            return self._laid(tensor, known, named, _UNLISTED)
        if known is None:
            what = "for which parameter it is kept" if torch_slot(tensor) else "what it is"
            raise MisfitError(f"no rule tells {what}; list its counterpart in a map{self._near(tensor)}")
        layer = self._listed.layers.get(known.layer, known.layer)
        return self._laid(tensor, known, self._position(tensor, known, layer), _UNLISTED)

    def _is_alike(self, known: Logical | None, named: int) -> bool:
        """Whether a tensor of the same name is the same thing: a name of one framework in both."""
        other = self._target.found[named]
        return known is None or other is None or known.order == other.order

    def _of_entries(self, entries: Sequence[Tensor]) -> list[Logical | None]:
        if self._source is None:
            return logicals(entries, whole=False)
        names = positions_by_name(self._source.tensors)
        positions = [position_of(e, names) for e in entries]
        for entry, at in zip(entries, positions, strict=True):
            if at is None or self._source.tensors[at].shape != entry.shape:
                raise UsageError(
                    f"the source has no tensor {entry.name} of shape {entry.shape}, which the record hits: "
                    "it is not of the record's architecture"
                )
        return [self._source.found[at] for at in positions if at is not None]

    def _position(self, tensor: Tensor, known: Logical, layer: str) -> int:
        """Where the target has what a tensor is, of a layer of the target's."""
        if not known.variable:
            return self._by_size(tensor, layer, known.slot)
        at = self._keys.get((layer, known.variable, known.slot), [])
        if len(at) == 1:
            return at[0]
        if at:
            names = ", ".join(self._target.tensors[i].name for i in at[:4])
            raise MisfitError(f"its counterpart could be each of {names}; list it in a map")
        what = f"{known.slot} of the {known.variable}" if known.slot else known.variable
        raise MisfitError(f"there is no {what} of a layer {layer!r}{self._near(tensor)}")

    def _by_size(self, tensor: Tensor, layer: str, slot: str) -> int:
        """The memory of a numbered parameter, where its size alone tells which parameter that is."""
        fitting = [
            at
            for (of, _, kept), positions in self._keys.items()
            for at in positions
            if of == layer and kept == slot and self._target.tensors[at].size == tensor.size
        ]
        if len(fitting) == 1 and len(self._target.tensors[fitting[0]].shape) == len(tensor.shape):
            return fitting[0]
        if len(fitting) > 1:
            raise MisfitError(
                f"its number does not tell which parameter of {layer!r} it belongs to; {_SOURCE}"
            )
        raise MisfitError(f"there is no {slot} of its size for a layer {layer!r}{self._near(tensor)}")

    def _laid(self, tensor: Tensor, known: Logical | None, at: int, pair: Pair) -> Paired:
        other, other_known = self._target.tensors[at], self._target.found[at]
        layout = self._layout(tensor, known, other, other_known, pair)
        if layout.target != other.shape:
            raise MisfitError(
                f"it would become {layout.target} ({layout.name}), but {other.name} is {other.shape}"
            )
        crossed = known is not None and other_known is not None and known.order != other_known.order
        is_buffer = crossed and known is not None and known.slot == "momentum_buffer"
        return Paired(at, layout, (_BUFFER,) if is_buffer else ())

    def _layout(
        self, tensor: Tensor, known: Logical | None, other: Tensor, other_known: Logical | None, pair: Pair
    ) -> Layout:
        shape = tensor.shape
        if pair.layout == "same":
            return layouts.same(shape)
        first = _is_first(pair.layout, shape, other.shape, known)
        if pair.flatten is not None and len(shape) == 2:
            return _either_way(shape, other.shape, first, channels=_channels_of(pair.flatten, shape, first))
        if pair.layout in ("depthwise", "gru"):
            gates = 3 if pair.layout == "gru" else 0
            return _either_way(shape, other.shape, first, gates=gates)
        if pair.layout is not None:
            return layouts.permuted(pair.layout, shape)
        if known is None or other_known is None:
            if shape != other.shape:
                raise MisfitError(f"{other.name} is {other.shape}; give the layout in a map")
            return layouts.same(shape)
        return self._known_layout(tensor, known, other, other_known)

    def _known_layout(self, tensor: Tensor, known: Logical, other: Tensor, other_known: Logical) -> Layout:
        shape = tensor.shape
        if known.table or other_known.table or known.order == other_known.order:
            if shape != other.shape:
                raise MisfitError(f"its counterpart {other.name} is {other.shape}")
            return layouts.same(shape)
        if len(shape) < 2:
            self._check_vector(tensor, other)
            return layouts.same(shape)
        first = known.order == OUTPUTS_FIRST
        channels = None
        if len(shape) == 2:
            channels = self._channels(shape, known.layer, other_known.layer, first=first)
        try:
            return _either_way(shape, other.shape, first, channels=channels, gates=self._gates(other_known))
        except MisfitError as why:
            raise MisfitError(f"its counterpart {other.name} does not fit: {why}") from None

    def _check_vector(self, tensor: Tensor, other: Tensor) -> None:
        if tensor.shape != other.shape:
            raise MisfitError(f"its counterpart {other.name} is {other.shape}")
        for side in (self._target, self._source):
            if side is not None and tensor.size in side.network.flattened_sizes():
                raise MisfitError(
                    "it has one number for each input of a flattened convolution, whose order differs; "
                    "convert it yourself"
                )

    def _channels(self, shape: Shape, layer: str, other_layer: str, *, first: bool) -> int | None:
        """The channels of the flattened convolution before a dense layer, where their order differs."""
        for name in (layer, other_layer):
            if name in self._listed.flatten:
                return _channels_of(self._listed.flatten[name], shape, first)
        why: MisfitError | None = None
        answers = set()
        for side, name in ((self._target, other_layer), (self._source, layer)):
            if side is None:
                continue
            try:
                answers.add(side.network.channels_before(name))
            except MisfitError as error:
                why = why or error
        if len(answers) == 1:
            channels = answers.pop()
            return None if channels is None else self._as_flattened(channels, first)
        if answers:
            raise MisfitError("the two checkpoints tell different shapes before flattening; give it in a map")
        raise why or MisfitError("the shape before flattening is not known; give it in a map")

    def _as_flattened(self, channels: int, first: bool) -> int | None:
        """The channels, if the side that keeps outputs last flattens them last; None if it does not."""
        last = self._target if first else self._source
        order = None if last is None else last.flattens
        if order is None:
            raise MisfitError(
                "whether the model that keeps a kernel's outputs last flattens its channels last, or moves "
                f"them before, is not known; {_SOURCE} if that is it, or list it in a map: with flatten, "
                "or with the layout OI->IO if channels come first in both"
            )
        return channels if order == CHANNELS_LAST else None

    def _gates(self, known: Logical) -> int:
        """The gates of a recurrent layer of the target; 0 for any other layer."""
        at = self._keys.get((known.layer, "recurrent", ""), [])
        if not at:
            return 0
        shape = self._target.tensors[at[0]].shape
        return max(shape) // min(shape) if len(shape) == 2 and min(shape) else 0

    def _listed_owner(self, known: Logical | None) -> tuple[Pair, tuple[str, str]] | None:
        """The listed pair of an optimizer's memory's parameter, and what the target's parameter is."""
        if known is None or not known.slot:
            return None
        listed = [Tensor(name, (1,), self._entries[0].number) for name in self._listed.pairs]
        for parameter, pair in zip(logicals(listed), self._listed.pairs.values(), strict=True):
            other = self._target.found[self._names[pair.to]]
            if parameter is None or other is None or parameter.slot:
                continue
            if (parameter.layer, parameter.variable) == (known.layer, known.variable):
                return pair, (other.layer, other.variable)
        return None

    def _near(self, tensor: Tensor) -> str:
        near = difflib.get_close_matches(tensor.name, [t.name for t in self._target.tensors], 1, cutoff=0.5)
        return f"; did you mean {near[0]!r}? Then say so in a map" if near else ""


def _side(target: Checkpoint) -> _Side:
    found = logicals(target.tensors)
    names = [t.name for t in target.tensors]
    # Others list names in alphabetical order, and so does what was converted from them.
    in_order = target.format == "pytorch" and names != sorted(names)
    return _Side(
        target.tensors, found, network(target.tensors, found, in_order=in_order), flatten_order(target)
    )


def _is_first(layout: str | None, shape: Shape, other: Shape, known: Logical | None) -> bool:
    """Whether the one tensor is the one with its outputs first."""
    if layout == "depthwise":
        return len(shape) > 2 and shape[1] == 1 and shape[2:] == other[:-2]
    if layout is not None and "->" in layout and "O" in layout:
        return layout.strip().startswith("O")
    return known is None or known.order == OUTPUTS_FIRST


def _either_way(
    shape: Shape,
    other: Shape,
    first: bool,
    *,
    channels: int | None = None,
    gates: int = 0,
) -> Layout:
    if first:
        return layouts.between(shape, other, channels=channels, gates=gates)
    return layouts.between(other, shape, channels=channels, gates=gates).inverse()


def _channels_of(flatten: Shape, shape: Shape, first: bool) -> int:
    """The channels of a shape before flattening, if a dense weight has as many inputs."""
    inputs = shape[1] if first else shape[0]
    if prod(flatten) != inputs:
        raise MisfitError(f"its {inputs} inputs are not {list(flatten)} flattened")
    return flatten[0]
