"""What PyTorch's layers give, within bounds: looked at, counted and replaced."""

from __future__ import annotations

from typing import Any

import torch

from ckptflip.live.torch_values import leaves, rebuilt
from ckptflip.protect.clipping.bounds import Bound
from ckptflip.protect.clipping.part import Seen
from ckptflip.protect.native import kernels
from ckptflip.recsys.models.dlrm import Tables

# What the kernel does besides counting.
_COUNT, _REPLACE, _RECTIFY = 0, 1, 2


class Clip:
    """The bounds of one layer and what was found beyond them.

    On a CPU values are only read as long as they lie within the bounds: by the compiled kernel, or by two
    passes of PyTorch. On other devices, and in compiled code, where a look would make everything wait, they
    are replaced without one. Gradients pass where values do.

    Args:
        bound: what is let through.
        replacements: what values become that are too low, too high, and NaN.
        own: whether what the layer gives is its own, and may be altered where it is.
    """

    def __init__(self, bound: Bound, replacements: tuple[float, float, float], own: bool) -> None:
        self.layer, self.own = bound.layer, own
        self.calls = self.fired = self.values = 0
        self._low, self._high = bound.low, bound.high
        self._below, self._above, self._nan = replacements
        self._numbers = (bound.low, bound.high, *replacements)
        self._kernel = getattr(kernels(), "clip", None)
        self._unseen: torch.Tensor | None = None

    def seen(self) -> Seen:
        """How often values were clipped."""
        fired, values = (0, 0) if self._unseen is None else self._unseen.tolist()
        return Seen(self.layer, self.calls, self.fired + fired, self.values + values)

    def clipped(self, output: torch.Tensor) -> torch.Tensor:
        """A layer's output within bounds: the tensor itself, in place if it may be, or another one."""
        replace = self.own and not output.requires_grad
        found = self._by_kernel(output, _REPLACE if replace else _COUNT)
        if found == 0:
            return output
        if found is None:
            return self._by_torch(output)
        if not replace:
            return self._replaced(output)[0]
        self._count(found)
        return output

    def rectified(self, output: torch.Tensor) -> torch.Tensor:
        """The ReLU of `clipped`, in place if it may be."""
        found = None if output.requires_grad else self._by_kernel(output, _RECTIFY)
        if found is None:
            made = self.clipped(output)
            return torch.relu(made) if made.requires_grad or torch.compiler.is_compiling() else made.relu_()
        if found:
            self._count(found)
        return output

    def _by_kernel(self, output: torch.Tensor, task: int) -> int | None:
        """How many values were beyond the bounds; None where the kernel cannot be used."""
        if (
            self._kernel is None
            or torch.compiler.is_compiling()
            or type(output) is not torch.Tensor
            or output.dtype is not torch.float32
            or not output.is_cpu
            or not output.is_contiguous()
        ):
            return None
        found: int = self._kernel(output.data_ptr(), output.numel(), *self._numbers, task)
        return found

    def _by_torch(self, output: torch.Tensor) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        if torch.compiler.is_compiling() or not output.is_cpu:
            made, found = self._replaced(output, count=False)
            self._count_unseen(found)
            return made
        return output if self._is_inside(output) else self._replaced(output)[0]

    def _is_inside(self, output: torch.Tensor) -> bool:
        if not output.numel():
            return True
        values = output.detach()
        # One after the other is faster than aminmax. Of values with a NaN among them both are NaN.
        return bool(self._low <= values.amin().item() and values.amax().item() <= self._high)

    def _replaced(self, output: torch.Tensor, count: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Another tensor, within bounds, and how many values were not.

        Nothing is computed with the values beyond, so that no infinity makes a NaN.
        """
        below, above, odd = output < self._low, output > self._high, output.isnan()
        made = torch.where(below, self._below, torch.where(above, self._above, output))
        made = torch.where(odd, self._nan, made).to(output.dtype)
        found = (below | above | odd).sum()
        if count:
            self._count(int(found))
        return made, found

    def _count(self, found: int) -> None:
        self.fired += 1
        self.values += found

    def _count_unseen(self, found: torch.Tensor) -> None:
        """Count where nobody waits for the number."""
        if self._unseen is None:
            self._unseen = torch.zeros(2, dtype=torch.int64, device=found.device)
        self._unseen += torch.stack([(found > 0).to(found.dtype), found])


class Hook:
    """A forward hook that clips what a layer gives; tensors in tuples, dicts and lists too."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def __call__(self, module: torch.nn.Module, given: Any, output: Any) -> Any:
        """The output within bounds, or None where it is the same object."""
        self.clip.calls += 1
        if isinstance(output, torch.Tensor):
            made = self.clip.clipped(output)
            return None if made is output else made
        changed = {id(tensor): self.clip.clipped(tensor) for _, tensor in leaves(output)}
        return rebuilt(output, changed)


class Rectifier:
    """Takes the place of a ReLU's `forward`: clips what comes from the layer before it, then rectifies it.

    Args:
        clip: the bounds of the layer before the ReLU.
        layer: that layer.
    """

    def __init__(self, clip: Clip, layer: torch.nn.Module) -> None:
        self.clip, self._layer = clip, layer

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """The ReLU of the layer's output within bounds; in place, unless a hook may have kept that."""
        self.clip.calls += 1
        return self.clip.rectified(given.clone() if self._layer._forward_hooks else given)


class Gatherer:
    """Takes the place of the `forward` of `Tables`: clips what each table gives while it is in the cache.

    Args:
        clip: the bounds that hold for all of them.
        tables: the module.
    """

    # Values of all tables together that a cache holds until they are looked at in one go.
    CACHED = 1 << 18

    def __init__(self, clip: Clip, tables: Tables) -> None:
        self.clip, self._tables = clip, tables

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows out of all tables, within bounds: float[n, tables, columns]."""
        clip, fired = self.clip, self.clip.fired
        clip.calls += 1
        rows, found = self._tables.each(ids), []
        for first in rows:
            if first.numel() * len(self._tables) <= self.CACHED:
                return clip.clipped(torch.stack([first, *rows], dim=1))
            found = [clip.clipped(first), *map(clip.clipped, rows)]
        clip.fired = min(clip.fired, fired + 1)
        return torch.stack(found, dim=1)
