"""numpy's files: arrays, and zips of them."""

from ckptflip.checkpoints.npz.opening import open_checkpoint

__all__ = ["open_checkpoint"]
