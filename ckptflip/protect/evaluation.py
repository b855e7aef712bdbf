"""PyTorch models called on clean data, and left as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the length of a block, and each module's own mode again.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Dropout())
        >>> with evaluating(model):
        ...     model.training, model[0].training, torch.is_grad_enabled()
        (False, False, False)
        >>> model[0].training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def called(model: torch.nn.Module, batch: Any) -> Any:
    """What a model gives for a batch: one argument, a tuple or list of them, or a mapping by name.

    Example:
        >>> called(torch.nn.ReLU(), {"input": torch.tensor([-1.0])})
        tensor([0.])
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)
