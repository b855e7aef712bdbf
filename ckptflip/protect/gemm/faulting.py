"""Faults in a checked product, for measuring what its check finds: in B, in C and in A.

They are drawn, put in and recorded by the engine of all others (`ckptflip.live`): a policy, a seed, words and
XOR. B is the weight as it is packed, columns of the checksum included; C the accumulators between the product
and its check, as 32-bit integers in two's complement; A the input's codes, before the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.faults.record import Record
from ckptflip.live.torch_tensors import TorchTarget
from ckptflip.protect.gemm.checked import Checked
from ckptflip.protect.gemm.packing import Packed


def flipped(
    tensor: torch.Tensor, name: str, policy: Policy, *, seed: int, record: str | Path | None = None
) -> Record:
    """Put faults into one tensor, where it is.

    Args:
        tensor: any.
        name: what the record calls it.
        policy: what is hit.
        seed: of the draw.
        record: a file for the record.

    Example:
        >>> codes = torch.zeros(4, dtype=torch.uint8)
        >>> flipped(codes, "codes", Policy(bits="7"), seed=1).bits_effective, int(codes.sum())
        (1, 128)
    """
    holder = torch.nn.Module()
    holder.register_buffer(name, tensor)
    return live.inject(TorchTarget(holder), policy, seed=seed, record=record)


def damaged(
    packed: Packed, policy: Policy, *, seed: int, record: str | Path | None = None
) -> tuple[Packed, Record]:
    """The same layer with faults in its packed weight (B); its checksums stay as they were.

    Args:
        packed: a sound layer, which is left alone.
        policy, seed, record: as for `flipped`; the tensor is called ``packed``, int8 of shape (width, k).

    Example:
        >>> from ckptflip.protect.gemm.packing import pack, product
        >>> from ckptflip.protect.gemm.quantised import Quantised
        >>> sound = pack(Quantised(torch.ones(1, 1, dtype=torch.int8), torch.ones(1)))
        >>> bad, record = damaged(sound, Policy(bits="1"), seed=1)
        >>> x = torch.tensor([[5]], dtype=torch.uint8)
        >>> float(product(sound, x)), float(product(bad, x))
        (5.0, 15.0)
    """
    matrix = packed.matrix.clone()
    made = flipped(matrix, "packed", policy, seed=seed, record=record)
    weight = torch.ops.onednn.qlinear_prepack(matrix, [1, packed.layer.inputs])
    return replace(packed, weight=weight), made


@contextmanager
def weight_faults(checked: Checked, policy: Policy, *, seed: int) -> Iterator[Record]:
    """Faults in B for the length of a block.

    Args:
        checked: of a layer: ``layer.checked``.
        policy, seed: as for `flipped`.

    Yields:
        The record.
    """
    sound = checked.packed
    checked.packed, made = damaged(sound, policy, seed=seed)
    try:
        yield made
    finally:
        checked.packed = sound


@contextmanager
def accumulator_faults(checked: Checked, policy: Policy, *, seed: int) -> Iterator[list[Record]]:
    """Faults in C, anew in each call in a block: in 32-bit integers, then rounded to float32 as oneDNN does.

    Of blocks within each other on one layer the innermost has its faults.

    Args:
        checked: of a layer: ``layer.checked``.
        policy, seed: as for `flipped`; the seed counts on from call to call.

    Yields:
        The records, one for each call so far.
    """
    records: list[Record] = []

    def fault(rows: torch.Tensor) -> None:
        whole = rows.to(torch.int32)
        records.append(flipped(whole, "accumulators", policy, seed=seed + len(records)))
        rows.copy_(whole)

    before, checked.between = checked.between, fault
    try:
        yield records
    finally:
        checked.between = before
