"""zarr folders, versions 2 and 3: a hierarchy of groups and arrays, each array in chunks.

`metadata` reads what an array's JSON says, `folder` finds arrays and their chunk files, `shards` reads the
indexes of shards, `chunks` says where words lie, `codecs` and `coded` do compressed chunks, `target` puts it
together.
"""

from ckptflip.checkpoints.zarr.target import open_checkpoint, recognises

__all__ = ["open_checkpoint", "recognises"]
