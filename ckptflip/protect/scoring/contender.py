"""What scoring asks of a protection: to prepare on the clean model, and to face a faulty one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from msgspec import Struct

# The model's outputs on the whole test set, as it is now.
Run = Callable[[], torch.Tensor]


class Verdict(Struct, frozen=True, kw_only=True):
    """What a contender made of a model.

    Attributes:
        found: whether it noticed a fault; None where it does not look for any.
        outputs: the model's outputs under it; None where it alters nothing.
        counts: further numbers to record, by name.
    """

    found: bool | None = None
    outputs: torch.Tensor | None = None
    counts: dict[str, float] = {}


class Contender(Protocol):
    """A protection that is scored.

    Attributes:
        name: what its metrics are called after; letters, digits and ``-``.
        about: what it is, in a line.
    """

    name: str
    about: str

    def prepare(self, model: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]) -> Any:
        """What it keeps of the clean model and of clean data; None where the model has nothing for it."""

    def face(self, model: torch.nn.Module, prepared: Any, run: Run) -> Verdict:
        """Judge the model, and run it where that needs or changes outputs. It may alter its weights."""
