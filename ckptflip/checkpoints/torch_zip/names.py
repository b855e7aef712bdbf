"""Names of tensors inside nested containers: parts joined by ``/``, each made from a key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckptflip.checkpoints.torch_zip.values import Global

_LONGEST_KEY = 256


def part(key: Any) -> str:
    """The part of a name that a key gives; never empty, printable, of bounded length.

    Example:
        >>> part("conv1.weight"), part(0), part((1, "a")), part("")
        ('conv1.weight', '0', '1,a', '_')
    """
    if isinstance(key, tuple):
        text = ",".join("…" if isinstance(k, tuple) else part(k) for k in key[:8])
    elif isinstance(key, Global):
        text = key.name
    elif isinstance(key, str):
        text = key
    else:
        text = str(key) if isinstance(key, int | float | bytes | None) else type(key).__name__
    if len(text) > _LONGEST_KEY:
        text = text[:_LONGEST_KEY] + "…"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in text)
    return text or "_"


def unique(names: Iterable[str]) -> list[str]:
    """The names, those given again with a number behind a ``~``.

    Example:
        >>> unique(["a", "b", "a", "a~2"])
        ['a', 'b', 'a~2', 'a~2~2']
    """
    seen: set[str] = set()
    last: dict[str, int] = {}
    found = []
    for name in names:
        free, number = name, last.get(name, 1)
        while free in seen:
            number += 1
            free = f"{name}~{number}"
        last[name] = number
        seen.add(free)
        found.append(free)
    return found
