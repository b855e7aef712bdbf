"""Which layers of a model a checked one can stand for, and why others are left as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Modules that read their layers' weights without calling them.
_READERS = ("MultiheadAttention", "TransformerEncoderLayer")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Left:
    """A layer that was left as it was, and why."""

    name: str
    was: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.was}): {self.reason}"


def listed(left: Iterable[Left]) -> str:
    """The first few of them in a message.

    Example:
        >>> listed([Left("fc", "Linear", "it has hooks")])
        'fc (Linear): it has hooks'
    """
    found = [str(each) for each in left]
    return "; ".join(found[:5]) + f"; and {len(found) - 5} more" * (len(found) > 5)


def read_elsewhere(model: torch.nn.Module) -> set[int]:
    """The ids of modules whose weights a module around them may read without calling them.

    PyTorch's attention and transformer layers do so, and what inherits from them.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(4, 2, 8)
        >>> id(layer.linear1) in read_elsewhere(layer), id(layer) in read_elsewhere(layer)
        (True, False)
    """
    return {
        id(part)
        for module in model.modules()
        if any(base.__name__ in _READERS for base in type(module).__mro__)
        for part in module.modules()
        if part is not module
    }


def more_than(module: torch.nn.Module, kind: type[torch.nn.Module], read: set[int]) -> str:
    """What would be lost or passed by if a checked layer stood for this one; empty if nothing.

    Args:
        module: the layer.
        kind: what the checked one does the work of.
        read: `read_elsewhere` of the model.

    Example:
        >>> more_than(torch.nn.Linear(2, 2), torch.nn.Linear, set())
        ''
    """
    if id(module) in read:
        return "the module around it reads its weight without calling it"
    if isinstance(module, kind) and type(module) is not kind:
        return f"a subclass of {kind.__name__} may do more"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which would be lost"
    if "forward" in vars(module):
        return "its forward was replaced"
    return ""
