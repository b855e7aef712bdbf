"""Quantised linear layers that check themselves: of codes, of floats, and of PyTorch's quantised tensors.

All are `torch.nn.Module`s for inference on the CPU. What they save is the layer's numbers with their
checksums, which are verified when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ckptflip.errors import DetectedError, UsageError
from ckptflip.protect.detection import Detections
from ckptflip.protect.gemm.checked import Checked
from ckptflip.protect.gemm.packing import Packed, largest_scale, pack
from ckptflip.protect.gemm.quantised import Quantised, codes_of, range_of
from ckptflip.protect.gemm.reading import NotTakenError
from ckptflip.protect.gemm.saved import read_numbers, saved_numbers

_DIGEST = "_ckptflip_row_sums"


def _version(x: torch.Tensor) -> int:
    """How often a tensor was changed in place; in inference mode nobody counts."""
    return -1 if x.is_inference() else x._version


def _crc(packed: Packed) -> int:
    return int(saved_numbers(packed.layer, packed.sums)["crc32"])


def _largest_scale(packed: Packed) -> float:
    """The largest scale that the input's codes may have; raises NotTakenError where the layer's is larger."""
    largest, scale = largest_scale(packed), packed.layer.x_scale
    if scale is not None and scale > largest:
        raise NotTakenError(
            f"codes of its input are {scale:.2g} apart, and results of such numbers may leave float32: at "
            f"most {largest:.2g} can be taken"
        )
    return largest


class _Protected(torch.nn.Module):  # type: ignore[misc]
    """What the layers share: the checked product, saving and loading, and staying where they are."""

    checked: Checked
    # Of the float layer that it stands for: what `unprotect` makes of it.
    dtype = torch.float32

    def __init__(
        self,
        layer: Quantised,
        *,
        scheme: str = "exact",
        placement: str | None = None,
        on_error: str = "raise",
        name: str = "linear",
    ) -> None:
        self._refuse_numbers(layer)
        super().__init__()
        packed = pack(layer, scheme=scheme, placement=placement)
        self._largest_scale = _largest_scale(packed)
        self.checked = Checked(packed, on_error=on_error, name=name)
        self.in_features, self.out_features = layer.inputs, layer.outputs
        self._crc = _crc(packed)
        self.eval()

    @staticmethod
    def _refuse_numbers(layer: Quantised) -> None:
        """Raise UsageError where this kind of layer needs a scale that is missing, or has no use for one."""
        raise NotImplementedError

    def verify(self) -> None:
        """Check the numbers in memory that no checksum of the product covers: scales, biases, codes, sums.

        The product's check covers the packed weight and is not repeated here. Call it between batches, as
        often as such faults are to be found.

        Raises:
            DetectedError: a number has changed since the layer was made or loaded.
        """
        packed = self.checked.packed
        # Damaged numbers might not be packed.
        if _crc(packed) == self._crc:
            fresh = pack(packed.layer, scheme=packed.scheme, placement=packed.placement)
            pairs = zip(packed.constants, fresh.constants, strict=True)
            if all(a is b or torch.equal(a, b) for a, b in pairs):
                return
        raise DetectedError(
            f"layer {self.checked.name}: its numbers in memory changed since it was made: load them again"
        )

    @property
    def detections(self) -> Detections:
        """Counts of what was checked and found."""
        return self.checked.seen

    @property
    def verdict(self) -> bytes | None:
        """Of the last call: None if all rows held, else 0 for each row that did, and a code for others."""
        return self.checked.verdict

    def _refuse_other(self, x: torch.Tensor) -> None:
        raise UsageError(
            f"layer {self.checked.name} takes floats or codes of shape (…, {self.in_features}), not "
            f"{x.dtype} of {tuple(x.shape)}"
        )

    def _refuse_scale(self, scale: float) -> None:
        raise UsageError(
            f"layer {self.checked.name}: codes of the input are {scale:.2g} apart, and results of such "
            f"numbers may leave float32: at most {self._largest_scale:.2g} is taken here. Scale it down"
        )

    def _outside(self, x: torch.Tensor) -> torch.Tensor:
        """The same results while `torch.compile` traces: left out of its graph."""
        from ckptflip.protect.gemm.uncompiled import called

        return called(self.forward, x)

    def extra_repr(self) -> str:
        """What is computed and how it is checked, for ``print(model)``."""
        packed = self.checked.packed
        return (
            f"{self.in_features}, {self.out_features}, scheme={packed.scheme!r}, "
            f"placement={packed.placement!r}, on_error={self.checked.on_error!r}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Protected:
        """Its numbers keep their types; moving it to another device is refused."""
        moved = fn(torch.empty(0, dtype=self.dtype))
        if moved.device.type != "cpu":
            raise UsageError("a checked int8 layer stays on the CPU: unprotect the model before you move it")
        self.dtype = moved.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        packed = self.checked.packed
        for name, tensor in saved_numbers(packed.layer, packed.sums).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the numbers, verify them by their checksums and pack them.

        Raises:
            DetectedError: they do not match their checksums.
        """
        old = self.checked.packed
        wanted = saved_numbers(old.layer, old.sums)
        absent = [prefix + name for name in wanted if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        found = {name: state_dict[prefix + name] for name in wanted}
        wrong = [prefix + name for name, value in found.items() if not isinstance(value, torch.Tensor)]
        if wrong:
            error_msgs.append(f"{', '.join(wrong)}: tensors are due")
            return
        layer = read_numbers(found, where=prefix.rstrip(".") or "layer")
        if (layer.outputs, layer.inputs) != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}weight has another shape: {tuple(layer.weight.shape)}")
            return
        try:
            self._refuse_numbers(layer)
            packed = pack(layer, scheme=old.scheme, placement=old.placement)
            self._largest_scale = _largest_scale(packed)
        except UsageError as error:
            error_msgs.append(f"{prefix}settings are of another kind of layer, or unfit: {error}")
            return
        self.checked = Checked(packed, on_error=self.checked.on_error, name=self.checked.name)
        self._crc = _crc(packed)


