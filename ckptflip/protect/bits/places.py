"""Where guarded words live: PyTorch's and Keras' tensors, any live target, arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import as_words, lookup, xor_at
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.live.protocol import LiveTarget
from ckptflip.live.session import framework_of, target_of


class Place(Protocol):
    """Tensors whose words can be seen whole and altered."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The catalogue."""
        ...

    def words(self, tensor: int) -> NDArray[Any]:
        """All words of a tensor in C order, unsigned: where they are, if that can be, else a copy."""
        ...

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words, in place. Positions are distinct and ascending."""
        ...

    def mark(self, tensor: int) -> Any:
        """What changes when a tensor is written on purpose, as in training; None if nothing does."""
        ...


def place_of(held: Any) -> Place:
    """Where the words of a model, a target or arrays live.

    Raises:
        UsageError: none of these; an array that is not C-contiguous or may not be written.
    """
    if isinstance(held, Mapping):
        return Arrays(held)
    if isinstance(held, np.ndarray):
        return Arrays({"array": held})
    kind = framework_of(held)
    target = target_of(held, None, kind)
    if kind == "torch":
        from ckptflip.protect.bits.torch_place import TorchPlace

        return TorchPlace(target)
    return Target(target)


class Arrays:
    """Arrays of numbers by name.

    Example:
        >>> place = Arrays({"w": np.array([1.0, -2.0], np.float32)})
        >>> [hex(word) for word in place.words(0)]
        ['0x3f800000', '0xc0000000']
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not arrays:
            raise UsageError("there are no arrays to guard")
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise UsageError(f"{name} is a {type(array).__name__}, not a numpy array")
            if not array.flags.writeable:
                raise UsageError(f"{name} may not be written, so no flip in it can be put right: pass a copy")
        self._words = [as_words(array) for array in arrays.values()]
        self.tensors = [
            Tensor(name, array.shape, lookup(array.dtype), _order(array)) for name, array in arrays.items()
        ]

    def words(self, tensor: int) -> NDArray[Any]:
        return self._words[tensor]

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        xor_at(self._words[tensor], words, masks)

    def mark(self, tensor: int) -> Any:
        return None


class Target:
    """Any live target: words are read as copies, and altered where they are."""

    def __init__(self, target: LiveTarget) -> None:
        self._target = target

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self._target.tensors

    def words(self, tensor: int) -> NDArray[Any]:
        return self._target.read(tensor, np.arange(self.tensors[tensor].words))

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        self._target.xor(tensor, words, masks)

    def mark(self, tensor: int) -> Any:
        return None


def _order(array: NDArray[Any]) -> str:
    return ">" if array.dtype.byteorder == ">" else "<"
