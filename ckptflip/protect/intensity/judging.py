"""What is wrong with a result that a quick check suspects, in double precision: by row, or as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptflip.protect.gemm.floats import RowVerdict, check_rows, narrowed_checksum
from ckptflip.protect.intensity.weights import Weights

# Sums of the rows' residuals and bounds in double precision.
_SLACK = 1 + 2.0**-30
_NAMED = 4


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a scheme says in the end.

    Attributes:
        faulty: a fault was found.
        unchecked: it could not be judged, as a whole or in part.
        found: what was found, for a message; empty where nothing was.
    """

    faulty: bool
    unchecked: bool = False
    found: str = ""


SOUND = Judgement(False)


def rows(weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
    """Judge each row.

    Args:
        weights: prepared.
        x: (m, k).
        out: (m, n).
    """
    verdict = _verdict(weights, x, out)
    unchecked = bool(verdict.unchecked.any())
    wrong = verdict.faulty.nonzero().flatten().tolist()
    if not wrong:
        return Judgement(False, unchecked)
    named = ", ".join(str(row) for row in wrong[:_NAMED]) + (", …" if len(wrong) > _NAMED else "")
    found = f"{len(wrong)} of {len(out)} rows are off ({named}); {_by(verdict, wrong[0])}"
    return Judgement(True, unchecked, found)


def whole(weights: Weights, x: torch.Tensor, out: torch.Tensor) -> Judgement:
    """Judge the sum of all results.

    Args:
        weights: prepared.
        x: (m, k).
        out: (m, n).
    """
    verdict = _verdict(weights, x, out)
    judged = ~verdict.unchecked
    residual = float(verdict.residual[judged].sum().abs())
    bound = float(verdict.bound[judged].sum()) * _SLACK
    unchecked = not bool(judged.all())
    # A result may be infinite by a fault alone; bound and residual are then infinite, or no numbers.
    if residual <= bound and bound < float("inf"):
        return Judgement(False, unchecked)
    found = f"the sum of all results is off by {residual:.3g}, rounding explains {bound:.3g}"
    return Judgement(True, unchecked, found)


def _verdict(weights: Weights, x: torch.Tensor, out: torch.Tensor) -> RowVerdict:
    if out.dtype is weights.weight.dtype:
        return check_rows(out, x, weights.checksum)
    # Under autocast. What overflows in its dtype is infinite for the product, too.
    return check_rows(out, x.to(out.dtype), narrowed_checksum(weights.checksum, out.dtype))


def _by(verdict: RowVerdict, row: int) -> str:
    residual, bound = float(verdict.residual[row].abs()), float(verdict.bound[row])
    return f"row {row} by {residual:.3g}, rounding explains {bound:.3g}"
