"""What a pickle describes, as inert values: nothing is imported, called or compared.

Numbers, strings, bytes, None, tuples and lists stand for themselves. Whatever else a pickle asks for is noted
down in one of the forms below. Values may share parts and may contain themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from msgspec import Struct


class Global(Struct, frozen=True):
    """A class or function by its name; it is never imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Module and name together, such as ``torch._utils._rebuild_tensor_v2``."""
        return f"{self.module}.{self.name}"


class Pairs(Struct, eq=False):
    """A dict as its pairs in order. Keys are not hashed: a file could choose them so that hashing hurts."""

    pairs: list[tuple[Any, Any]] | None = None


class Call(Struct, eq=False):
    """An object by how it would be made.

    Attributes:
        function: what would be called: a `Global` if the pickle is a sound one.
        args: with what.
        states: what it would be given afterwards, as attributes or through ``__setstate__``.
        pairs: what would be stored in it under keys.
        items: what would be appended or added to it. None in these three for nothing: there may be millions.
    """

    function: Any
    args: tuple[Any, ...]
    states: list[Any] | None = None
    pairs: list[tuple[Any, Any]] | None = None
    items: list[Any] | None = None


class Persistent(Struct, frozen=True, eq=False):
    """Something outside the pickle by its id: a storage, in a file of PyTorch's."""

    id: Any


class Large(Struct, frozen=True):
    """A string, some bytes or an integer too long to be kept; ``size`` is in bytes."""

    size: int


def pairs_of(value: Any) -> list[tuple[Any, Any]]:
    """The key-value pairs of a dict-like value: of a dict, or stored in an object under keys."""
    return (value.pairs or []) if isinstance(value, Pairs | Call) else []


def states_of(call: Call) -> Iterator[Any]:
    """What an object would be given as attributes. Those with ``__slots__`` have a dict and one of slots."""
    for state in call.states or ():
        yield from state if isinstance(state, tuple) else (state,)


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that can be a length or an offset."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
