"""Names of HDF5 members for the keys of a dict: the key itself wherever HDF5 allows it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

# Attributes of a group that belong to the format; a scalar under such a key is stored under another name.
RESERVED = frozenset({"ckptflip", "container", "keys", "metadata", "name"})
_LONGEST = 200


def member_name(key: Any, *taken: Container[str]) -> str:
    """Choose the name for a key: its text, with what HDF5 cannot hold escaped, and free of collisions.

    Example:
        >>> member_name("conv1.weight", set()), member_name(0, {"0"}), member_name("a/b", set())
        ('conv1.weight', '0%1', 'a%2Fb')
    """
    text = key if isinstance(key, str) else repr(key)
    name = "".join(_escape(char) for char in text[:_LONGEST])
    if not name.strip("."):
        name = name.replace(".", "%2E") or "%"
    if len(text) > _LONGEST:
        name += "%"
    free, attempt = name, 0
    while any(free in names for names in taken):
        attempt += 1
        free = f"{name}%{attempt}"
    return free


def _escape(char: str) -> str:
    # HDF5 separates groups by "/" and ends names at NUL; lone surrogates have no UTF-8.
    if char in "/%\0" or "\ud800" <= char <= "\udfff":
        return f"%{ord(char):02X}"
    return char
