"""A protected layer's numbers as plain tensors, with checksums that are verified when they are read.

The row sums find what the product's check would find; a CRC-32 of all numbers finds the rest, damaged scales
and biases among it, which no checksum of the product covers.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from ckptflip.errors import DetectedError
from ckptflip.protect.gemm.quantised import Quantised
from ckptflip.protect.gemm.sums import row_sums


def saved_numbers(layer: Quantised, sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is saved of a layer, by name.

    Example:
        >>> layer = Quantised(torch.ones(2, 3, dtype=torch.int8), torch.ones(1))
        >>> list(saved_numbers(layer, row_sums(layer.weight)))
        ['weight', 'weight_scale', 'bias', 'settings', 'sums', 'crc32']
    """
    bias = torch.zeros(0) if layer.bias is None else layer.bias
    # NaN stands for "none"; a zero point and a truth value are exact in float64.
    numbers = [layer.x_scale, layer.x_zero, layer.out_scale, layer.out_zero, layer.relu]
    settings = torch.tensor([float("nan") if n is None else float(n) for n in numbers], dtype=torch.float64)
    found = {
        "weight": layer.weight,
        "weight_scale": layer.weight_scale,
        "bias": bias,
        "settings": settings,
        "sums": sums,
    }
    return found | {"crc32": torch.tensor([_crc(found)], dtype=torch.int64)}


def _crc(tensors: dict[str, torch.Tensor]) -> int:
    crc = 0
    for tensor in tensors.values():
        crc = zlib.crc32(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()), crc)
    return crc


def read_numbers(found: dict[str, Any], *, where: str) -> Quantised:
    """A layer from what `saved_numbers` gave, verified.

    Args:
        found: tensors by name.
        where: the layer's name, for messages.

    Raises:
        DetectedError: the numbers do not match their checksums.
        UsageError: they make no layer.

    Example:
        >>> layer = Quantised(torch.ones(2, 3, dtype=torch.int8), torch.ones(1), x_scale=0.5)
        >>> read_numbers(saved_numbers(layer, row_sums(layer.weight)), where="fc").x_scale
        0.5
    """
    body = {name: tensor.detach().cpu() for name, tensor in found.items() if name != "crc32"}
    weight = body["weight"]
    whole = weight.dtype is torch.int8 and weight.dim() == 2 and torch.equal(row_sums(weight), body["sums"])
    if not whole or found["crc32"].reshape(-1).tolist() != [_crc(body)]:
        part = "row sums of the weight" if not whole else "CRC-32 of its numbers"
        raise DetectedError(
            f"{where}: what was loaded does not match its checksum (the {part}): it was altered after it was "
            "saved; load another checkpoint"
        )
    x_scale, x_zero, out_scale, out_zero, relu = body["settings"].tolist()
    return Quantised(
        weight.clone(),
        body["weight_scale"].clone(),
        body["bias"].clone() if len(body["bias"]) else None,
        _or_none(x_scale),
        int(x_zero),
        _or_none(out_scale),
        int(out_zero),
        bool(relu),
    )


def _or_none(number: float) -> float | None:
    return None if number != number else number
