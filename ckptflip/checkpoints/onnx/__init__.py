"""ONNX models: tensors inside the file, and beside it."""

from ckptflip.checkpoints.onnx.opening import open_checkpoint

__all__ = ["open_checkpoint"]
