"""What an optimizer's variables are called, and which parameter each belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints.keras.config import UNKNOWN, Layer, inner_optimizer
from ckptflip.checkpoints.keras.order import Shape, parameters_by_shape, parameters_for
from ckptflip.checkpoints.keras.tree import Node
from ckptflip.checkpoints.keras.variables import class_of
from ckptflip.faults.catalogue import Tensor

# One round over all parameters: what is kept for each of them, in turn.
_Round = tuple[str, ...]
_ADAM: tuple[tuple[_Round, ...], ...] = (
    (("momentum", "velocity"),),
    (("momentum", "velocity"), ("velocity_hat",)),
)
_TWO = _ADAM[:1]
_ONE: tuple[tuple[_Round, ...], ...] = ((("momentum",),),)
_RMSPROP: tuple[tuple[_Round, ...], ...] = (
    (("velocity",),),
    (("velocity",), ("momentum",)),
    (("velocity",), ("average_gradient",)),
    (("velocity",), ("momentum",), ("average_gradient",)),
)
# The rounds of each optimizer, in each form that it has, by the name of its class.
_ROUNDS: dict[str, tuple[tuple[_Round, ...], ...]] = {
    **dict.fromkeys(("adam", "adam_w", "adamw"), _ADAM),
    **dict.fromkeys(("nadam", "lamb", "schedule_free_adam_w"), _TWO),
    **dict.fromkeys(("rm_sprop", "rmsprop"), _RMSPROP),
    "sgd": ((), *_ONE),
    "lion": _ONE,
    "adagrad": ((("accumulator",),),),
    "adadelta": ((("accumulated_grad", "accumulated_delta_var"),),),
    "adamax": ((("momentum", "norm"),),),
    "ftrl": ((("accumulator", "linear"),),),
    "adafactor": ((("r", "c", "velocity"),),),
    "muon": ((("momentum", "velocity"),),),
}
# What any optimizer may keep before its own rounds: most have neither.
_BEFORE: tuple[tuple[_Round, ...], ...] = (
    (),
    (("average",),),
    (("gradient_accumulator",),),
    (("average",), ("gradient_accumulator",)),
)
_SCALED = "loss_scale_optimizer"
# An optimizer's own variables: those that count steps, and all of them.
COUNTS = frozenset(("iteration", "iterations", "iter", "step_counter"))
OWN = COUNTS | {"learning_rate", "dynamic_scale", "u_product"}
# Behind the rounds.
_AFTER = {"nadam": ("u_product",)}


class Slot(Struct, frozen=True):
    """One variable of an optimizer.

    Attributes:
        name: what it is: ``momentum``, ``iteration``; None where that cannot be told.
        parameter: the parameter it is kept for, a position in the catalogue; None for the optimizer's own, or
            where that cannot be told.
        inner: the name of the wrapped optimizer of which this is a second copy, or "".
    """

    name: str | None = None
    parameter: int | None = None
    inner: str = ""


class _Kept(Struct, frozen=True):
    """A variable as part of a round: what it is, and the place of its parameter in the optimizer's order."""

    name: str
    place: int


def is_optimizer(node: Node, tensors: Sequence[Tensor]) -> bool:
    """Whether a group of a file keeps an optimizer's variables: they begin with a count of iterations."""
    known = class_of(node.given) in _ROUNDS or class_of(node.given) == _SCALED or node.key == "optimizer"
    if not known or 0 not in node.tensors:
        return False
    first = tensors[node.tensors[0]]
    return not first.shape and not first.number.is_float


def slots_of(node: Node, root: Node, tensors: Sequence[Tensor], config: Layer | None) -> list[Slot]:
    """What each variable of an optimizer is, in the order of their numbers.

    Args:
        node: the optimizer's group.
        root: the model's layers.
        tensors: the catalogue.
        config: of the optimizer, as far as it is known.
    """
    own = [tensors[i] for i in node.positions]
    known = config or UNKNOWN
    klass = known.klass or class_of(node.given)
    if klass != _SCALED:
        return _plain(own, klass, known.options, root, tensors)
    wrapped = inner_optimizer(known) or UNKNOWN
    inner = node.children.get("inner_optimizer")
    name = wrapped.name if inner is None or not inner.given else inner.given
    names = ("iteration", "learning_rate", "step_counter", "dynamic_scale")
    kept = _plain(own[len(names) :], wrapped.klass or class_of(name), wrapped.options, root, tensors)
    copies = [replace(s, inner=name or "inner_optimizer") for s in kept]
    return [*(Slot(n) for n in names[: len(own)]), *copies]


