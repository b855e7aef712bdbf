"""Ids that a fault has put beyond an embedding table: refused with a message, or clamped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckptflip.errors import LiveError


def tables(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that look up rows by ids: `Embedding`, `EmbeddingBag` and what is built alike."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "num_embeddings", None), int):
            yield name, module


class Ids:
    """Checks the ids that a table is asked for.

    PyTorch raises an IndexError without names on a CPU; on a GPU it ends the process' use of the device.

    Args:
        name: of the table.
        clamp: ask for the nearest row there is, instead of refusing.

    Attributes:
        clamped: ids that were clamped.
    """

    def __init__(self, name: str, clamp: bool) -> None:
        self.name, self._clamp = name, clamp
        self.clamped = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook."""
        ids = args[0] if args else kwargs.get("input")
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or not ids.numel():
            return None
        low, high = (int(end) for end in torch.aminmax(ids))
        if low >= 0 and high < module.num_embeddings:
            new = ids
        elif not self._clamp:
            raise LiveError(
                f"{self.name or 'the table'} has {module.num_embeddings} rows, and after the faults it is "
                f"asked for row {low if low < 0 else high}. Pass beyond='clamp' to ask for the nearest row"
            )
        else:
            new = ids.clamp(0, module.num_embeddings - 1)
            self.clamped += int((new != ids).sum())
        rest = {**kwargs}
        offsets = args[1] if len(args) > 1 else kwargs.get("offsets")
        if isinstance(module, torch.nn.EmbeddingBag) and isinstance(offsets, torch.Tensor) and ids.dim() == 1:
            made = self._ascending(offsets, ids.numel())
            args = (args[0], made, *args[2:]) if len(args) > 1 else args
            rest |= {"offsets": made} if "offsets" in kwargs else {}
        return ((new, *args[1:]), rest) if args else ((), {**rest, "input": new})

    def _ascending(self, offsets: torch.Tensor, ids: int) -> torch.Tensor:
        """Offsets of bags, if they are those of `ids` ids; the kernels read beyond them otherwise."""
        steps = torch.diff(offsets, append=offsets.new_tensor([ids]))
        if not offsets.numel() or (int(offsets[0]) == 0 and bool((steps >= 0).all())):
            return offsets
        if not self._clamp:
            raise LiveError(
                f"{self.name or 'the table'}: after the faults its offsets are not those of {ids} ids, "
                "ascending from 0. Leave the offsets out of inputs=, or pass beyond='clamp'"
            )
        new = torch.cummax(offsets.clamp(0, ids), 0).values
        new = torch.cat([new.new_zeros(1), new[1:]])
        self.clamped += int((new != offsets).sum())
        return new
