"""The layers of a network in order, to tell what a dense layer takes its inputs from.

PyTorch flattens a convolution's output as channels × height × width, Keras as height × width × channels.
Which dense layer comes behind a flattened convolution, and of how many channels, is in no checkpoint: it is
inferred where only one answer is possible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct

from ckptflip.equivalence.layouts import MisfitError
from ckptflip.equivalence.names import OUTPUTS_FIRST, Logical
from ckptflip.faults.catalogue import Tensor

_VARIABLE = re.compile(r"(layers/.+)/vars/\d+")
_SLOT = re.compile(r"(?:.*/)?optimizer/(?:vars|state)/(\d+)(?:/.*)?")
_NUMBERED = re.compile(r"(.*?)_?(\d*)")


class Stage(Struct, frozen=True):
    """A layer with a kernel.

    Attributes:
        layer: `Logical.layer`.
        kind: ``conv``, ``dense``, or ``other`` for recurrent layers and embeddings.
        inputs: features or channels that it takes.
        outputs: those that it gives.
        label: what its place is read from: its name, or Keras' count of layers of a class.
    """

    layer: str
    kind: str
    inputs: int
    outputs: int
    label: str


class Network(Struct, frozen=True):
    """The layers of a checkpoint.

    Attributes:
        stages: in order, if `ordered`.
        ordered: whether the order is known: from the numbers of an optimizer's state, or the file's order.
    """

    stages: tuple[Stage, ...]
    ordered: bool

    def channels_before(self, layer: str) -> int | None:
        """The channels of the convolution whose flattened output a dense layer takes; None: no convolution's.

        Raises:
            MisfitError: more than one answer is possible, or none; says which.
        """
        dense = next((s for s in self.stages if s.layer == layer and s.kind == "dense"), None)
        if dense is None or not any(s.kind == "conv" for s in self.stages):
            return None
        before = self._before(dense)
        if before is not None and before.outputs == dense.inputs:
            return None
        if before is not None and before.kind == "conv" and dense.inputs % before.outputs == 0:
            return before.outputs
        return self._only_answer(dense)

    def flattened_sizes(self) -> set[int]:
        """Lengths of vectors that hold one number for each position of each channel, not one per channel."""
        if not any(s.kind == "conv" for s in self.stages):
            return set()
        outputs = {s.outputs for s in self.stages}
        return {s.inputs for s in self.stages if s.kind == "dense" and s.inputs not in outputs}

    def _before(self, dense: Stage) -> Stage | None:
        """The layer that a dense layer follows, if that is known."""
        if self.ordered:
            at = self.stages.index(dense)
            return self.stages[at - 1] if at else None
        convs = _in_sequence([s for s in self.stages if s.kind == "conv"])
        denses = _in_sequence([s for s in self.stages if s.kind == "dense"])
        if convs is None or denses is None or any(s.kind == "other" for s in self.stages):
            return None
        at = denses.index(dense)
        if at:
            return denses[at - 1]
        # Without an order of all layers, a dense layer might come before the last convolution.
        pooled = any(s.outputs == dense.inputs for s in convs)
        return None if pooled and convs[-1].outputs != dense.inputs else convs[-1]

    def _only_answer(self, dense: Stage) -> int | None:
        others = [s for s in self.stages if s is not dense]
        flattened = sorted(
            {
                s.outputs
                for s in others
                if s.kind == "conv" and s.outputs < dense.inputs and dense.inputs % s.outputs == 0
            }
        )
        plain = any(s.outputs == dense.inputs for s in others)
        if len(flattened) + plain == 1:
            return flattened[0] if flattened else None
        answers = [f"{c} channels × {dense.inputs // c} positions" for c in flattened]
        answers += ["features, not flattened"] * plain
        said = f"could be {' or '.join(answers)}" if answers else "fit no convolution and no other layer"
        raise MisfitError(
            f"its {dense.inputs} inputs {said}; give the shape before flattening in a map: "
            f"[flatten] {dense.layer} = [channels, height, width]"
        )


def network(tensors: Sequence[Tensor], found: Sequence[Logical | None], *, in_order: bool) -> Network:
    """The layers of a catalogue.

    Args:
        tensors: the catalogue.
        found: what each tensor is.
        in_order: whether the catalogue lists tensors in the order of the network.
    """
    recurrent = {k.layer for k in found if k is not None and k.variable == "recurrent"}
    stages: list[Stage] = []
    places: list[int] = []
    numbers = slot_numbers(tensors, found)
    for i, (tensor, known) in enumerate(zip(tensors, found, strict=True)):
        if known is None or known.slot or known.variable != "weight" or len(tensor.shape) < 2:
            continue
        stages.append(_stage(tensor, known, known.layer in recurrent))
        places.append(numbers.get(known.layer, -1) if not in_order else i)
    if in_order or (stages and min(places) >= 0):
        stages = [s for _, s in sorted(zip(places, stages, strict=True), key=lambda pair: pair[0])]
        return Network(tuple(stages), ordered=True)
    return Network(tuple(stages), ordered=False)


def _stage(tensor: Tensor, known: Logical, is_recurrent: bool) -> Stage:
    shape = tensor.shape
    names = " ".join((tensor.name, *tensor.aliases))
    if known.order == OUTPUTS_FIRST:
        inputs, outputs = shape[1], shape[0]
    elif "depthwise" in names and len(shape) > 2:
        inputs, outputs = shape[-2], shape[-2] * shape[-1]
    elif "transpose" in names and len(shape) > 2:
        inputs, outputs = shape[-1], shape[-2]
    else:
        inputs, outputs = shape[-2], shape[-1]
    kind = "conv" if len(shape) > 2 else "dense"
    if is_recurrent:
        # Its states are as many as the rows of what it takes back, whatever the gates.
        kind, outputs = "other", 0
    elif known.table or tensor.role == "embedding":
        kind, outputs = "other", shape[-1]
    counted = next((m.group(1) for n in tensor.aliases if (m := _VARIABLE.fullmatch(n))), "")
    return Stage(known.layer, kind, inputs, outputs, counted.replace("/", "_") or known.layer)


def slot_numbers(tensors: Sequence[Tensor], found: Sequence[Logical | None]) -> dict[str, int]:
    """The place of each layer in the order in which an optimizer was given its parameters."""
    places: dict[str, int] = {}
    for tensor, known in zip(tensors, found, strict=True):
        if known is None or not known.slot:
            continue
        numbers = [int(m.group(1)) for n in (tensor.name, *tensor.aliases) if (m := _SLOT.fullmatch(n))]
        if numbers:
            places[known.layer] = min(numbers[0], places.get(known.layer, numbers[0]))
    return places


def _in_sequence(stages: list[Stage]) -> list[Stage] | None:
    """Stages in the order of their numbers, if they differ in nothing else; None where they do."""
    parts = [_NUMBERED.fullmatch(s.label) for s in stages]
    keys = [(m.group(1), int(m.group(2) or 0)) for m in parts if m is not None]
    if len({stem for stem, _ in keys}) > 1 or len({n for _, n in keys}) < len(stages):
        return None
    return [s for _, s in sorted(zip(keys, stages, strict=True), key=lambda pair: pair[0])]
