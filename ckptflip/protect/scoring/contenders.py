"""The protections that are scored."""

from __future__ import annotations

from ckptflip.protect.scoring.contender import Contender
from ckptflip.protect.scoring.detectors import Digest, Extreme, Nan, Range, RowAbft
from ckptflip.protect.scoring.survival import Clipping

CONTENDERS: tuple[Contender, ...] = (
    Nan(),
    Extreme(),
    Range(),
    Digest(),
    RowAbft(),
    Clipping(
        "clip-100", "the published clipping: ±100 on every linear layer but the last, NaN to 0", "fixed:100"
    ),
    Clipping("clip-range", "clipping to what each layer gave on clean data", "range"),
)
