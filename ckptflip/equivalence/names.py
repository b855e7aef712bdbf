"""What a tensor is, whatever its framework calls it: which variable of which layer, or an optimizer's memory.

PyTorch's ``model/conv1.weight``, Keras' ``conv1/kernel`` and Chainer's ``predictor/conv1/W`` are all the
weight of the layer ``conv1``. PyTorch's names of an optimizer's memory (``exp_avg``) stand for the others'.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.faults.catalogue import Tensor

# How a kernel's axes are ordered: outputs first (PyTorch, Chainer), or last (Keras, TensorFlow, Flax).
OUTPUTS_FIRST, OUTPUTS_LAST = "outputs first", "outputs last"

_FIRST = {
    "weight": "weight",
    "W": "weight",
    "bias": "bias",
    "b": "bias",
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "mean",
    "running_var": "variance",
    "avg_mean": "mean",
    "avg_var": "variance",
    "weight_ih_l0": "weight",
    "weight_hh_l0": "recurrent",
}
_LAST = {
    "kernel": "weight",
    "_kernel": "weight",
    "depthwise_kernel": "weight",
    "weights": "weight",
    "recurrent_kernel": "recurrent",
    "embeddings": "weight",
    "embedding": "weight",
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
    "bias": "bias",
    "biases": "bias",
    "moving_mean": "mean",
    "moving_variance": "variance",
    "mean": "mean",
    "var": "variance",
}
# The variables that an optimizer trains, in the order in which PyTorch's layers register them.
PARAMETERS = ("weight", "recurrent", "bias")
# Names that only frameworks of the first kind give, where no dot tells.
_ONLY_FIRST = frozenset(("W", "b", "avg_mean", "avg_var"))
_TABLES = frozenset(("embeddings", "embedding"))
# What may stand in front of a layer's name without being a layer.
_CONTAINERS = frozenset(
    (
        *("model", "module", "_orig_mod", "state_dict", "model_state_dict", "params", "weights", "net"),
        *("model_weights", "network", "predictor", "updater", "model:main", "layers", "batch_stats"),
    )
)
_CELL = re.compile(r"(lstm|gru|simple_rnn)_cell(_\d+)?")
_TORCH_SLOT = re.compile(r"(?:.*[/.])?optim[^/.]*(?:[/.].*)?[/.]?state[/.](.+)[/.](\w+)")
_KERAS_SLOT = re.compile(r"(.+)/(\w+) of (.+)")
_TORCH_SLOTS = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"),
        *("acc_delta", "exp_inf"),
    )
)
_ADAM = {"momentum": "exp_avg", "velocity": "exp_avg_sq", "velocity_hat": "max_exp_avg_sq"}
_RMSPROP = {"velocity": "square_avg", "momentum": "momentum_buffer", "average_gradient": "grad_avg"}
_KERAS_SLOTS = {
    **dict.fromkeys(("adam", "adamw", "adam_w", "nadam", "lamb"), _ADAM),
    **dict.fromkeys(("rmsprop", "rm_sprop"), _RMSPROP),
    "sgd": {"momentum": "momentum_buffer"},
    "adagrad": {"accumulator": "sum"},
    "adadelta": {"accumulated_grad": "square_avg", "accumulated_delta_var": "acc_delta"},
    "adamax": {"momentum": "exp_avg", "norm": "exp_inf"},
    "lion": {"momentum": "exp_avg"},
}


class Logical(Struct, frozen=True):
    """What a tensor is.

    Attributes:
        layer: its layer, parts joined by ``_``, in lower case and without what stands before it.
        variable: ``weight``, ``bias``, ``mean``, ``variance`` or ``recurrent``; "" where it cannot be told
            for which parameter an optimizer keeps something.
        slot: what an optimizer keeps for it, as PyTorch calls it; "" for the variable itself.
        order: `OUTPUTS_FIRST` or `OUTPUTS_LAST`.
        table: whether it is an embedding's, whose rows stay rows.
        number: the place of the parameter in the optimizer's order, or None.
    """

    layer: str
    variable: str
    slot: str = ""
    order: str = OUTPUTS_FIRST
    table: bool = False
    number: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What it has in common with its counterpart."""
        return self.layer, self.variable, self.slot


