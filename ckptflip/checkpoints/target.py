"""What every checkpoint format offers: a catalogue, its words, and a way to alter them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import runs
from ckptflip.faults.record import TensorEntry

CHECKSUM_MODES = ("repair", "leave")


class Skipped(Struct, frozen=True):
    """Something in a checkpoint that is no tensor to be altered, and why.

    Attributes:
        name: its name in the checkpoint.
        reason: why its bits are left alone.
    """

    name: str
    reason: str


def positions_by_name(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Where each name of a catalogue stands in it, aliases included; a tensor's own name goes first."""
    aliases = {alias: i for i, t in enumerate(tensors) for alias in t.aliases}
    return aliases | {t.name: i for i, t in enumerate(tensors)}


def position_of(tensor: Tensor | TensorEntry, names: Mapping[str, int]) -> int | None:
    """Where a tensor of elsewhere stands among `positions_by_name`, by any of its names; None: nowhere."""
    return next((names[n] for n in (tensor.name, *tensor.aliases) if n in names), None)


class Changes(Struct, frozen=True, eq=False):
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
        return runs(self.tensor)


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

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether words of these tensors can be altered byte for byte, without rewriting the file.

        Args:
            tensors: positions in the catalogue.
            words: for each, the words meant; None: any of its words.
        """
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
