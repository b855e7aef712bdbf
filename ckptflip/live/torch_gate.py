"""Standing before the calls of a PyTorch module, at next to no cost where a call is let through."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch.compiler import is_compiling

# PyTorch calls this attribute of a module, where it is set, in the module's place, and leaves it out of
# copies and files. A hook sends every call a longer way: that alone costs a small model a tenth of its time.
_PLACE = "_compiled_call_impl"

Through = Callable[..., Any]
Reach = Callable[[Through, tuple[Any, ...], dict[str, Any]], Any]


class Gate:
    """Counts the calls of a module, and hands over those that are awaited.

    Args:
        module: that is called.
        reach: called in place of the module, with the module's call, its arguments and keyword arguments.

    Attributes:
        calls: of the module so far.
        wait: calls are let through until there were so many.

    Example:
        >>> def louder(call, args, kwargs):
        ...     return call(*args, **kwargs) + 1
        >>> model = torch.nn.Identity()
        >>> gate = Gate(model, louder)
        >>> gate.wait = 1
        >>> gate.open()
        >>> [model(torch.zeros(1)).item() for _ in range(3)], gate.calls
        ([0.0, 1.0, 1.0], 3)
        >>> gate.close()
        >>> model(torch.zeros(1)).item(), gate.calls
        (0.0, 3)
    """

    __slots__ = ("_module", "_reach", "_through", "calls", "is_open", "wait")

    def __init__(self, module: torch.nn.Module, reach: Reach) -> None:
        self._module, self._reach = module, reach
        self._through: Through = module._call_impl
        self.calls, self.is_open = 0, False
        self.wait: float = inf

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return self._through(*args, **kwargs)
        self.calls = call = self.calls + 1
        if call > self.wait:
            if self.is_open:
                return self._reach(self._through, args, kwargs)
            self.calls -= 1
        return self._through(*args, **kwargs)

    def open(self) -> None:
        """Stand before the module from now on."""
        held = self._module.__dict__
        self._through = held.get(_PLACE) or self._module._call_impl
        held[_PLACE] = self
        self.is_open = True

    def close(self) -> None:
        """Let everything through, and go; behind a gate that was opened later, when that one goes."""
        self.wait, self.is_open = -1, False
        held = self._module.__dict__
        while isinstance(gate := held.get(_PLACE), Gate) and not gate.is_open:
            if gate._through == self._module._call_impl:
                del held[_PLACE]
            else:
                held[_PLACE] = gate._through

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the module has no gate, also where a class of its own copies every attribute."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was compiled in place (``module.compile()``)."""
    held = getattr(module, _PLACE, None)
    while isinstance(held, Gate):
        held = held._through
    return held is not None and held != module._call_impl
