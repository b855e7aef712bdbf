"""The Fletcher-32 checksum as HDF5 computes it (the `fletcher32` filter of a chunked dataset).

Source: HDF5 file format specification, "Fletcher32 filter"; big-endian 16-bit words, sums modulo 65535 in
which a non-zero multiple of the modulus stays 65535, an odd last byte padded with zero.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 1 << 16


def fletcher32(data: bytes | bytearray | memoryview) -> int:
    """The checksum of some bytes.

    Example:
        >>> hex(fletcher32(b"abcde"))
        '0x4ff029c7'
    """
    padded = bytes(data) + b"\0" if len(data) % 2 else data
    words = np.frombuffer(padded, ">u2")
    low = high = 0
    some = False
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint64)
        some = some or bool(block.any())
        # The second sum adds the running first sum once per word.
        weights = np.arange(block.size, 0, -1, dtype=np.uint64)
        high = (high + low * block.size + int((block * weights).sum())) % 65535
        low = (low + int(block.sum())) % 65535
    if some:
        low, high = low or 65535, high or 65535
    return high << 16 | low
