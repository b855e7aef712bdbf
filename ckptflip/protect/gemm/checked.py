"""A checked product: runs it, checks it, and does what was asked for where rows do not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.detection import Detections, policy
from ckptflip.protect.gemm.packing import Packed, pack, product
from ckptflip.protect.gemm.passes import check_and_write
from ckptflip.protect.gemm.quantised import Quantised
from ckptflip.protect.gemm.recovery import Call, settle_rows

_CODES, _FLOAT, _EMPTY = torch.uint8, torch.float32, torch.empty
ON_ERROR = ("raise", "count", "recompute", "correct")


class Checked:
    """A quantised product with its check; what every protected layer runs.

    Attributes:
        packed: the layer, packed; replaced when a damaged weight was packed anew.
        on_error: `raise`, `count`, `recompute` or `correct`.
        name: of the layer, for messages.
        seen: counts of what was found.
        verdict: of the last call: None if all rows held, else a code of `passes` for each row.
        between: is given the accumulators before they are checked, to put faults into them; None for nothing.
        inputs, outputs, dtype: k, n, and the dtype of the results.
        in_place: whether results take the memory of the accumulators.
    """

    __slots__ = (
        *(
            "between",
            "dtype",
            "in_place",
            "inputs",
            "name",
            "on_error",
            "outputs",
            "packed",
            "seen",
            "verdict",
        ),
    )

    def __init__(self, packed: Packed, *, on_error: str = "raise", name: str = "product") -> None:
        self.packed = packed
        self.on_error = policy(on_error, ON_ERROR)
        self.name = name
        self.seen = Detections()
        self.verdict: bytes | None = None
        self.between: Callable[[torch.Tensor], None] | None = None
        # Correction needs the accumulators of the sound rows as well.
        narrow = packed.layer.out_scale is not None
        self.in_place = packed.width == packed.layer.outputs and not narrow and on_error != "correct"
        self.inputs, self.outputs = packed.layer.inputs, packed.layer.outputs
        self.dtype = torch.uint8 if narrow else torch.float32

    def __reduce__(self) -> tuple[Any, ...]:
        """A packed weight cannot be copied or saved: copies pack their own."""
        packed = self.packed
        return _made, (packed.layer, packed.scheme, packed.placement, self.on_error, self.name)

    def run(
        self,
        x: torch.Tensor,
        x_scale: float = 0.0,
        x_zero: int = 0,
        given: torch.Tensor | None = None,
        made: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's results for a batch of codes.

        Args:
            x: uint8, (m, k).
            x_scale, x_zero: of these codes, where the layer has none.
            given: int32, (m,): the sums of the rows of codes as they were made, to be checked; or None.
            made: int32, (m,): receives the sums of the results' codes; or None.

        Returns:
            float32 or uint8, (m, n).

        Raises:
            DetectedError: as `on_error` says.
            UsageError: x has another dtype or shape.
        """
        # The commonest calls take few steps: small products take no longer than a dozen.
        shape, k = x.shape, self.inputs
        if len(shape) != 2 or shape[1] != k or x.dtype is not _CODES or not x.is_contiguous():
            x = self._fitting(x)
        packed, n, count = self.packed, self.outputs, shape[0]
        rows = product(packed, x)
        if self.between is not None:
            self.between(rows)
        if self.in_place:
            out = rows
        else:
            out = _EMPTY(count, n) if self.dtype is _FLOAT else _EMPTY(count, n, dtype=self.dtype)
        if packed.compiled is not None and given is None and made is None:
            at = rows.data_ptr()
            to = at if out is rows else out.data_ptr()
            found = packed.compiled(
                packed.plan, at, packed.width, count, x.data_ptr(), k, to, n, 0, 0, x_scale, x_zero
            )
        else:
            found = check_and_write(packed, rows, x, out, x_scale, x_zero, given, made)
        self.seen.calls += 1
        self.verdict = found
        if found is not None:
            settle_rows(self, Call(x, rows, out, x_scale, x_zero, given, made), found)
        return out

    def _fitting(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not torch.uint8 or x.dim() != 2 or x.shape[1] != self.inputs:
            raise UsageError(
                f"layer {self.name} takes codes of 8 bits (uint8) of shape (m, {self.inputs}), not {x.dtype} "
                f"of {tuple(x.shape)}"
            )
        return x.contiguous()


def _made(layer: Quantised, scheme: str, placement: str, on_error: str, name: str) -> Checked:
    return Checked(pack(layer, scheme=scheme, placement=placement), on_error=on_error, name=name)
