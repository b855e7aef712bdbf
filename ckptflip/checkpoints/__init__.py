"""Where tensors lie on disk: one module or package per format, behind one protocol."""

from ckptflip.checkpoints.registry import opened
from ckptflip.checkpoints.target import Changes, Checkpoint, Skipped

__all__ = ["Changes", "Checkpoint", "Skipped", "opened"]
