"""What every checkpoint format offers: a catalogue, its words, and a way to alter them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.faults.catalogue import Tensor

CHECKSUM_MODES = ("repair", "leave")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something in a checkpoint that is no tensor to be altered, and why.

    Attributes:
        name: its name in the checkpoint.
        reason: why its bits are left alone.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Changes:
    """Masks to XOR into a checkpoint, ordered by tensor and then by word.

    Attributes:
        tensor: positions in the catalogue, int32.
        word: flat word positions in the tensor, int64.
        mask: what to XOR into the word now, uint64; 0 where nothing is left to do.
        fault: the whole mask of the recorded fault, uint64: what a stored checksum may know of.
    """

    tensor: NDArray[np.int32]
    word: NDArray[np.int64]
    mask: NDArray[np.uint64]
    fault: NDArray[np.uint64]

    def by_tensor(self) -> Iterator[tuple[int, slice]]:
        """The rows of each tensor: (position in the catalogue, slice of rows)."""
        starts = np.flatnonzero(np.diff(self.tensor, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], self.tensor.size], strict=True):
            yield int(self.tensor[start]), slice(start, end)


class Checkpoint(Protocol):
    """An open checkpoint. Reading never alters it; `alter` closes it first.

    Attributes:
        path: the file.
        format: the format's short name.
        tensors: the catalogue, in the order of the file's names.
        skipped: what the catalogue leaves out.
    """

    path: Path
    format: str
    tensors: Sequence[Tensor]
    skipped: Sequence[Skipped]

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order."""
        ...

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        ...

    def by_patching(self, tensors: Sequence[int]) -> bool:
        """Whether words of these tensors can be altered byte for byte, without rewriting the file."""
        ...

    def alter(self, changes: Changes, checksum: str, path: Path | None = None) -> None:
        """Alter the words, in this file or in `path`, a copy of it. Closes the checkpoint.

        Args:
            changes: what to alter.
            checksum: ``repair`` or ``leave``.
            path: the copy; it may be rewritten. None: this very file, by patching alone.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...
