"""How a matrix product may round: the bound from which the thresholds of float checks are derived.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. (2002), lemma 3.1 and section
3.5: an inner product of length k, evaluated in any order, errs by at most γ_k Σ|a||b| with
γ_k = k·u / (1 - k·u). N. J. Higham and T. Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM
J. Sci. Comput. 41 (2019): with independent rounding errors of mean zero, at most γ̃_k(λ) Σ|a||b| with γ̃_k(λ) =
exp(λ√k·u + k·u²/(1 - u)) - 1, with a probability of at least 1 - 2k·exp(-λ²(1 - u)²/2) for each of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ckptflip.errors import UsageError

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_TF32 = 2.0**-11


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a product's operator promises about its rounding.

    Attributes:
        accumulator: unit round-off of its sums.
        output: that of the dtype of its results; results narrower than the sums are rounded to it.
        roundings: how often a result is rounded to its dtype: for the product, again for the bias.
        inputs: unit round-off of inputs that the operator narrows first (TF32, bfloat16), or 0.
    """

    accumulator: float
    output: float
    roundings: int = 2
    inputs: float = 0.0


def arithmetic_of(dtype: torch.dtype) -> Arithmetic:
    """What `torch.nn.functional.linear` promises, as PyTorch is set now: 16-bit floats are summed in float32.

    Args:
        dtype: of inputs, weights and results.

    Raises:
        UsageError: the dtype is no float with 16 bits or more.

    Example:
        >>> arithmetic_of(torch.bfloat16).accumulator == 2.0**-24
        True
    """
    if dtype not in UNIT:
        raise UsageError(f"no bound is known for products of {dtype}; there is one for {_names()}")
    narrowed = 0.0
    if dtype is torch.float32:
        # "high" lets the operator round inputs to TF32, "medium" to bfloat16.
        narrowed = {"high": _TF32, "medium": UNIT[torch.bfloat16]}.get(
            torch.get_float32_matmul_precision(), 0.0
        )
    return Arithmetic(min(UNIT[dtype], UNIT[torch.float32]), UNIT[dtype], inputs=narrowed)


def _names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in UNIT)


def gamma(length: int, unit: float) -> float:
    """γ_k, the relative error of `length` roundings in any order (Higham 2002, lemma 3.1).

    Raises:
        UsageError: so many roundings have no bound (k·u ≥ 1).

    Example:
        >>> gamma(3, 2.0**-2)
        3.0
    """
    if length * unit >= 1:
        raise UsageError(f"no bound holds for sums of {length:,} terms with a unit round-off of {unit:.1e}")
    return length * unit / (1 - length * unit)


def likely_gamma(length: int, unit: float, lam: float) -> float:
    """γ̃_k(λ) of Higham and Mary (2019), theorem 2.4: smaller than γ_k for long sums, and not certain.

    Example:
        >>> likely_gamma(4096, 2.0**-24, 6) < gamma(4096, 2.0**-24) / 10
        True
    """
    return math.expm1(lam * math.sqrt(length) * unit + length * unit**2 / (1 - unit))


def product_error(length: int, arithmetic: Arithmetic, lam: float | None = None) -> float:
    """The error of an inner product before its result is narrowed, relative to the sum of absolute products.

    Args:
        length: terms, the bias among them.
        arithmetic: what the operator promises.
        lam: λ of the probabilistic bound; None for the certain one.

    Example:
        >>> product_error(512, arithmetic_of(torch.float32)) < 3.1e-5
        True
    """
    unit = arithmetic.accumulator
    sums = gamma(length, unit) if lam is None else min(likely_gamma(length, unit, lam), gamma(length, unit))
    return (1 + arithmetic.inputs) ** 2 * (1 + sums) - 1