class QuantisedLinear(_Protected):
    """A quantised linear layer on codes of 8 bits, by oneDNN's prepacked product, with a check of every row.

    Results have the same bits as those of ``torch.ops.onednn.qlinear_pointwise``.

    Args:
        layer: its numbers; with scales of the input.
        scheme: `exact`, or `mod127`, that of arXiv 2103.00130.
        placement: of the checksum: `beside` the packed weight (None) or in `columns` of it, as published.
        on_error: `raise`, `count`, `recompute` or `correct`.
        name: for messages.
        digests: whether codes that come from another such layer are checked against the sums it made of them;
            that finds what changed between the two. Sums travel with the tensor itself, not with views of it.

    Raises:
        UsageError: the numbers make no layer, or there is no such scheme or policy.

    Example:
        >>> layer = QuantisedLinear(Quantised(torch.eye(3, dtype=torch.int8), torch.ones(1), x_scale=0.5))
        >>> layer(torch.tensor([[1, 2, 3]], dtype=torch.uint8)), layer.detections.calls
        (tensor([[0.5000, 1.0000, 1.5000]]), 1)
    """

    def __init__(
        self,
        layer: Quantised,
        *,
        scheme: str = "exact",
        placement: str | None = None,
        on_error: str = "raise",
        name: str = "linear",
        digests: bool = False,
    ) -> None:
        super().__init__(layer, scheme=scheme, placement=placement, on_error=on_error, name=name)
        self.digests = digests

    @staticmethod
    def _refuse_numbers(layer: Quantised) -> None:
        if layer.x_scale is None:
            raise UsageError("a layer on codes needs the scale of its input's codes, x_scale")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Results, float32 or uint8 of shape (…, n), of codes, uint8 of shape (…, k)."""
        if torch.compiler.is_dynamo_compiling():
            return self._outside(x)
        if x.dim() == 2 and not self.digests:
            return self.checked.run(x)
        if x.shape[-1:] != (self.in_features,):
            self._refuse_other(x)
        if self.digests:
            return self._with_digests(x)
        return self.checked.run(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def _with_digests(self, x: torch.Tensor) -> torch.Tensor:
        sums, version = getattr(x, _DIGEST, (None, 0))
        given = sums if version == _version(x) else None
        rows = x.numel() // self.in_features
        narrow = self.checked.packed.layer.out_scale is not None
        made = torch.empty(rows, dtype=torch.int32) if narrow else None
        out = self.checked.run(x.reshape(-1, self.in_features), given=given, made=made)
        out = out.reshape(*x.shape[:-1], self.out_features)
        if made is not None:
            setattr(out, _DIGEST, (made, _version(out)))
        return out


class ProtectedLinear(_Protected):
    """A linear layer on floats that computes in checked int8: in place of `torch.nn.Linear`.

    The input is quantised by a range that was seen in calibration, or by its own in every call. What it does
    before the product, and the scaling after it, is outside the check: see docs/abft.md.

    Args:
        layer: its numbers; without a scale of the input, every call finds its own.
        scheme, placement, on_error, name: as of `QuantisedLinear`.

    Example:
        >>> from ckptflip.protect.gemm.quantised import quantise
        >>> plain = torch.nn.Linear(64, 10)
        >>> layer, x = ProtectedLinear(quantise(plain)), torch.rand(5, 64)
        >>> bool((layer(x) - plain(x)).abs().max() < 0.05)
        True
    """

    @staticmethod
    def _refuse_numbers(layer: Quantised) -> None:
        if layer.out_scale is not None:
            raise UsageError("a layer on floats gives floats: leave out_scale out")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Results of shape (…, n) of floats of shape (…, k), in their dtype; computed in int8 and float32.

        Raises:
            UsageError: without a range from calibration: NaN, infinities, or numbers so large that results
                might leave float32.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._outside(input)
        if input.shape[-1:] != (self.in_features,) or not input.is_floating_point():
            self._refuse_other(input)
        layer = self.checked.packed.layer
        flat = input.reshape(-1, self.in_features)
        if layer.x_scale is None:
            scale, zero = range_of(flat)
            if scale > self._largest_scale:
                self._refuse_scale(scale)
            out = self.checked.run(codes_of(flat, scale, zero), scale, zero)
        else:
            out = self.checked.run(codes_of(flat, layer.x_scale, layer.x_zero))
        return out.reshape(*input.shape[:-1], self.out_features).to(input.dtype)


class ProtectedQuantized(_Protected):
    """The same on PyTorch's quantised tensors: in place of `torch.ao.nn.quantized.Linear`.

    Args:
        layer: its numbers, with a scale of the results; the input brings its own.
        scheme, placement, on_error, name: as of `QuantisedLinear`.
    """

    @staticmethod
    def _refuse_numbers(layer: Quantised) -> None:
        if layer.out_scale is None or layer.x_scale is not None:
            raise UsageError(
                "a layer on quantised tensors has a scale of its results, and its input brings one"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Results as quint8 of shape (…, n) of quint8 of shape (…, k)."""
        if torch.compiler.is_dynamo_compiling():
            return self._outside(x)
        if x.shape[-1:] != (self.in_features,) or x.dtype is not torch.quint8:
            self._refuse_other(x)
        layer = self.checked.packed.layer
        if x.q_scale() > self._largest_scale:
            self._refuse_scale(x.q_scale())
        codes = x.int_repr().reshape(-1, self.in_features)
        out = self.checked.run(codes, x.q_scale(), x.q_zero_point())
        out = out.reshape(*x.shape[:-1], self.out_features)
        return torch._make_per_tensor_quantized_tensor(out, layer.out_scale, layer.out_zero)