def _plain(
    own: Sequence[Tensor], klass: str, options: Mapping[str, Any], root: Node, tensors: Sequence[Tensor]
) -> list[Slot]:
    """An optimizer that wraps no other: counts and rates, then rounds over the parameters."""
    slots = [Slot()] * len(own)
    if not own or own[0].number.is_float or own[0].shape:
        return slots
    slots[0] = Slot("iteration")
    start = 1
    # Without a rate of its own (it follows a schedule), the state of the first parameter comes second.
    follows = not klass and len(own) > 2 and not own[2].shape
    if len(own) > 1 and own[1].number.is_float and not own[1].shape and not follows:
        slots[1] = Slot("learning_rate")
        start = 2
    behind = _AFTER.get(klass, ())
    stop = len(own) - len(behind) if len(own) - len(behind) >= start else len(own)
    for i in range(stop, len(own)):
        slots[i] = Slot(behind[i - stop])
    slots[start:stop] = _in_rounds([t.shape for t in own[start:stop]], klass, options, root, tensors)
    return slots


def _in_rounds(
    shapes: Sequence[Shape], klass: str, options: Mapping[str, Any], root: Node, tensors: Sequence[Tensor]
) -> list[Slot]:
    # Averages and accumulated gradients are rare, and so are frozen layers: they are thought of where nothing
    # simpler fits.
    for match, befores in product((parameters_for, parameters_by_shape), (_BEFORE[:1], _BEFORE[1:])):
        found: list[list[Slot]] = []
        for before, rounds in product(befores, _ROUNDS.get(klass, ())):
            if not _agrees(before, options, *_OPTIONS_BEFORE):
                continue
            read = _read(klass, (*before, *rounds), shapes)
            if read is None or not _agrees(rounds, options, *_OPTIONS.get(klass, ())):
                continue
            places, kept = read
            parameters = match(root, tensors, places)
            if parameters is not None:
                found.append([Slot(k.name, parameters[k.place]) for k in kept])
        if found:
            return [e[0] if all(s == e[0] for s in e) else Slot() for e in zip(*found, strict=True)]
    return [Slot()] * len(shapes)


_OPTIONS_BEFORE = (("average", "use_ema"), ("gradient_accumulator", "gradient_accumulation_steps"))
_OPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("adam", "adam_w", "adamw"), (("velocity_hat", "amsgrad"),)),
    **dict.fromkeys(("rm_sprop", "rmsprop"), (("momentum", "momentum"), ("average_gradient", "centered"))),
    "sgd": (("momentum", "momentum"),),
}


def _agrees(rounds: Sequence[_Round], options: Mapping[str, Any], *pairs: tuple[str, str]) -> bool:
    """Whether rounds are those of the configured options: (what is kept, the option that asks for it)."""
    present = {name for each in rounds for name in each}
    return all((name in present) == bool(options[option]) for name, option in pairs if option in options)


def _read(
    klass: str, rounds: Sequence[_Round], shapes: Sequence[Shape]
) -> tuple[list[Shape], list[_Kept]] | None:
    """Read variables as rounds over parameters: the parameters' shapes, and what each variable is.

    None: the shapes do not fit.
    """
    if klass == "muon":
        # What comes before is kept for each parameter once.
        ahead, per_parameter = rounds[:-1], list(_muon(shapes))
        return None if ahead else _numbered(per_parameter)
    if klass == "adafactor":
        return None if len(rounds) > 1 else _adafactor(shapes)
    each = sum(len(r) for r in rounds)
    if not each:
        return None if shapes else ([], [])
    if len(shapes) % each:
        return None
    count = len(shapes) // each
    kept: list[_Kept] = []
    found: list[Shape] = []
    at = 0
    for names in rounds:
        here = [shapes[at + i * len(names)] for i in range(count)]
        if found and here != found:
            return None
        found = here
        for place in range(count):
            if any(s != here[place] for s in shapes[at : at + len(names)]):
                return None
            kept += [_Kept(name, place) for name in names]
            at += len(names)
    return found, kept


def _muon(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, int]]:
    """Each parameter's shape and how many variables are kept for it: two unless it is a matrix.

    An embedding is a matrix with two. It is taken for one with one, and the order then does not fit.
    """
    at = 0
    while at < len(shapes):
        two = len(shapes[at]) != 2 and shapes[at + 1 : at + 2] == shapes[at : at + 1]
        yield shapes[at], 2 if two else 1
        at += 2 if two else 1


def _numbered(per_parameter: Sequence[tuple[Shape, int]]) -> tuple[list[Shape], list[_Kept]]:
    names = ("momentum", "velocity")
    kept = [_Kept(names[n], place) for place, (_, count) in enumerate(per_parameter) for n in range(count)]
    return [shape for shape, _ in per_parameter], kept


def _adafactor(shapes: Sequence[Shape]) -> tuple[list[Shape], list[_Kept]] | None:
    """Row and column factors, which are mere placeholders for a vector, then the velocity."""
    if len(shapes) % 3:
        return None
    found = list(shapes[2::3])
    for place, shape in enumerate(found):
        rows, columns = shapes[3 * place : 3 * place + 2]
        factored = (shape[:-1], (*shape[:-2], *shape[-1:])) if len(shape) > 1 else ((), ())
        if (rows, columns) != factored:
            return None
    return found, [_Kept(name, place) for place in range(len(found)) for name in ("r", "c", "velocity")]
