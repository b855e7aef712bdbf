"""What tensors in memory offer to be altered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.faults.catalogue import Tensor


class LiveTarget(Protocol):
    """Tensors in memory. Positions in `tensors` name them in `read` and `xor`.

    Attributes:
        format: where they live, such as ``pytorch live``; kept in records.
    """

    format: str

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The catalogue as of now: the same object again for as long as nothing has changed.

        Raises:
            LiveError: the model is no longer the one that the target was made for.
        """
        ...

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned; nothing else of the tensor is read."""
        ...

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor, in place. Positions are distinct."""
        ...
