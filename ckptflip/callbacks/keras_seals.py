"""Keras: checkpoints that are sealed as `ModelCheckpoint` saves them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ckptflip.errors import MissingExtraError
from ckptflip.protect.seals import seal
from ckptflip.protect.seals.stream import State, state_of

try:
    import keras
except ImportError as error:
    raise MissingExtraError("keras", "keras", "Sealing Keras' checkpoints") from error

_FIELD = re.compile(r"\{[^}]*\}")


class KerasSealer(keras.callbacks.Callback):  # type: ignore[misc]
    """Seals each checkpoint that a `ModelCheckpoint` saves; list it behind that callback.

    Before you load one: ``keras.saving.load_model(verified("runs/epoch_05.keras"))``.

    Args:
        checkpoint: the callback that saves.
        repair: the share of a checkpoint's size for an erasure code; None: digests alone.
    """

    def __init__(self, checkpoint: keras.callbacks.ModelCheckpoint, *, repair: float | None = None) -> None:
        super().__init__()
        self._repair = repair
        self._saves_batches = checkpoint.save_freq != "epoch"
        path = Path(checkpoint.filepath)
        self._folder = path.parent
        # Names by the template: each field stands for anything.
        parts = [re.escape(p) for p in _FIELD.split(path.name)]
        self._name = re.compile(".*".join(parts))
        self._known: dict[Path, State | None] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        self._known = dict(self._there())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._saves_batches:
            self._seal()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._seal()

    def _seal(self) -> None:
        """Seal what is new, or was written since."""
        for path, state in self._there():
            if self._known.get(path) != state:
                seal(path, repair=self._repair, overwrite=True)
                self._known[path] = state

    def _there(self) -> list[tuple[Path, State | None]]:
        if not self._folder.is_dir():
            return []
        return [(p, state_of(p)) for p in sorted(self._folder.iterdir()) if self._name.fullmatch(p.name)]
