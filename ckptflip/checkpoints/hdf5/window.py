"""A part of an open file as a file of its own, which h5py can read: an HDF5 file inside an archive."""

from __future__ import annotations

import os


class Window:
    """Bytes of an open file, read as a file that begins and ends with them.

    Args:
        descriptor: of the file, open for reading. The window does not close it.
        start: the first byte.
        length: how many there are.
        where: what to call it in messages.
    """

    def __init__(self, descriptor: int, start: int, length: int, where: str) -> None:
        self.descriptor = descriptor
        self.start = start
        self.length = length
        self.where = where
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, as files do."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer as far as there are bytes; the number of them."""
        count = max(0, min(len(buffer), self.length - self._at))
        read = os.preadv(self.descriptor, [buffer[:count]], self.start + self._at) if count else 0
        self._at += read
        return read

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes, or all that are left."""
        left = max(0, self.length - self._at)
        data = os.pread(self.descriptor, left if count < 0 else min(count, left), self.start + self._at)
        self._at += len(data)
        return data

    def flush(self) -> None:
        """Nothing is ever written."""

    def write(self, data: bytes) -> int:
        """Refuse."""
        raise OSError("read-only")

    def truncate(self, size: int | None = None) -> int:
        """Refuse."""
        raise OSError("read-only")
