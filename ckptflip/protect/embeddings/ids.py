"""A seal for the ids of a batch: made where they are made, looked at where they are looked up."""

from __future__ import annotations

from functools import cache

import numpy as np

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Seals of ids") from error

_WORD = (1 << 64) - 1


def seal_ids(ids: torch.Tensor, offsets: torch.Tensor | None = None) -> int:
    """A number of 64 bits that belongs to these ids and offsets, in this order.

    The sum of each id times an odd random number of its place, modulo 2^64; of offsets, the same with numbers
    of their own. One bit that is altered, or one id, always alters it; two that trade places do but for
    a chance of 2^-31 with ids of 32 bits. No protection against intent.

    Args:
        ids: int32 or int64, [n] or [bags, length]; their width is of no account.
        offsets: int32 or int64, [bags] or [bags + 1].

    Raises:
        UsageError: other dtypes.

    Example:
        >>> seal = seal_ids(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
        >>> seal == seal_ids(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
        True
        >>> seal == seal_ids(torch.tensor([2, 1, 3]), torch.tensor([0, 2]))
        False
    """
    if any(each.dtype not in (torch.int32, torch.int64) for each in (ids, offsets) if each is not None):
        raise UsageError("ids and offsets that are sealed are tensors of int32 or int64")
    total: int = _weighted(ids.reshape(-1), 0) + ids.shape[0] * 3 + ids.numel() * 5
    if offsets is not None:
        total += _weighted(offsets, 1) + offsets.numel() * 7
    return total & _WORD


def _weighted(numbers: torch.Tensor, kind: int) -> int:
    size = numbers.numel()
    return int(torch.dot(numbers.long(), _weights(kind, (size - 1).bit_length())[:size]))


@cache
def _weights(kind: int, bits: int) -> torch.Tensor:
    """Odd numbers of 2^bits places, int64, the first of which do not depend on how many there are.

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), from a start of its own for each kind.
    """
    found = np.arange(1, (1 << bits) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found += np.uint64(kind * 0xD1B54A32D192ED03 & _WORD)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((found ^ (found >> np.uint64(31))) | np.uint64(1)).view(np.int64))
