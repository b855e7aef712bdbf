"""What takes the place of a module's `forward`, or comes behind it, and keeps what it gives within bounds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from ckptflip.protect.clipping.torch_values import Clip


class Hook:
    """A forward hook that clips what a module gives, for modules that have other hooks before it.

    Args:
        clip: its bounds.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def __call__(self, module: torch.nn.Module, given: Any, output: Any) -> Any:
        """The output within bounds."""
        return self.clip.within(output)


class Forward:
    """A module's `forward`, clipped: PyTorch calls it in half the time of a hook.

    Args:
        clip: its bounds.
        module: whose class has the `forward`.
    """

    def __init__(self, clip: Clip, module: torch.nn.Module) -> None:
        self.clip, self._module, self._forward = clip, module, type(module).forward
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What the module gives, within bounds."""
        return self.clip.within(self._forward(self._module, *given, **named))


class Rectifier:
    """Takes the place of a ReLU's `forward`: clips what comes from the layer before it, then rectifies it.

    Args:
        clip: the bounds of the layer before the ReLU.
        layer: that layer.

    Attributes:
        spare: a tensor that nobody else has, and that may be altered where it is; or None.
    """

    def __init__(self, clip: Clip, layer: torch.nn.Module) -> None:
        self.clip, self.layer = clip, layer
        self.spare: torch.Tensor | None = None

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """The ReLU of the layer's output within bounds; in place if it is to spare."""
        self.clip.calls += 1
        if given is self.spare:
            self.spare = None
            return self.clip.rectified(given)
        return self.clip.rectified(given.clone())


class Chain:
    """Takes the place of a `Sequential`'s `forward`: tells a `Rectifier` that its layer's output is to spare.

    Called by itself, or in a slice of the `Sequential`, a ReLU is given what its caller may need.

    Args:
        chain: the module.
    """

    def __init__(self, chain: torch.nn.Sequential) -> None:
        self._chain = chain

    def __call__(self, input: Any) -> Any:
        """What the modules give, one after the other."""
        if is_compiling():
            for module in self._chain:
                input = module(input)
            return input
        before = None
        for module in self._chain._modules.values():
            after = module.__dict__.get("forward")
            if (
                type(after) is Rectifier
                and after.layer is before
                and not (before._forward_hooks or module._forward_pre_hooks)
            ):
                after.spare = input
            input = module(input)
            before = module
        return input


class Making:
    """Takes the place of a module's `forward`: what it gives is clipped while it is made.

    Args:
        clip: its bounds.
        module: the module.
        make: the method of `Clip` that computes what the module does.
    """

    def __init__(self, clip: Clip, module: torch.nn.Module, make: Callable[..., torch.Tensor]) -> None:
        self.clip, self._module, self._make = clip, module, make

    def __call__(self, *given: torch.Tensor) -> torch.Tensor:
        """What the module gives, within bounds."""
        self.clip.calls += 1
        return self._make(self.clip, self._module, *given)
