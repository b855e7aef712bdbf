"""Orbax checkpoints: folders of zarr arrays, in files of their own or in an OCDBT database.

`items` finds what a folder holds, `tree` reads the names of a tree's leaves, `ocdbt` finds values in the
database with TensorStore, after `nodes` has seen what decoding costs, `target` puts it together.
"""

from ckptflip.checkpoints.orbax.target import open_checkpoint, recognises

__all__ = ["open_checkpoint", "recognises"]
