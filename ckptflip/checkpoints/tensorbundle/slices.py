"""Tensors that were saved in slices: the key of each slice, and whether the slices make up the tensor.

Source: tensorflow/core/util/saved_tensor_slice_util.cc and tensorflow/core/lib/strings/ordered_code.cc.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

import numpy as np

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.tensorbundle.entries import WHOLE, Extents

# Slices are compared in pairs.
MOST_SLICES = 4096
# What tells a slice's key from a tensor's.
KEY_START = b"\0"

Box = tuple[tuple[int, ...], tuple[int, ...]]


def slice_key(name: bytes, extents: Extents) -> bytes:
    """The key of a slice, written so that keys sort as names and positions do.

    Example:
        >>> slice_key(b"w", ((10, 2), (0, -1)))
        b'\\x00w\\x00\\x01\\x01\\x02\\x8a\\x82\\x80\\x7f'
    """
    escaped = re.sub(rb"[\0\xff]", lambda found: found[0] + (b"\0" if found[0] == b"\xff" else b"\xff"), name)
    return b"".join(
        [
            KEY_START,
            escaped,
            b"\0\1",
            _ascending(len(extents)),
            *(_signed(n) for pair in extents for n in pair),
        ]
    )


def box(extents: Extents, shape: tuple[int, ...]) -> Box:
    """Where a slice begins and how long it is, along each axis.

    Raises:
        DamagedError: it does not lie in the tensor.
    """
    if len(extents) != len(shape):
        raise DamagedError(f"a slice has {len(extents)} axes, the tensor {len(shape)}")
    starts = tuple(start for start, _ in extents)
    lengths = tuple(n if length == WHOLE else length for (_, length), n in zip(extents, shape, strict=True))
    for start, length, n in zip(starts, lengths, shape, strict=True):
        if start < 0 or length < 0 or start + length > n:
            raise DamagedError(f"a slice of {length} from {start} on does not fit an axis of {n}")
    return starts, lengths


def cover(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes inside a tensor make up all of it.

    Raises:
        DamagedError: two of them overlap.
    """
    held = [b for b in boxes if prod(b[1])]
    starts = np.array([b[0] for b in held], np.int64).reshape(len(held), len(shape))
    ends = starts + np.array([b[1] for b in held], np.int64).reshape(len(held), len(shape))
    for i in range(1, len(held)):
        if ((starts[i] < ends[:i]) & (starts[:i] < ends[i])).all(axis=1).any():
            raise DamagedError("two of its slices overlap")
    return sum(prod(b[1]) for b in held) == prod(shape)


def _ascending(number: int) -> bytes:
    """A number of at least 0: how many bytes it has, and these, the highest first."""
    length = (number.bit_length() + 7) // 8
    return bytes([length]) + number.to_bytes(length, "big")


def _signed(number: int) -> bytes:
    """A number from -1 on in n bytes: two's complement, of which the n leading bits are flipped to tell n."""
    length = 1
    while number >= 1 << (7 * length - 1):
        length += 1
    leading = ((1 << length) - 1) << (7 * length)
    return ((number & ((1 << 8 * length) - 1)) ^ leading).to_bytes(length, "big")
