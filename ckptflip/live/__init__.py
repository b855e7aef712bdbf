"""Faults in tensors in memory: the policies, records and undo of checkpoints, on a running model.

`faults` puts them in for the length of a ``with`` block; `inject` and `undo` are the single steps. Frameworks
are imported by the modules that name them (`torch_tensors`, `keras_variables`), not by this one.
"""

from ckptflip.live.part import Count, FaultWarning
from ckptflip.live.session import Faults, faults
from ckptflip.live.target import Armed, LiveTarget, inject, replay, undo

__all__ = ["Armed", "Count", "FaultWarning", "Faults", "LiveTarget", "faults", "inject", "replay", "undo"]
