"""The numbers of a quantised linear layer: what it computes, apart from how it is packed and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.processor import SAFE, saturates
from ckptflip.protect.native import kernels

# Float32 holds the steps for each unit, the inverse of a scale, if that is no smaller.
_SMALLEST = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A layer y = relu?(s_x · s_j · Σ_p (x_p - z_x) w_jp + b_j), and y in codes of 8 bits if it has a scale.

    Attributes:
        weight: int8, (n, k).
        weight_scale: float32, (n,) for one per output or (1,) for all.
        bias: float32, (n,), or None.
        x_scale: of the input's codes; None where every call brings its own (dynamic quantisation).
        x_zero: zero point of the input's codes, 0 to 255.
        out_scale: of the results' codes; None for float32 results.
        out_zero: zero point of the results' codes.
        relu: whether negative results become 0.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None = None
    x_scale: float | None = None
    x_zero: int = 0
    out_scale: float | None = None
    out_zero: int = 0
    relu: bool = False

    def __post_init__(self) -> None:
        self._refuse(self.weight.dtype is not torch.int8 or self.weight.dim() != 2, "weight", "int8, (n, k)")
        n, k = self.weight.shape
        self._refuse(min(n, k) < 1, "weight", "of at least one input and output")
        scale, bias = self.weight_scale, self.bias
        fits = scale.dtype is torch.float32 and tuple(scale.shape) in ((n,), (1,))
        self._refuse(not fits, "weight_scale", f"float32, ({n},) or (1,)")
        fits = bias is None or (bias.dtype is torch.float32 and tuple(bias.shape) == (n,))
        self._refuse(not fits, "bias", f"float32, ({n},)")
        for name, numbers in (("weight_scale", self.weight_scale), ("bias", bias)):
            finite = numbers is None or bool(torch.isfinite(numbers).all())
            self._refuse(not finite, name, "finite numbers")
        for name in ("x", "out"):
            scale, zero = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
            fits = scale is None or _SMALLEST <= scale < float("inf")
            self._refuse(not fits, f"{name}_scale", f"positive, finite and at least {_SMALLEST:.2g}")
            self._refuse(not 0 <= zero <= 255, f"{name}_zero", "from 0 to 255")

    @staticmethod
    def _refuse(wrong: bool, name: str, wanted: str) -> None:
        if wrong:
            raise UsageError(f"{name} of a quantised linear layer must be {wanted}")

    @property
    def outputs(self) -> int:
        """n."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """k."""
        return int(self.weight.shape[1])

    def with_weight(self, weight: torch.Tensor) -> Quantised:
        """The same layer with another weight."""
        return replace(self, weight=weight)


def quantise(linear: torch.nn.Linear, *, per_channel: bool = True) -> Quantised:
    """A float layer's weight in symmetric codes: -127 to 127, or -64 to 64 where the processor needs it.

    Args:
        linear: with a weight of finite floats.
        per_channel: one scale for each output, or one for all.

    Raises:
        UsageError: the weight holds NaN, infinity or numbers beyond float32.

    Example:
        >>> layer = quantise(torch.nn.Linear(4, 2))
        >>> layer.weight.dtype, int(layer.weight.abs().max()) in (64, 127)
        (torch.int8, True)
    """
    weight = linear.weight.detach().float()
    if not bool(torch.isfinite(weight).all()):
        raise UsageError(
            "a weight with NaN, infinity or numbers beyond float32 cannot be quantised: ckptflip scan names "
            "the tensors"
        )
    peak = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().max().reshape(1, 1)
    # A scale below the smallest normal number would make codes of a weight of zeros undefined.
    widest = SAFE if saturates() else 127
    scale = (peak / widest).clamp(min=_SMALLEST)
    codes = torch.round(weight / scale).clamp(-widest, widest).to(torch.int8)
    bias = None if linear.bias is None else linear.bias.detach().float().clone()
    return Quantised(codes, scale.reshape(-1), bias)


def codes_of(x: torch.Tensor, scale: float, zero: int, sums: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of 8 bits of floats: round(x / scale + zero), ties to even, from 0 to 255; NaN becomes 0.

    Args:
        x: floats of shape (m, k); what lies beyond the codes, or beyond float32, gets the first or the last.
        scale, zero: of the codes.
        sums: int32 of shape (m,), receives the sum of each row's codes; or None.

    Returns:
        uint8 of shape (m, k).

    Example:
        >>> codes_of(torch.tensor([[-1.0, 0.0, 9.0]]), 0.5, 2).tolist()
        [[0, 2, 20]]
    """
    native = kernels()
    x = x.detach().float().resolve_neg().contiguous()
    if native is None:
        steps = (x * torch.tensor(1 / scale) + zero).nan_to_num(nan=0.0).clamp(0, 255)
        codes = torch.round(steps).to(torch.uint8)
        if sums is not None:
            sums.copy_(codes.sum(1, dtype=torch.int32))
        return codes
    codes = torch.empty(x.shape, dtype=torch.uint8)
    made = 0 if sums is None else sums.data_ptr()
    native.gemm_codes(x.data_ptr(), x.shape[0], x.shape[1], 1 / scale, zero, codes.data_ptr(), made)
    return codes


def range_of(x: torch.Tensor) -> tuple[float, int]:
    """Scale and zero point that cover the range of x, 0 included, as dynamic quantisation chooses them.

    Raises:
        UsageError: x holds NaN or infinity.

    Example:
        >>> range_of(torch.tensor([-1.0, 0.5, 6.96875]))
        (0.03125, 32)
    """
    if x.numel() == 0:
        return 1.0, 0
    low, high = (float(bound) for bound in torch.aminmax(x.detach()))
    return scale_of(low, high)


def scale_of(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point for numbers between two bounds; 0 is always one of the codes."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not high - low < float("inf"):
        raise UsageError("inputs with NaN or infinity cannot be quantised")
    scale = max((high - low) / 255, _SMALLEST)
    return scale, max(0, min(255, round(-low / scale)))
