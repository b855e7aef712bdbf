"""Writing tensors into new files: one module per format, each with a function `write`.

A writer takes entries and gives each tensor's words to the file as they are; no number is ever made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.faults.catalogue import Tensor


class Entry(Struct, frozen=True, eq=False):
    """A tensor to be written.

    Attributes:
        tensor: its name, shape and number format.
        blocks: gives all its words in order, in blocks of bounded size, native byte order.
    """

    tensor: Tensor
    blocks: Callable[[], Iterator[NDArray[Any]]]


def raw(block: NDArray[Any]) -> memoryview:
    """The bytes of a block of words."""
    return block.view(np.uint8).data


class Writer(Protocol):
    """What each module here offers."""

    def unfit(self, tensor: Tensor) -> str | None:
        """Why a tensor cannot be held by this format; None if it can."""
        ...

    def write(self, path: Path, entries: Sequence[Entry]) -> None:
        """Write a new file.

        Raises:
            OSError: the disk is full, or the file cannot be written.
            CheckpointError: names that cannot stand side by side; words that cannot be read.
        """
        ...
