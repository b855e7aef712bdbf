"""What altered bytes do to a CRC, without reading the bytes that stay: O(log n) for each.

A CRC is affine over GF(2): with D the XOR of old and new data, crc(new) = crc(old) XOR L(D), where L is the
same register run from 0 without the final inversion. A single altered byte passes through the table once and
then through as many zero bytes as follow it; n zero bytes are one multiplication by x^(8n) modulo the
polynomial, done by repeated squaring (the idea of `crc32_combine` in zlib 1.2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Reflected polynomials: CRC-32 (ISO-HDLC, as in zip) and CRC-32C (Castagnoli; RFC 3720, appendix B.4).
POLYNOMIALS = {"crc32": 0xEDB88320, "crc32c": 0x82F63B78}
_BITS = np.arange(32, dtype=np.uint32)
# From so many values on, four look-ups of a byte each beat 32 conditional XORs.
_MANY = 512
_TENSORFLOW_DELTA = 0xA282EAD8


def delta(algorithm: str, behind: NDArray[np.int64], xored: NDArray[np.uint8]) -> int:
    """What to XOR into a stored CRC when bytes of the covered data are altered.

    Args:
        algorithm: ``crc32`` or ``crc32c``.
        behind: for each altered byte, how many covered bytes follow it.
        xored: old XOR new value of each.

    Example:
        >>> import zlib
        >>> old, new = b"123456789", b"1234x6789"
        >>> change = delta("crc32", np.array([4]), np.array([ord("5") ^ ord("x")], np.uint8))
        >>> zlib.crc32(old) ^ change == zlib.crc32(new)
        True
    """
    registers = _byte_table(algorithm)[xored]
    left = behind.astype(np.int64)
    power = 0
    while left.any():
        odd = (left & 1).astype(bool)
        registers[odd] = _advance(algorithm, power, registers[odd])
        left >>= 1
        power += 1
    return int(np.bitwise_xor.reduce(registers)) if registers.size else 0


def checksum(algorithm: str, data: bytes | memoryview) -> int:
    """The CRC of some bytes, for blocks of a few megabytes at most.

    Example:
        >>> hex(checksum("crc32c", b"123456789"))
        '0xe3069283'
    """
    if algorithm == "crc32":
        import zlib

        return zlib.crc32(data)
    values = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(values)
    # All zeros of this length first, then what makes them the data.
    start = _advance_by(algorithm, np.array([0xFFFFFFFF], np.uint32), values.size)
    return (int(start[0]) ^ 0xFFFFFFFF) ^ delta(algorithm, values.size - 1 - at, values[at])


def of_flips(algorithm: str, count: int) -> NDArray[np.uint32]:
    """What a flip of each bit of a byte does to a CRC, by how many bytes follow it, shape (count, 8).

    Args:
        algorithm: ``crc32`` or ``crc32c``.
        count: for 0 to ``count - 1`` bytes behind.

    Example:
        >>> import zlib
        >>> hex(zlib.crc32(b"abcd") ^ zlib.crc32(b"aB" b"cd")) == hex(int(of_flips("crc32", 3)[2, 5]))
        True
    """
    table = _byte_table(algorithm)[1 << np.arange(8)]
    return _series(table, count, partial(_advance, algorithm))


def rewound(algorithm: str, change: int, count: int) -> NDArray[np.uint32]:
    """The registers that so many zero bytes, 0 to ``count - 1``, turn into a given change of a CRC.

    A change that lies in four neighbouring bytes alone, with `b` bytes behind them, is the little-endian mask
    ``rewound(…)[b + 4]`` of them: a CRC of 32 bits tells any burst of 32 bits whose place is known.

    Example:
        >>> import zlib
        >>> change = zlib.crc32(b"abcdefgh") ^ zlib.crc32(b"ab" + bytes(4) + b"gh")
        >>> int(rewound("crc32", change, 7)[6]).to_bytes(4, "little")
        b'cdef'
    """
    back = _inverted(_matrix(algorithm, 0))
    powers = [back]

    def behind(power: int, registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
        while len(powers) <= power:
            powers.append(_times(powers[-1], powers[-1]))
        return _times(powers[power], registers)

    return _series(np.array([change], np.uint32), count, behind)[:, 0]


def mask(crc: int) -> int:
    """TensorFlow's masked form of a CRC, stored beside data that may itself hold CRCs.

    Source: tensorflow/core/lib/hash/crc32c.h (rotated right by 15, plus a constant).
    """
    return ((crc >> 15 | crc << 17) + _TENSORFLOW_DELTA) & 0xFFFFFFFF


def unmask(masked: int) -> int:
    """The CRC in a masked one.

    Example:
        >>> unmask(mask(0x12345678)) == 0x12345678
        True
    """
    turned = (masked - _TENSORFLOW_DELTA) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


@cache
def _byte_table(algorithm: str) -> NDArray[np.uint32]:
    """The register after one byte, from 0."""
    polynomial = np.uint32(POLYNOMIALS[algorithm])
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ polynomial, table >> 1)
    return table


@cache
def _matrix(algorithm: str, power: int) -> NDArray[np.uint32]:
    """What 2^power zero bytes make of each single bit of a register, shape (32,)."""
    if power == 0:
        table = _byte_table(algorithm)
        single: NDArray[np.uint32] = np.uint32(1) << _BITS
        shifted: NDArray[np.uint32] = single >> np.uint32(8) ^ table[single & 0xFF]
        return shifted
    half = _matrix(algorithm, power - 1)
    return _times(half, half)


@cache
def _tables(algorithm: str, power: int) -> NDArray[np.uint32]:
    """The same for each value of each byte of a register, shape (4, 256)."""
    values = np.arange(256, dtype=np.uint32)
    matrix = _matrix(algorithm, power)
    return np.stack([_times(matrix, values << np.uint32(8 * byte)) for byte in range(4)])


def _times(matrix: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    bits = (registers[:, None] >> _BITS & 1).astype(bool)
    product: NDArray[np.uint32] = np.bitwise_xor.reduce(np.where(bits, matrix, np.uint32(0)), axis=1)
    return product


def _advance(algorithm: str, power: int, registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Registers after 2^power zero bytes."""
    if registers.size < _MANY:
        return _times(_matrix(algorithm, power), registers)
    tables = _tables(algorithm, power)
    found: NDArray[Any] = tables[0][registers & 0xFF]
    for byte in range(1, 4):
        found = found ^ tables[byte][registers >> np.uint32(8 * byte) & 0xFF]
    return found


