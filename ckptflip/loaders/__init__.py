"""Does the real loader notice? Each framework's own loader opens a flipped file; what it says is the answer.

A probe is one loader of one format: it writes a small checkpoint with the real library and reads it again.
The contract tests of the formats (`ckptflip.testing`) use the same probes.
"""

from ckptflip.loaders.asking import Verdict, ask
from ckptflip.loaders.probes import PROBES, Probe

__all__ = ["PROBES", "Probe", "Verdict", "ask"]
