"""The bytes of a pickle, read forward through a window of bounded size."""

from __future__ import annotations

from collections.abc import Callable

# Longer strings are passed over: no name is as long.
LONGEST = 1 << 16
_CHUNK = 1 << 20

Read = Callable[[int, int], bytes]


class UnsoundError(ValueError):
    """What is wrong with a pickle, in words."""


class Stream:
    """A window on the bytes that `read` gives: (position, how many).

    Args:
        read: may give fewer bytes than asked for only at the end.
        size: of the whole.
        longest: longer strings are passed over.
    """

    def __init__(self, read: Read, size: int, longest: int = LONGEST) -> None:
        self._longest = longest
        self._read = read
        self._size = size
        self._data = b""
        self._base = 0  # where the window begins
        self._at = 0  # the next byte, in the window

    @property
    def position(self) -> int:
        """The next byte."""
        return self._base + self._at

    def byte(self) -> int:
        """The next byte, as a number."""
        if self._at >= len(self._data):
            self._more(1)
        self._at += 1
        return self._data[self._at - 1]

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self._at + count > len(self._data):
            self._more(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def unsigned(self, width: int) -> int:
        """A little-endian integer."""
        return self.byte() if width == 1 else int.from_bytes(self.take(width), "little")

    def line(self) -> bytes:
        """Up to the next line feed, which is passed over."""
        end = self._data.find(b"\n", self._at)
        if end < 0:
            self._more(min(self._size - self.position, LONGEST))
            end = self._data.find(b"\n")
        if end < 0 or end - self._at > LONGEST:
            raise UnsoundError("a line has no end")
        line = self._data[self._at : end]
        self._at = end + 1
        return line

    def body(self, size: int) -> bytes | None:
        """The bytes of a string; None when it is longer than `longest`: then it is passed over unread."""
        if size <= self._longest:
            return self.take(size)
        if size > self._size - self.position:
            raise UnsoundError(f"a string of {size} bytes would reach beyond its end")
        self._base, self._at, self._data = self.position + size, 0, b""
        return None

    def _more(self, count: int) -> None:
        """Move the window so that it holds the next `count` bytes."""
        kept = self._data[self._at :]
        self._base += self._at
        self._at = 0
        fresh = self._read(self._base + len(kept), max(count - len(kept), _CHUNK))
        self._data = kept + fresh
        if len(self._data) < count or not self._data:
            raise UnsoundError("it ends too early")
