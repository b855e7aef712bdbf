"""Calls that `torch.compile` leaves out of its graphs. Imported while it traces: it imports the compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def called(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What a function gives, computed as it is written: for code that reads addresses.

    Example:
        >>> float(called(torch.relu, torch.tensor(-1.0)))
        0.0
    """
    return function(x)
