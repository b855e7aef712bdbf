"""Random crops and flips that depend on (seed, epoch, index of the sample) alone.

Whatever the batch size, the order or the framework, and after a resume, the same sample gets the same crop in
the same epoch. Source of the numbers: a block of Philox4x32-10 per sample (`ckptflip.faults.stream`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.faults.stream import check_seed, philox

if TYPE_CHECKING:
    import torch

Integers = NDArray[np.int64]
# Keeps these numbers apart from the other streams of the same seed.
_PURPOSE = np.uint64(0x696D6167)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True, slots=True)
class Draws:
    """What happens to each sample.

    Attributes:
        rows: int64[n], 0 … 2 padding: where the crop begins in the padded image.
        columns: likewise.
        mirrored: bool[n]: whether left and right are swapped.
    """

    rows: Integers
    columns: Integers
    mirrored: NDArray[np.bool_]


def draw(seed: int, epoch: int, indices: Any, *, padding: int = 4, flip: bool = True) -> Draws:
    """Draw crops and flips for some samples of an epoch.

    Args:
        seed: 0 … 2^64-1.
        epoch: 0 or more.
        indices: int[n]: the samples, by their place in the training set.
        padding: pixels put on each side before the crop.
        flip: mirror each sample with probability 1/2.

    Example:
        >>> all_of_them, one = draw(7, 0, range(100)), draw(7, 0, [42])
        >>> int(all_of_them.rows[42]) == int(one.rows[0])
        True
    """
    check_seed(seed)
    if epoch < 0 or padding < 0:
        raise UsageError(f"epoch ({epoch}) and padding ({padding}) are 0 or more")
    at = np.asarray(indices, dtype=np.uint64)
    zero = np.zeros_like(at)
    counter = (at & _LOW, at >> _HALF, zero + np.uint64(epoch), zero + _PURPOSE)
    down, right, side, _ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    places = np.uint64(2 * padding + 1)
    return Draws(
        rows=(down * places >> _HALF).astype(np.int64),
        columns=(right * places >> _HALF).astype(np.int64),
        mirrored=(side >> np.uint64(31)).astype(bool) & flip,
    )


def apply(
    images: NDArray[Any], draws: Draws, *, padding: int = 4, channels_last: bool = False
) -> NDArray[Any]:
    """Crop and flip images; pixels are moved, never computed, and what lies outside is 0.

    Args:
        images: any dtype; [n, channels, height, width], or [n, height, width, channels].
        draws: of the same n, made with the same padding.
        padding: zeros on each side before the crop.
        channels_last: which of the two layouts.

    Returns:
        A new array of the same shape and dtype.

    Example:
        >>> image = np.arange(4).reshape(1, 1, 2, 2)
        >>> still, mirrored = np.array([1]), np.array([True])
        >>> apply(image, Draws(still, still, mirrored), padding=1)[0, 0].tolist()
        [[1, 0], [3, 2]]
    """
    height, width = images.shape[1:3] if channels_last else images.shape[2:4]
    sides, none = (padding, padding), (0, 0)
    padded = np.pad(images, (none, sides, sides, none) if channels_last else (none, none, sides, sides))
    sample, rows, columns = _places(draws, height, width)
    if channels_last:
        return padded[sample, rows, columns]
    # Index arrays around a slice put the slice's axis last.
    return np.ascontiguousarray(padded[sample, :, rows, columns].transpose(0, 3, 1, 2))


def apply_torch(images: torch.Tensor, draws: Draws, *, padding: int = 4) -> torch.Tensor:
    """`apply` on a tensor [n, channels, height, width], on its device; the same pixels to the bit."""
    import torch

    places = _places(draws, *images.shape[2:4])
    sample, rows, columns = (torch.from_numpy(place).to(images.device) for place in places)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def _places(draws: Draws, height: int, width: int) -> tuple[Integers, Integers, Integers]:
    """Sample, row and column of the padded images' pixels: [n, 1, 1], [n, height, 1], [n, 1, width]."""
    column = np.arange(width)
    columns = np.where(draws.mirrored[:, None], column[::-1], column) + draws.columns[:, None]
    rows = np.arange(height) + draws.rows[:, None]
    return np.arange(len(rows))[:, None, None], rows[:, :, None], columns[:, None, :]
