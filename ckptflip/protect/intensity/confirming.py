"""The choice once more in the whole model, where layers push each other's weights from the caches.

What is cheapest for a layer alone may not be so among others. A scheme that is cheaper in all of them than
the choice is taken instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ckptflip.protect.intensity.calibration import timed
from ckptflip.protect.intensity.layer import CheckedLinear

# By how much: less than this differs from one measurement of the same model to the next.
_CLEARLY = 0.03
Build = Callable[[dict[str, str]], torch.nn.Module]


def better(
    build: Build,
    chosen: dict[str, str],
    schemes: tuple[str, ...],
    arguments: tuple[Any, ...],
    device: torch.device,
) -> str | None:
    """A scheme that is cheaper in all layers than what was chosen for each; None if there is none.

    Args:
        build: makes the model with a scheme for each layer.
        chosen: scheme by layer.
        schemes: that every layer can be checked by.
        arguments: of the model, a batch.
        device: where it runs.
    """
    models = {"": build(chosen)}
    for scheme in schemes:
        if any(scheme != other for other in chosen.values()):
            models[scheme] = build(dict.fromkeys(chosen, scheme))
    if len(models) == 1:
        return None
    with torch.no_grad():
        taken = timed({name: _call(model, arguments) for name, model in models.items()}, device)
    best = min(taken, key=taken.__getitem__)
    return best if best and taken[best] < (1 - _CLEARLY) * taken[""] else None


def _call(model: torch.nn.Module, arguments: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: model(*arguments)


def batch_of(arguments: tuple[Any, ...], given: int, size: int) -> tuple[Any, ...]:
    """The example with another batch size: its rows, over and over.

    Args:
        arguments: of the model.
        given: their batch size.
        size: the wanted one.

    Example:
        >>> batch_of((torch.tensor([1, 2]), 7), 2, 5)
        (tensor([1, 2, 1, 2, 1]), 7)
    """
    if size == given:
        return arguments
    rows = torch.arange(size) % given

    def taken(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor) and argument.dim() and len(argument) == given:
            return argument[rows.to(argument.device)]
        return argument

    return tuple(map(taken, arguments))


def builder(model: torch.nn.Module, replaced: Callable[..., torch.nn.Module]) -> Build:
    """Makes copies of a model that share its weights, with checked layers.

    Args:
        model: with plain layers.
        replaced: puts a module in the place of another.
    """

    def build(schemes: dict[str, str]) -> torch.nn.Module:
        # Weights are shared: every copy would push the others' from the caches.
        kept = {id(value): value for value in (*model.parameters(), *model.buffers())}
        made = copy.deepcopy(model, kept).eval()
        for name, scheme in schemes.items():
            layer = made.get_submodule(name)
            made = replaced(made, layer, CheckedLinear(layer, scheme))
        return made

    return build
