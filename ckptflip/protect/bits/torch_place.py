"""The words of PyTorch's tensors as arrays: without a copy, where they lie in a row on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat
from ckptflip.faults.catalogue import Tensor
from ckptflip.live.torch_words import is_row

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchPlace:
    """The parameters and buffers of a PyTorch model; see `ckptflip.protect.bits.places.Place`.

    Args:
        target: a `ckptflip.live.torch_tensors.TorchTarget`.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    @property
    def tensors(self) -> Sequence[Tensor]:
        catalogue: Sequence[Tensor] = self._target.tensors
        return catalogue

    def words(self, tensor: int) -> NDArray[Any]:
        return row(self._target.tensor(tensor), self.tensors[tensor].number)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        self._target.xor(tensor, words, masks)

    def mark(self, tensor: int) -> Any:
        held = self._target.tensor(tensor)
        # Tensors of inference mode keep no version.
        return id(held), None if held.is_inference() else held._version


def row(tensor: torch.Tensor, number: NumberFormat) -> NDArray[Any]:
    """All words of a tensor in C order: its own memory, or a copy where they do not lie so on a CPU.

    Example:
        >>> from ckptflip.bits import lookup
        >>> x = torch.tensor([1.0, 2.0])
        >>> row(x, lookup("float32"))[0] ^= np.uint32(1 << 31)
        >>> x
        tensor([-1.,  2.])
    """
    data = tensor.detach()
    if not is_row(data):
        data = data.cpu().contiguous()
    if data.is_complex():
        data = torch.view_as_real(data)
    words: NDArray[Any] = (
        data.view(_INTEGERS[data.element_size()]).reshape(-1).numpy().view(number.word_dtype)
    )
    return words
