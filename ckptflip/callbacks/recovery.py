"""The state that `DivergenceGuard` looks over, keeps and takes up again, for PyTorch and for Keras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptflip.errors import UsageError


class TorchState:
    """A PyTorch model and its optimizers, kept as `ckptflip.torch_h5` keeps states.

    Args:
        model: the model.
        optimizers: those that train it; their state is kept and restored with the weights.
    """

    suffix = ".h5"

    def __init__(self, model: Any, optimizers: Sequence[Any] = ()) -> None:
        self._model, self._optimizers = model, list(optimizers)

    def nev(self, extreme: float) -> Mapping[str, int]:
        """How many weights are ``nan``, ``inf`` or ``extreme``."""
        from ckptflip.training.measures import count_nev

        return count_nev(self._model, extreme)

    def save(self, path: Path) -> None:
        """Write weights, buffers and optimizer state."""
        from ckptflip import torch_h5

        optimizers = [each.state_dict() for each in self._optimizers]
        torch_h5.save({"model": self._model.state_dict(), "optimizers": optimizers}, path)

    def load(self, path: Path) -> None:
        """Take them up again, into the same tensors."""
        from ckptflip import torch_h5

        state = torch_h5.load(path)
        self._model.load_state_dict(state["model"])
        for optimizer, kept in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)


class KerasState:
    """A Keras model and its optimizer, kept in Keras' own ``.weights.h5``.

    Args:
        model: a built and compiled model.
    """

    suffix = ".weights.h5"

    def __init__(self, model: Any) -> None:
        if not model.built:
            raise UsageError(
                f"the model {model.name!r} is not built yet: call model.build(shape), or it on one batch"
            )
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._model = model

    def nev(self, extreme: float) -> Mapping[str, int]:
        """How many weights are ``nan``, ``inf`` or ``extreme``."""
        import numpy as np

        from ckptflip.bits import classify
        from ckptflip.live.keras_variables import KerasTarget

        self._synced()
        target = KerasTarget(self._model, optimizer=False)
        counts = {"nan": 0, "inf": 0, "extreme": 0}
        for i, tensor in enumerate(target.tensors):
            found = classify(target.read(i, np.arange(tensor.words)), tensor.number, extreme)
            for kind, mask in zip(counts, found, strict=True):
                counts[kind] += int(mask.sum())
        return counts

    def save(self, path: Path) -> None:
        """Write weights and optimizer state."""
        self._synced()
        self._model.save_weights(path)

    def load(self, path: Path) -> None:
        """Take them up again; the running means of the metrics, which a bad loss spoilt, start anew."""
        self._synced()
        self._model.load_weights(path)
        self._model.reset_metrics()

    def _synced(self) -> None:
        # Between two batches of ``fit``, JAX has the model's variables elsewhere.
        if hasattr(self._model, "jax_state_sync"):
            self._model.jax_state_sync()
