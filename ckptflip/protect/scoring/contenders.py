"""The protections that are scored."""

from __future__ import annotations

from ckptflip.protect.scoring.contender import Contender
from ckptflip.protect.scoring.detectors import Digest, Extreme, Nan, Range, RowAbft
from ckptflip.protect.scoring.survival import Bits, Clipping

CONTENDERS: tuple[Contender, ...] = (
    Nan(),
    Extreme(),
    Range(),
    Digest(),
    RowAbft(),
    Clipping(
        "clip-100", "the published clipping: ±100 on every linear layer but the last, NaN to 0", "fixed:100"
    ),
    Clipping(
        "clip-range",
        "clipping to what each layer gave on clean data; what lies beyond becomes 0",
        "range",
    ),
    Bits("parity", "parity over sign and exponent of all weights", "sign,exponent", "parity"),
    Bits("secded", "SECDED over sign and exponent of all weights", "sign,exponent", "secded"),
    Bits("secded-critical", "SECDED over the critical bit of all weights", "critical", "secded"),
    Bits(
        "tmr",
        "triplication of sign and exponent; as checks are never hit here, the published ideal protection",
        "sign,exponent",
        "tmr",
    ),
)
