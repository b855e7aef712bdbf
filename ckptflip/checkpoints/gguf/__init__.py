"""GGUF files: plain tensors, and the fields of quantised blocks."""

from ckptflip.checkpoints.gguf.opening import open_checkpoint

__all__ = ["open_checkpoint"]
