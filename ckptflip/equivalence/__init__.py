"""The same fault in two frameworks: from a tensor, an element and a bit of one to those of the other."""

from __future__ import annotations

from ckptflip.equivalence.mapping import Became, Equivalent, equivalent
from ckptflip.equivalence.rules import AUTO, Rules, load

__all__ = ["AUTO", "Became", "Equivalent", "Rules", "equivalent", "load"]
