"""How large a node of an OCDBT tree becomes when it is decoded, told before anything decodes it.

TensorStore decodes a node whatever it becomes; a few kilobytes can claim gigabytes. Each zstd block decodes
to at most 128 KiB, so that counting blocks bounds it.

Source: the layout of a node as TensorStore writes it (a magic number, its length, two variable-length
integers for version and compression, then the content, then a CRC-32C); RFC 8878 for zstd.
"""

from __future__ import annotations

from ckptflip.checkpoints.listing import DamagedError

_HEAD = 12
_CRC = 4
_ZSTD = b"\x28\xb5\x2f\xfd"
_LONGEST_BLOCK = 128 << 10
_RAW, _REPEATED = 0, 1


def decoded_bound(node: bytes) -> int:
    """Bytes that a node, or the manifest, has at most when it is decoded.

    Raises:
        DamagedError: its compression is none that is known, or is damaged.
    """
    at = _HEAD
    while at < len(node) and node[at] & 0x80:  # the version
        at += 1
    compression, end = node[at + 1 : at + 2], len(node) - _CRC
    if compression == b"\0":
        return len(node)
    at += 2
    if compression != b"\1" or at >= end:
        raise DamagedError("a node of its tree is compressed in an unknown way")
    bound = 0
    while at < end:
        at, size = _frame(node, at)
        bound += size
    return bound


def _frame(data: bytes, at: int) -> tuple[int, int]:
    """The end of a zstd frame, and what it decodes to at most."""
    if data[at : at + 4] != _ZSTD or at + 5 > len(data):
        raise DamagedError("a node of its tree is no zstd frame")
    flags = data[at + 4]
    single = flags >> 5 & 1
    at += 6 - single + (0, 1, 2, 4)[flags & 3] + (single, 2, 4, 8)[flags >> 6]
    bound, last = 0, False
    while not last:
        if at + 3 > len(data):
            raise DamagedError("a node of its tree is cut short")
        head = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
        bound += size if kind in (_RAW, _REPEATED) else _LONGEST_BLOCK
        at += 3 + (1 if kind == _REPEATED else size)
    return at + 4 * (flags >> 2 & 1), bound
