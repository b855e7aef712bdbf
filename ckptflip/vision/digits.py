"""Scikit-learn's handwritten digits, enlarged to 32x32: the data that is always on board."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.training import digits_data

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Sets = tuple[tuple[Floats, Labels], tuple[Floats, Labels]]


def images(channels: int = 3, side: int = 32) -> Sets:
    """The digits, split 80:20 by class as the digits workloads split them; the same for every seed.

    Args:
        channels: 1 for grey; 3 for the same grey thrice, so that models are those of CIFAR.
        side: pixels per side, a multiple of 8.

    Returns:
        ``((inputs, targets), (test inputs, test targets))``: float32[n, channels, side, side] in 0 to 1,
        int64[n].
    """
    if channels not in (1, 3):
        raise UsageError(f"the digits have 1 or 3 channels, not {channels}")
    pixels, targets = digits_data.digits("torch")
    small = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    train, test = digits_data.split()
    return (
        (_coloured(small[train], channels, side), targets[train]),
        (_coloured(small[test], channels, side), targets[test]),
    )


def enlarged(images: Floats, side: int) -> Floats:
    """Enlarge square images by bilinear interpolation between pixel centres; the edge is continued.

    Args:
        images: float32[n, s, s].
        side: a multiple of s.

    Returns:
        float32[n, side, side]. Digits' pixels are sixteenths and the weights eighths at factor 4: every sum
        is exact, so the result is the same on every machine.

    Example:
        >>> enlarged(np.array([[[0, 1], [0, 1]]], np.float32), 4)[0, 0].tolist()
        [0.0, 0.25, 0.75, 1.0]
    """
    size = images.shape[-1]
    if side < size or side % size:
        raise UsageError(f"images of {size} pixels per side are enlarged to a multiple of it, not to {side}")
    centres = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    low = np.minimum(centres.astype(np.int64), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    share = (centres - low).astype(np.float32)
    rows = images[:, low] * (1 - share)[:, None] + images[:, high] * share[:, None]
    found: Floats = rows[:, :, low] * (1 - share) + rows[:, :, high] * share
    return found


def _coloured(grey: Floats, channels: int, side: int) -> Floats:
    return np.repeat(enlarged(grey, side)[:, None], channels, axis=1)
