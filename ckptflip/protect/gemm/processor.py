"""Whether this processor multiplies 8-bit numbers exactly.

Without VNNI, oneDNN adds two products of 8 bits in 16: 255 · 127 · 2 does not fit and is cut off, silently.
Weights from -64 to 64 always fit.
"""

from __future__ import annotations

from functools import cache

import torch

SAFE = 64


@cache
def saturates() -> bool:
    """Whether products of large codes and weights come out wrong here, as one small product shows.

    Example:
        >>> saturates() in {False, True}
        True
    """
    codes = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), [1, 64])
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    made = torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, 0, weight, one, none, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return float(made[0, 0]) != 255 * 127 * 64
