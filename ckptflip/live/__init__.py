"""Faults in tensors in memory: the policies, records and undo of checkpoints, on a running model.

Frameworks are imported by the modules that name them (`torch_tensors`, `keras_variables`), not by this one.
"""

from ckptflip.live.target import Armed, LiveTarget, inject, replay, undo

__all__ = ["Armed", "LiveTarget", "inject", "replay", "undo"]
