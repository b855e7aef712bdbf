"""Selective bit protection: parity, SECDED and triplication over chosen bits of tensors in memory.

`guard` keeps checks beside a model's tensors, or arrays; `Guard.scrub` finds flips and puts them right in
place. `ideal` emulates protection that nothing passes. Words are never read as numbers.
"""

from ckptflip.protect.bits.codes import CODES
from ckptflip.protect.bits.guard import Cost, Guard, guard
from ckptflip.protect.bits.ideal import ideal, unprotected
from ckptflip.protect.bits.report import Flip, Lost, Scrub

__all__ = ["CODES", "Cost", "Flip", "Guard", "Lost", "Scrub", "guard", "ideal", "unprotected"]