def logicals(tensors: Sequence[Tensor], *, whole: bool = True) -> list[Logical | None]:
    """What each tensor of a catalogue is; None where its name does not tell.

    Args:
        tensors: a catalogue.
        whole: whether these are all tensors of a checkpoint. PyTorch numbers the parameters of an optimizer;
            which is meant follows from the other tensors. Where some are missing, the variable is left "".

    Example:
        >>> from ckptflip.bits import lookup
        >>> f4 = lookup("float32")
        >>> names = ("model/conv1.weight", "c/kernel", "sgd/momentum of c/kernel", "predictor/c/b")
        >>> for each in logicals([Tensor(name, (2, 2), f4) for name in names]):
        ...     print(each.key)
        ('conv1', 'weight', '')
        ('c', 'weight', '')
        ('c', 'weight', 'momentum_buffer')
        ('c', 'bias', '')
    """
    found = [_of_tensor(t) for t in tensors]
    numbered: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        slot = torch_slot(tensor)
        if slot is not None and slot[0].isdecimal():
            layer = normal_layer(tensor.layer)
            found[i] = Logical(layer, "", slot[1], number=int(slot[0])) if layer else None
            numbered[layer, slot[1]].append(i)
    if not whole:
        return found
    parameters: dict[str, list[int]] = defaultdict(list)
    for i, known in enumerate(found):
        if known is not None and not known.slot and known.variable in PARAMETERS:
            parameters[known.layer].append(i)
    for (layer, _), slots in numbered.items():
        for i, of in _paired(slots, parameters[layer], tensors, found):
            number, owner = found[i], found[of]
            assert number is not None and owner is not None
            found[i] = replace(number, variable=owner.variable, order=owner.order, table=owner.table)
    return found


def by_key(found: Sequence[Logical | None]) -> dict[tuple[str, str, str], list[int]]:
    """The positions of each key of a catalogue."""
    positions: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i, known in enumerate(found):
        if known is not None:
            positions[known.key].append(i)
    return dict(positions)


def normal_layer(name: str) -> str:
    """A layer's name as `Logical.layer` spells it.

    Example:
        >>> normal_layer("model.layer1.0.conv1"), normal_layer("layer1-0/conv1")
        ('layer1_0_conv1', 'layer1_0_conv1')
    """
    return _layer([part for group in name.split("/") for part in group.split(".")])


def _of_tensor(tensor: Tensor) -> Logical | None:
    for name in (tensor.name, *tensor.aliases):
        known = _of_name(name)
        if known is not None:
            return known
    return None


def _of_name(name: str) -> Logical | None:
    name = re.sub(r":\d+$", "", name).strip("/")
    slot = _KERAS_SLOT.fullmatch(name)
    if slot is not None:
        owner, kept, parameter = slot.groups()
        # A loss-scaling optimizer keeps a second copy, which loading overwrites.
        known = _KERAS_SLOTS.get(re.sub(r"_\d+$", "", owner.lower()), {}).get(kept)
        of = _of_name(parameter)
        return None if known is None or of is None else replace(of, slot=known)
    torch = _TORCH_SLOT.fullmatch(name)
    if torch is not None:
        parameter, kept = torch.groups()
        of = _of_name(parameter) if kept in _TORCH_SLOTS else None
        return None if of is None else replace(of, slot=kept)
    if re.match(r"optim|.*/optim", name):
        return None
    groups, _, leaf = name.rpartition("/")
    owner, dot, variable = leaf.rpartition(".")
    first = bool(dot) or variable in _ONLY_FIRST
    known_variable = (_FIRST if first else _LAST).get(variable)
    layer = _layer([*groups.split("/"), *owner.split(".")])
    if known_variable is None or not layer:
        return None
    order = OUTPUTS_FIRST if first else OUTPUTS_LAST
    return Logical(layer, known_variable, order=order, table=not first and variable in _TABLES)


def _layer(parts: Sequence[str]) -> str:
    named = [p for p in parts if p]
    while len(named) > 1 and named[0] in _CONTAINERS:
        named = named[1:]
    if len(named) > 1 and _CELL.fullmatch(named[-1]):
        named = named[:-1]
    return "_".join(named).lower().replace("-", "_")


def torch_slot(tensor: Tensor) -> tuple[str, str] | None:
    """The parameter (its number or its name) and what PyTorch keeps for it; None for any other tensor."""
    for name in (tensor.name, *tensor.aliases):
        found = _TORCH_SLOT.fullmatch(name)
        if found is not None and found.group(2) in _TORCH_SLOTS:
            return found.group(1), found.group(2)
    return None


def _paired(
    slots: list[int], parameters: list[int], tensors: Sequence[Tensor], found: Sequence[Logical | None]
) -> list[tuple[int, int]]:
    """Pair an optimizer's memories for one layer with its parameters: by shape, and equal shapes in order."""

    def place(parameter: int) -> int:
        known = found[parameter]
        return 0 if known is None else PARAMETERS.index(known.variable)

    def number(slot: int) -> int:
        known = found[slot]
        return -1 if known is None or known.number is None else known.number

    pairs: list[tuple[int, int]] = []
    for shape in {tensors[s].shape for s in slots}:
        rivals = sorted((s for s in slots if tensors[s].shape == shape), key=number)
        fitting = sorted((p for p in parameters if tensors[p].shape == shape), key=place)
        if len(rivals) == len(fitting):
            pairs += zip(rivals, fitting, strict=True)
    return pairs
