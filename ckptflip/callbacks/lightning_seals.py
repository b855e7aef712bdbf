"""Lightning: checkpoints that are sealed as they are saved, and verified before they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptflip.errors import MissingExtraError
from ckptflip.protect.seals import seal, verified
from ckptflip.protect.seals.sidecar import beside

try:
    from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO
except ImportError as error:
    raise MissingExtraError("lightning", "callbacks", "Sealing Lightning's checkpoints") from error


class LightningSealer(CheckpointIO):  # type: ignore[misc]
    """Saves and loads a `Trainer`'s checkpoints, each with its seal.

    As a plugin: ``Trainer(plugins=[LightningSealer()])``.
    A checkpoint without a seal, or a damaged one, is not loaded. Strategies that write checkpoints themselves
    (FSDP, DeepSpeed) do not ask a plugin: seal their folders with `ckptflip.seal`.

    Args:
        repair: the share of a checkpoint's size for an erasure code; None: digests alone.
        verify: whether checkpoints are verified before they are loaded.
        io: what saves and loads; by default as Lightning does without a plugin.

    Raises:
        DamagedCheckpointError, SealError: on loading what is damaged, or has no whole seal.
    """

    def __init__(
        self, *, repair: float | None = None, verify: bool = True, io: CheckpointIO | None = None
    ) -> None:
        super().__init__()
        self._repair, self._verify = repair, verify
        self._io = io or TorchCheckpointIO()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        self._io.save_checkpoint(checkpoint, path, storage_options)
        seal(path, repair=self._repair, overwrite=True)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        if self._verify:
            verified(path)
        loaded: dict[str, Any] = self._io.load_checkpoint(path, *arguments, **options)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        self._io.remove_checkpoint(path)
        beside(Path(path)).unlink(missing_ok=True)

    def teardown(self) -> None:
        self._io.teardown()
