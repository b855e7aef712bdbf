"""What PyTorch's layers give, within bounds: looked at, counted and replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

from ckptflip.live.torch_values import leaves, rebuilt
from ckptflip.protect.clipping.bounds import Bound
from ckptflip.protect.clipping.part import Seen
from ckptflip.protect.native import kernels
from ckptflip.recsys.models.crossing import VectorCross
from ckptflip.recsys.models.fields import Scaled

# What the kernel does besides counting.
_COUNT, _REPLACE, _RECTIFY = 0, 1, 2
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Values that a cache holds.
_CACHED = 1 << 18


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
        self._kernel: Any = getattr(kernels(), "clip", None)
        self._stack, self._scale, self._cross = (
            getattr(kernels(), name, None) for name in ("clip_stack", "clip_scale", "clip_cross")
        )
        self._unseen: torch.Tensor | None = None

    def seen(self) -> Seen:
        """How often values were clipped."""
        fired, values = (0, 0) if self._unseen is None else self._unseen.tolist()
        return Seen(self.layer, self.calls, self.fired + fired, self.values + values)

    def within(self, output: Any) -> Any:
        """What one call of the layer gave, within bounds; tensors in tuples, dicts and lists too."""
        self.calls += 1
        if isinstance(output, torch.Tensor):
            return self.clipped(output)
        return rebuilt(output, {id(tensor): self.clipped(tensor) for _, tensor in leaves(output)})

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
            return torch.relu(made) if made.requires_grad or is_compiling() else made.relu_()
        if found:
            self._count(found)
        return output

    def stacked(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """What several tables give, a float[n, columns] each, side by side: float[n, parts, columns]."""
        first, size = parts[0], parts[0].numel()
        # As many values as a cache holds are faster stacked by PyTorch, and looked at then.
        if size * len(parts) > _CACHED and self._may_make(first) and first.dim() == 2:
            addresses = tuple(
                [
                    part.data_ptr()
                    for part in parts
                    if part.dtype is torch.float32
                    and part.is_contiguous()
                    and part.is_cpu
                    and part.numel() == size
                    and type(part) is torch.Tensor
                ]
            )
            if len(addresses) == len(parts):
                made = first.new_empty((len(first), len(parts), first.shape[1]))
                return self._made(self._stack, made, (addresses, *first.shape))
        return self.clipped(torch.stack(parts, dim=1))

    def scaled(self, layer: Scaled, dense: torch.Tensor) -> torch.Tensor:
        """What vectors of dense features give: float[n, features, columns]."""
        weight = layer.weight
        if dense.dim() == 2 and dense.shape[1] == len(weight) and self._may_make(dense, weight):
            made = dense.new_empty((len(dense), *weight.shape))
            addresses = (dense.data_ptr(), weight.data_ptr(), len(dense))
            return self._made(self._scale, made, (*addresses, *weight.shape))
        return self.clipped(Scaled.forward(layer, dense))

    def crossed(self, layer: VectorCross, start: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
        """What a cross layer gives: float[n, width]."""
        if start.shape == crossed.shape and start.shape[1:] == layer.bias.shape:
            factors = crossed @ layer.weight
            if self._may_make(start, factors, layer.bias, crossed):
                addresses = [part.data_ptr() for part in (start, factors, layer.bias, crossed)]
                return self._made(self._cross, torch.empty_like(start), (*addresses, *start.shape))
        return self.clipped(VectorCross.forward(layer, start, crossed))

    def _may_make(self, *parts: torch.Tensor) -> bool:
        """Whether a kernel may compute with tensors, which leaves no trace for gradients."""
        return not torch.is_grad_enabled() and all(map(self._fits, parts))

    def _made(self, kernel: Any, made: torch.Tensor, given: tuple[Any, ...]) -> torch.Tensor:
        """A tensor that a kernel writes, within bounds."""
        found = kernel(*given, made.data_ptr(), *self._numbers)
        if found:
            self._count(found)
        return made

    def _by_kernel(self, output: torch.Tensor, task: int) -> int | None:
        """How many values were beyond the bounds; None where the kernel cannot be used."""
        if not self._fits(output):
            return None
        found: int = self._kernel(output.data_ptr(), output.numel(), *self._numbers, task)
        return found

    def _fits(self, tensor: torch.Tensor) -> bool:
        """Whether the kernels can be used."""
        return (
            self._kernel is not None
            and not is_compiling()
            and type(tensor) in _PLAIN
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
        )

    def _by_torch(self, output: torch.Tensor) -> torch.Tensor:
        if not output.is_floating_point():
            return output
        if is_compiling() or not output.is_cpu:
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