def _series(
    first: NDArray[np.uint32], count: int, step: Callable[[int, NDArray[np.uint32]], NDArray[np.uint32]]
) -> NDArray[np.uint32]:
    """Registers after 0 to ``count - 1`` steps, by doubling.

    Args:
        first: after none.
        count: how many are wanted.
        step: takes 2^power steps at once.
    """
    made = np.empty((count, *first.shape), np.uint32)
    made[0] = first
    power = 0
    while 1 << power < count:
        have = 1 << power
        more = min(have, count - have)
        made[have : have + more] = step(power, made[:more].reshape(-1)).reshape(more, -1)
        power += 1
    return made


def _inverted(matrix: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The inverse of a 32 × 32 matrix over GF(2), columns as registers, by elimination."""
    columns, inverse = [int(c) for c in matrix], [1 << i for i in range(32)]
    for bit in range(32):
        pivot = next(i for i in range(bit, 32) if columns[i] >> bit & 1)
        for one in (columns, inverse):
            one[bit], one[pivot] = one[pivot], one[bit]
        for other in range(32):
            if other != bit and columns[other] >> bit & 1:
                columns[other] ^= columns[bit]
                inverse[other] ^= inverse[bit]
    return np.array(inverse, np.uint32)


def _advance_by(algorithm: str, registers: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    for power in range(count.bit_length()):
        if count >> power & 1:
            registers = _advance(algorithm, power, registers)
    return registers
