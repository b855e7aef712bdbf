"""The pass over a product: every row is checked on its integers, then scaled, shifted and narrowed.

Compiled, it is one call that goes over each row while it is in the nearest cache. In plain PyTorch it is some
fifteen operators on the whole matrix, several of them in float64.
"""

from __future__ import annotations

import torch

from ckptflip.protect.gemm.packing import Packed
from ckptflip.protect.gemm.sums import EXACT, MODULUS

# Verdicts on a row: it holds; its sum is off; float32 rounds in it; its input is not what was made.
HOLDS, FAULTY, WIDE, INPUT = range(4)


def check_and_write(
    packed: Packed,
    rows: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    x_scale: float = 0.0,
    x_zero: int = 0,
    given: torch.Tensor | None = None,
    made: torch.Tensor | None = None,
) -> bytes | None:
    """Check accumulators and write the results of the rows that hold.

    Args:
        packed: the layer.
        rows: accumulators, float32 of shape (m, width); may be the memory of `out`.
        x: codes, uint8 of shape (m, k), in rows.
        out: results, float32 or uint8 of shape (m, n), in rows.
        x_scale, x_zero: of this call's codes, where the layer has none.
        given: int32 of shape (m,), the sums of the codes as they were made; checked if there are any.
        made: int32 of shape (m,), receives the sums of the results' codes.

    Returns:
        None if all rows hold, or a verdict for each: HOLDS, FAULTY, WIDE or INPUT. Rows that do not hold
        are not written.
    """
    if packed.compiled is None:
        return _plainly(packed, rows, x, out, x_scale, x_zero, given, made)
    found: bytes | None = packed.compiled(
        packed.plan,
        rows.data_ptr(),
        rows.stride(0),
        len(rows),
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        out.stride(0),
        0 if given is None else given.data_ptr(),
        0 if made is None else made.data_ptr(),
        x_scale,
        x_zero,
    )
    return found


def _plainly(
    packed: Packed,
    rows: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    x_scale: float,
    x_zero: int,
    given: torch.Tensor | None,
    made: torch.Tensor | None,
) -> bytes | None:
    """The same in operators of PyTorch."""
    verdicts = judged(packed, rows, x, given)
    holds = verdicts == HOLDS
    if bool(holds.all()):
        out.copy_(results(packed, rows, x_scale, x_zero))
        summed = out
    else:
        summed = results(packed, rows[holds], x_scale, x_zero)
        out[holds] = summed
    if made is not None:
        made[holds] = summed.sum(1, dtype=torch.int32)
    return None if bool(holds.all()) else bytes(verdicts.tolist())


def residuals(packed: Packed, rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the sum of each row exceeds its checksum by: float64 of shape (m,), exact for exact rows."""
    wide = rows.double()
    total = wide[:, : packed.layer.outputs].sum(1)
    if packed.columns is None:
        off = total - x.double() @ packed.sums.double()
    else:
        powers = 256.0 ** torch.arange(len(packed.columns), dtype=torch.float64)
        off = total - wide[:, packed.layer.outputs : packed.used] @ powers
    return torch.remainder(off, MODULUS) if packed.scheme == "mod127" else off


def judged(
    packed: Packed, rows: torch.Tensor, x: torch.Tensor, given: torch.Tensor | None = None
) -> torch.Tensor:
    """A verdict for each row: uint8 of shape (m,)."""
    verdicts = torch.where(residuals(packed, rows, x) == 0, HOLDS, FAULTY).to(torch.uint8)
    verdicts[~(rows[:, : packed.used].abs().amax(1) < EXACT)] = WIDE
    if given is not None:
        verdicts[(verdicts == HOLDS) & (x.sum(1, dtype=torch.int32) != given)] = INPUT
    return verdicts


def results(packed: Packed, rows: torch.Tensor, x_scale: float = 0.0, x_zero: int = 0) -> torch.Tensor:
    """What the layer makes of accumulators, whether they hold or not: float32 or uint8 of shape (m, n).

    Args:
        packed: the layer.
        rows: float32, or int32 where they are known exactly, of shape (m, width).
        x_scale, x_zero: of this call's codes, where the layer has none.
    """
    layer, zeros, scale = packed.layer, packed.zeros, packed.layer.x_scale or x_scale
    if layer.x_scale is None and zeros is not None:
        zeros = zeros * x_zero
    whole = _whole(rows[:, : layer.outputs])
    if zeros is not None:
        whole = whole - zeros
    # In the order of oneDNN's operations, so that results have the same bits.
    made = whole.float() * torch.tensor(scale) * packed.scales + packed.shifts
    if layer.out_scale is None:
        # A zero is positive then, as oneDNN's.
        return made.clamp(min=0) + 0.0 if layer.relu else made
    steps = made * torch.tensor(1 / layer.out_scale) + layer.out_zero
    return torch.round(steps).clamp(layer.out_zero if layer.relu else 0, 255).to(torch.uint8)


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """Accumulators as int32; what is none becomes the smallest, as in the compiled pass."""
    if not rows.is_floating_point():
        return rows
    fits = (rows > -(2.0**31)) & (rows < 2.0**31)
    return torch.where(fits, rows, -(2.0**31)).to(torch.int32)
