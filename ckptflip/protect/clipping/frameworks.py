"""The framework that a model is of, and the module that clips its layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Protocol

from ckptflip.errors import UsageError
from ckptflip.protect.clipping.bounds import Bound, Bounds
from ckptflip.protect.clipping.part import Clipped
from ckptflip.protect.clipping.spread import Spread


class Adapter(Protocol):
    """What a framework's module offers."""

    def spreads(self, model: Any, batches: Iterable[Any], layers: Any) -> dict[Bound, Spread]:
        """What each layer gives on clean data."""
        ...

    def named(self, model: Any, layers: Any) -> list[Bound]:
        """The layers that fixed bounds hold for, without bounds yet."""
        ...

    def clip(self, model: Any, bounds: Bounds) -> Clipped:
        """Clip the layers that the bounds name."""
        ...


def adapter(model: Any) -> Adapter:
    """The adapter for a model; only a framework that is loaded already is asked.

    Raises:
        UsageError: neither a PyTorch nor a Keras model.
    """
    # A Keras model on the torch backend is a torch module as well.
    if "keras" in sys.modules and isinstance(model, sys.modules["keras"].Model):
        from ckptflip.protect.clipping import keras_clipping

        return keras_clipping
    if "torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module):
        from ckptflip.protect.clipping import torch_clipping

        return torch_clipping
    raise UsageError(f"a model is a torch.nn.Module or a keras.Model, not {type(model).__name__}")
