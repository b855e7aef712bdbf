"""What takes the place of a module's `forward`, or comes behind it, and keeps what it gives within bounds."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.compiler import is_compiling

from ckptflip.protect.clipping.torch_values import Clip
from ckptflip.recsys.models.crossing import VectorCross
from ckptflip.recsys.models.dlrm import Tables
from ckptflip.recsys.models.fields import Scaled


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


class Gatherer:
    """Takes the place of the `forward` of `Tables`: clips rows while they are put side by side.

    Args:
        clip: the bounds that hold for all tables.
        tables: the module.
    """

    def __init__(self, clip: Clip, tables: Tables) -> None:
        self.clip, self._tables = clip, tables

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows out of all tables, within bounds: float[n, tables, columns]."""
        self.clip.calls += 1
        return self.clip.stacked(list(self._tables.each(ids)))


class Scaler:
    """Takes the place of the `forward` of `Scaled`: clips products as they are made.

    Args:
        clip: its bounds.
        layer: the module.
    """

    def __init__(self, clip: Clip, layer: Scaled) -> None:
        self.clip, self._layer = clip, layer

    def __call__(self, dense: torch.Tensor) -> torch.Tensor:
        """The layer's float[n, features, columns], within bounds."""
        self.clip.calls += 1
        return self.clip.scaled(self._layer, dense)


class Crosser:
    """Takes the place of the `forward` of `VectorCross`: clips the sum of three terms as it is made.

    Args:
        clip: its bounds.
        layer: the module.
    """

    def __init__(self, clip: Clip, layer: VectorCross) -> None:
        self.clip, self._layer = clip, layer

    def __call__(self, start: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
        """The layer's float[n, width], within bounds."""
        self.clip.calls += 1
        return self.clip.crossed(self._layer, start, crossed)
