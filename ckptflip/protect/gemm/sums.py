"""The row sums of an int8 weight, as numbers that a product of 8 or 16 bits can carry."""

from __future__ import annotations

import torch

MODULUS = 127
# Float32 holds every integer below this exactly, and so a product whose accumulators stay below it.
EXACT = 1 << 24
# The most inputs whose product with codes of 255 and weights of -128 stays below it.
CHUNK = (EXACT - 1) // (255 * 128)


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """The sum over outputs: int64 of shape (k,) of an int8 weight (n, k).

    Example:
        >>> row_sums(torch.tensor([[1, -128], [2, -128]], dtype=torch.int8)).tolist()
        [3, -256]
    """
    return weight.sum(0, dtype=torch.int64)


def digits(sums: torch.Tensor) -> torch.Tensor:
    """Balanced digits to the base 256, lowest first: int8 of shape (d, k), as many as the largest sum needs.

    Example:
        >>> digits(torch.tensor([3, -256, 128])).tolist()
        [[3, 0, -128], [0, -1, 1]]
    """
    found: list[torch.Tensor] = []
    rest = sums
    while not found or bool((rest != 0).any()):
        digit = (rest + 128) % 256 - 128
        found.append(digit.to(torch.int8))
        rest = (rest - digit) // 256
    return torch.stack(found)


def residues(sums: torch.Tensor) -> torch.Tensor:
    """Sums modulo 127, from -63 to 63: int8 of shape (1, k); as in arXiv 2103.00130.

    Balanced, they keep the accumulators of their column small; modulo 127 it makes no difference.

    Example:
        >>> residues(torch.tensor([3, -256, 64])).tolist()
        [[3, -2, -63]]
    """
    return ((sums + MODULUS // 2) % MODULUS - MODULUS // 2).to(torch.int8)[None]


def halves(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Balanced digits to the base 65536, int16 of shape (k,): the low one, and the high one if there is any.

    Example:
        >>> halves(torch.tensor([3, -256]))
        (tensor([   3, -256], dtype=torch.int16), None)
    """
    low = (sums + 32768) % 65536 - 32768
    high = (sums - low) // 65536
    return low.to(torch.int16), high.to(torch.int16) if bool((high != 0).any()) else None


def widest(weight: torch.Tensor) -> int:
    """The largest accumulator that codes of 8 bits can make with a weight (n, k).

    Example:
        >>> widest(torch.tensor([[1, -2], [3, 3]], dtype=torch.int8))
        1530
    """
    return 255 * int(weight.to(torch.int16).abs().sum(1, dtype=torch.int64).max()) if weight.numel() else 0
