"""Checks of float products by a row checksum: each row of x Wᵀ + b against x times the row sums of W.

Since Σ_j (x Wᵀ + b)_ij = x_i · s + Σ b with s = Σ_j W_j, a row whose two sides differ by more than rounding
can explain holds a fault. Offline, from the weight: s and S = Σ_j |W_j|. At run time two inner products of
length k and one sum of length n for each row, in float64. The threshold is derived (`arithmetic`):

    |Σ_j out_ij - (x_i · s + Σ b)| ≤ g (|x_i| · S + Σ|b|) + h Σ_j |out_ij| + η

g: rounding of the product, and of the check itself in float64; h: results narrowed to their dtype, and their
sum; η: underflow, and denormal numbers that the processor takes for 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.arithmetic import UNIT, Arithmetic, arithmetic_of, gamma, product_error
from ckptflip.protect.native import kernels

# The double precision evaluation of the bound itself, far below its own size.
_SLACK = 1 + 2.0**-30
# What the compiled pass sums in float32 stays within its allowance up to here.
_LONGEST = 1 << 20
_NATIVE = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True, eq=False)
class RowChecksum:
    """What is computed offline from a weight and a bias.

    Attributes:
        sums: s, the sum over outputs, float64 of shape (k,).
        sizes: S, the sum of absolute values, float64 of shape (k,), rounded up.
        single_sizes: S in float32, rounded up, for the compiled pass.
        bias_sum, bias_size: Σ b and Σ |b|.
        outputs: n.
        relative, result, absolute: g, h and η of the bound.
        peak, bias_peak: the largest Σ_p |W_jp| and |b_j| of one output: where results may overflow.
        limit: the largest number of the results' dtype.
    """

    sums: torch.Tensor
    sizes: torch.Tensor
    single_sizes: torch.Tensor
    bias_sum: float
    bias_size: float
    outputs: int
    relative: float
    result: float
    absolute: float
    peak: float
    bias_peak: float
    limit: float


@dataclass(frozen=True, slots=True, eq=False)
class RowVerdict:
    """What a check found, each of shape (rows,).

    Attributes:
        faulty: rows whose sum rounding cannot explain.
        unchecked: rows that no check can judge: NaN or infinity in their input, or results that may overflow.
        residual: how far the sum lies from its checksum, float64.
        bound: how far rounding may carry it, float64.
    """

    faulty: torch.Tensor
    unchecked: torch.Tensor
    residual: torch.Tensor
    bound: torch.Tensor

    @property
    def ok(self) -> bool:
        """Whether every row was checked and found sound."""
        return not bool((self.faulty | self.unchecked).any())


def row_checksum(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    arithmetic: Arithmetic | None = None,
    likely: float | None = None,
) -> RowChecksum:
    """Sums and bounds of a weight: offline, once, while the weight is known to be sound.

    Args:
        weight: (n, k), float16, bfloat16, float32 or float64: that of `torch.nn.functional.linear`.
        bias: (n,) or None.
        arithmetic: how the product rounds; by default what PyTorch promises as it is set now.
        likely: λ of the probabilistic bound; None, the default, for the one that never fails.

    Raises:
        UsageError: the weight is no matrix of finite floats, or so long that no bound holds.

    Example:
        >>> weight, x = torch.randn(64, 32), torch.randn(8, 32)
        >>> checksum, out = row_checksum(weight), x @ weight.T
        >>> rows_hold(out, x, checksum)
        True
        >>> out[3, 5] += 0.01
        >>> check_rows(out, x, checksum).faulty.nonzero().tolist()
        [[3]]
    """
    promised = arithmetic or arithmetic_of(weight.dtype)
    if weight.dim() != 2 or not bool(torch.isfinite(weight).all()):
        raise UsageError("a row checksum is made of a matrix (n, k) of finite floats")
    n, k = weight.shape
    wide = weight.detach().double()
    added = torch.zeros(0, dtype=torch.float64) if bias is None else bias.detach().double()
    double = UNIT[torch.float64]
    bounds = _Bounds.of(weight.dtype, n, k, float(wide.abs().sum()), promised, likely)
    sizes = wide.abs().sum(0) * (1 + 2 * gamma(n + 1, double)) + n * bounds.tiny / bounds.product
    return RowChecksum(
        sums=wide.sum(0),
        sizes=sizes,
        single_sizes=(sizes * (1 + 2.0**-22)).float(),
        bias_sum=float(added.sum()),
        bias_size=float(added.abs().sum()) * (1 + 2 * gamma(n + 1, double)),
        outputs=n,
        relative=bounds.relative,
        result=bounds.result,
        absolute=bounds.absolute,
        peak=float(wide.abs().sum(1).max()) if n and k else 0.0,
        bias_peak=float(added.abs().max()) if added.numel() else 0.0,
        limit=float(torch.finfo(weight.dtype).max),
    )


@dataclass(frozen=True, slots=True)
class _Bounds:
    """g, h and η of the bound; g without the narrowing of results; the number below which all underflows."""

    relative: float
    result: float
    absolute: float
    product: float
    tiny: float

    @classmethod
    def of(
        cls, dtype: torch.dtype, n: int, k: int, extent: float, promised: Arithmetic, likely: float | None
    ) -> _Bounds:
        double = UNIT[torch.float64]
        product = product_error(k + 1, promised, likely) + 4 * gamma(n + k + 8, double)
        narrowed = promised.roundings * promised.output / (1 - promised.output) if _narrows(promised) else 0.0
        tiny = max(torch.finfo(dtype).smallest_normal, 2.0**-1022)
        tiny = min(tiny, 2.0**-24) if dtype is torch.float16 else tiny
        relative = (product + narrowed) * _SLACK
        result = (narrowed + gamma(n + 8, double)) * _SLACK
        return cls(relative, result, 2 * tiny * (extent + n * (k + 2)), product, tiny)


def narrowed_checksum(checksum: RowChecksum, dtype: torch.dtype) -> RowChecksum:
    """The checksum for products that narrow weight, bias and inputs to another dtype first, as autocast does.

    It is derived from the sums, not from the weight, which may be damaged by now. Rounding the weight, the
    bias and the inputs adds its own relative error (`Arithmetic.inputs`). Where the narrowed weight may
    overflow, no result that is infinite can be judged.

    Args:
        checksum: of the weight and bias as they are.
        dtype: of the product's results: float16 or bfloat16.

    Example:
        >>> weight, x = torch.randn(64, 32), torch.randn(8, 32)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     out = x @ weight.T
        >>> check_rows(out, x, narrowed_checksum(row_checksum(weight), out.dtype)).ok
        True
    """
    n, k, limit = checksum.outputs, len(checksum.sums), float(torch.finfo(dtype).max)
    promised = replace(arithmetic_of(dtype), inputs=UNIT[dtype])
    bounds = _Bounds.of(dtype, n, k, float(checksum.sizes.sum()), promised, None)
    return replace(
        checksum,
        sizes=checksum.sizes + n * bounds.tiny / bounds.product,
        relative=bounds.relative,
        result=bounds.result,
        absolute=bounds.absolute + 2 * n * bounds.tiny,
        limit=limit if max(checksum.peak, checksum.bias_peak) < limit else 0.0,
    )


def _narrows(promised: Arithmetic) -> bool:
    return promised.output > promised.accumulator


def check_rows(out: torch.Tensor, x: torch.Tensor, checksum: RowChecksum) -> RowVerdict:
    """Check every row of a product in plain PyTorch, on any device, and say by how much it is off.

    Args:
        out: (rows, n), what ``linear(x, weight, bias)`` gave, before any activation.
        x: (rows, k), its input.
        checksum: of the weight and bias, on the same device.

    Raises:
        UsageError: shapes that do not belong together.

    Example:
        >>> weight, x = torch.eye(2), torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
        >>> verdict = check_rows(x @ weight, x, row_checksum(weight))
        >>> verdict.faulty.tolist(), verdict.unchecked.tolist()
        ([False, False], [False, True])
    """
    _matching(out, x, checksum)
    wide, made = x.detach().double(), out.detach().double()
    size = wide.abs() @ checksum.sizes + checksum.bias_size
    total = made.sum(1)
    residual = total - (wide @ checksum.sums + checksum.bias_sum)
    bound = checksum.relative * size + checksum.result * made.abs().sum(1) + checksum.absolute
    suspect = ~(residual.abs() <= bound)
    largest = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    overflows = (largest * checksum.peak + checksum.bias_peak) * (1 + 2 * checksum.relative) >= checksum.limit
    unchecked = ~torch.isfinite(size) | (~torch.isfinite(total) & overflows)
    # A result may be infinite by a fault alone; the bound would then be infinite too.
    faulty = (suspect | ~torch.isfinite(total)) & ~unchecked
    return RowVerdict(faulty, unchecked, residual, bound)


def rows_hold(out: torch.Tensor, x: torch.Tensor, checksum: RowChecksum) -> bool:
    """Whether every row holds: the fast check for each call, in one compiled pass where that can be.

    The compiled pass needs float32 or bfloat16 in rows on the CPU; all else is left to `check_rows`. Where
    rows do not hold, `check_rows` says which, and whether they are faulty or could not be checked.

    Args, Raises:
        As for `check_rows`.

    Example:
        >>> x = torch.ones(1, 4)
        >>> rows_hold(x @ torch.eye(4), x, row_checksum(torch.eye(4)))
        True
    """
    native = kernels()
    if native is None or out.dtype not in _NATIVE or not _in_rows(out, x):
        return check_rows(out, x, checksum).ok
    _matching(out, x, checksum)
    return not native.gemm_float_rows(
        _NATIVE[out.dtype],
        out.data_ptr(),
        out.stride(0),
        len(out),
        checksum.outputs,
        x.data_ptr(),
        x.stride(0),
        x.shape[1],
        checksum.sums.data_ptr(),
        checksum.single_sizes.data_ptr(),
        checksum.bias_sum,
        checksum.bias_size,
        checksum.relative,
        checksum.result,
        checksum.absolute,
    )


def _in_rows(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the compiled pass can read both: rows of one dtype as they are, not too long, on the CPU."""
    return (
        out.dtype is x.dtype
        and max(out.shape[-1], x.shape[-1]) <= _LONGEST
        and out.device.type == x.device.type == "cpu"
        and out.dim() == x.dim() == 2
        and (out.stride(1) == 1 or out.shape[1] == 1)
        and (x.stride(1) == 1 or x.shape[1] == 1)
        and not (out.is_neg() or x.is_neg())
    )


def _matching(out: torch.Tensor, x: torch.Tensor, checksum: RowChecksum) -> None:
    wanted = (len(x), checksum.outputs)
    if x.dim() != 2 or tuple(out.shape) != wanted or x.shape[1] != len(checksum.sums):
        raise UsageError(
            f"a product of {tuple(out.shape)} from an input of {tuple(x.shape)} does not belong to a "
            f"checksum of {len(checksum.sums)} inputs and {checksum.outputs} outputs"
        )


def detectable(x: torch.Tensor, checksum: RowChecksum, out: torch.Tensor | None = None) -> torch.Tensor:
    """The smallest change of one result that is found for certain, for each row: twice the bound.

    Args:
        x: (rows, k).
        checksum: of the weight.
        out: the product, where results are narrowed (float16, bfloat16) and count in the bound.

    Example:
        >>> weight = torch.randn(64, 512)
        >>> bool((detectable(torch.rand(4, 512), row_checksum(weight)) < 1.5).all())
        True
    """
    size = x.detach().double().abs() @ checksum.sizes + checksum.bias_size
    made = size if out is None else out.detach().double().abs().sum(1)
    return 2 * (checksum.relative * size + checksum.result * made + checksum.absolute)
