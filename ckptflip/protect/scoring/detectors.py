"""Contenders that look for faults and alter nothing: cheap scans, digests, checksums of products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ckptflip.bits.values import EXTREME
from ckptflip.protect.gemm.floats import RowChecksum, row_checksum, rows_hold
from ckptflip.protect.scoring.contender import Run, Verdict
from ckptflip.protect.scoring.int8_layers import Int8Rows
from ckptflip.training.digests import state_digest


class Nan:
    """``nan``: NaN or infinity in a weight, what many loaders and training loops look for."""

    name = "nan"
    about = "NaN or infinity in a weight, what many loaders and training loops look for"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> bool:
        """Nothing is kept."""
        return True

    def face(self, model: torch.nn.Module, prepared: bool, run: Run) -> Verdict:
        """Look through all weights."""
        return Verdict(found=any(not bool(torch.isfinite(value).all()) for value in _floats(model).values()))


class Extreme:
    """``extreme``: NaN, infinity, or a magnitude above 1e10, as `ckptflip scan` counts them."""

    name = "extreme"
    about = "NaN, infinity, or a magnitude above 1e10 in a weight, as `ckptflip scan` counts them"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> bool:
        """Nothing is kept."""
        return True

    def face(self, model: torch.nn.Module, prepared: bool, run: Run) -> Verdict:
        """Look through all weights."""
        # NaN compares false.
        return Verdict(
            found=any(not bool((value.abs() <= EXTREME).all()) for value in _floats(model).values())
        )


class Range:
    """``range``: a weight beyond its tensor's least and greatest clean value, or NaN."""

    name = "range"
    about = "a weight beyond its tensor's least and greatest clean value, or NaN"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> dict[str, tuple[float, float]]:
        """The range of each tensor."""
        return {
            name: (float(value.min()), float(value.max()))
            for name, value in _floats(model).items()
            if value.numel()
        }

    def face(self, model: torch.nn.Module, prepared: dict[str, tuple[float, float]], run: Run) -> Verdict:
        """Look through all weights."""
        held = _floats(model)
        found = any(
            not bool(((held[name] >= low) & (held[name] <= high)).all())
            for name, (low, high) in prepared.items()
        )
        return Verdict(found=found)


class Digest:
    """``seal``: a digest over every tensor's bytes, as `ckptflip seal` keeps them of files."""

    name = "seal"
    about = "a digest of every tensor's bytes, as `ckptflip seal` keeps them of files"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> str:
        """A digest of all tensors."""
        return state_digest(dict(model.state_dict()))

    def face(self, model: torch.nn.Module, prepared: str, run: Run) -> Verdict:
        """Compare the digests."""
        return Verdict(found=state_digest(dict(model.state_dict())) != prepared)


class RowAbft:
    """``abft-row``: every linear layer's products against the row checksums of its clean weights."""

    name = "abft-row"
    about = "the row checksums of every linear layer's clean weights against its products in float32"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> dict[str, RowChecksum] | None:
        """The checksums of each linear layer."""
        found = {
            name: row_checksum(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        return found or None

    def face(self, model: torch.nn.Module, prepared: dict[str, RowChecksum], run: Run) -> Verdict:
        """Run the model with every product checked; a row that no check can judge counts as found."""
        with _checked(model, prepared) as broken:
            run()
        return Verdict(found=bool(broken))


@contextmanager
def _checked(model: torch.nn.Module, checksums: dict[str, RowChecksum]) -> Iterator[set[str]]:
    """The names of the layers whose products did not hold, filled while the block runs."""
    broken: set[str] = set()

    def watch(name: str, checksum: RowChecksum) -> Any:
        def look(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            if not rows_hold(output.reshape(-1, output.shape[-1]), x, checksum):
                broken.add(name)

        return look

    layers = dict(model.named_modules())
    handles = [
        layers[name].register_forward_hook(watch(name, checksum)) for name, checksum in checksums.items()
    ]
    try:
        yield broken
    finally:
        for handle in handles:
            handle.remove()


def _floats(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All floats of a model, those in its quantised rows too, which a sensible scan would know of."""
    found = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, Int8Rows):
            found |= {f"{name}.{field}": value for field, value in module.numbers().items()}
    return found
