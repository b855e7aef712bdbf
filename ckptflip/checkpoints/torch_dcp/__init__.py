"""PyTorch's distributed checkpoints: an index, and torch zips of chunks."""

from ckptflip.checkpoints.torch_dcp.opening import open_checkpoint

__all__ = ["open_checkpoint"]
