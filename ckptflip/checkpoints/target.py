"""What every checkpoint format offers: a catalogue, its words, and a way to alter them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.patch import Patch
from ckptflip.faults.catalogue import Tensor, bare_name
from ckptflip.faults.plan import runs
from ckptflip.faults.record import ChecksumEntry, TensorEntry

_NUMBERED_VARIABLE = re.compile(r"/vars/\d+$")
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
    """Where each name of a catalogue stands in it: a tensor's own name first, aliases, then bare names."""
    aliases = {alias: i for i, t in enumerate(tensors) for alias in t.aliases}
    named = aliases | {t.name: i for i, t in enumerate(tensors)}
    # Without the container that a training loop keeps its model in: last, and only where that is one tensor.
    bare = Counter(bare_name(t.name) for t in tensors)
    return {n: i for i, t in enumerate(tensors) for n in [bare_name(t.name)] if bare[n] == 1} | named


def position_of(tensor: Tensor | TensorEntry, names: Mapping[str, int]) -> int | None:
    """Where a tensor of elsewhere stands among `positions_by_name`, by any of its names; None: nowhere.

    Keras numbers layers without a name anew in every process (``dense_2`` where another run had ``dense``),
    so the paths in its files, which count from the model's first layer, go before names.
    """
    by_path = (a for a in tensor.aliases if _NUMBERED_VARIABLE.search(a))
    known = (*by_path, tensor.name, *tensor.aliases, bare_name(tensor.name))
    return next((names[n] for n in known if n in names), None)


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


class Prepared(Struct, frozen=True, eq=False):
    """What an alteration will write, worked out before anything is written.

    Attributes:
        patches: words to alter byte for byte: the data first, stored checksums after them.
        checksums: the stored CRCs among them.
        finish: alters what is stored coded, in the copies; None when patches are all.
    """

    patches: list[Patch]
    checksums: tuple[ChecksumEntry, ...] = ()
    finish: Callable[[], None] | None = None


class NewFile(Struct, frozen=True):
    """One file of a new checkpoint.

    Attributes:
        path: its name.
        data: what it holds, where that is not what the source's file holds; None: a copy.
    """

    path: Path
    data: bytes | None = None


class Checkpoint(Protocol):
    """An open checkpoint. Nothing here alters a file, but what `prepare` gives back.

    Attributes:
        path: the checkpoint as its framework names it: a file, a folder, a prefix.
        format: the format's short name.
        files: every file that holds its index or its data, the one that names the others first.
        folder: the folder that is the checkpoint, with all that lies in it; None: its files alone are.
        tensors: the catalogue, in the order of the checkpoint's names.
        skipped: what the catalogue leaves out.
    """

    path: Path
    format: str
    files: Sequence[Path]
    folder: Path | None
    tensors: Sequence[Tensor]
    skipped: Sequence[Skipped]

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order."""
        ...

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        ...

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether words of these tensors can be altered byte for byte, without rewriting a file.

        Args:
            tensors: positions in the catalogue.
            words: for each, the words meant; None: any of its words.
        """
        ...

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words. The checkpoint is closed before anything is written.

        Args:
            changes: what to alter.
            checksum: ``repair`` or ``leave``.
            paths: copies of `files`, in that order, which may be rewritten. None: these very files, by
                patching alone.
            recorded: to undo: the CRCs that the injection altered.

        Raises:
            CheckpointError: it cannot be done.
        """
        ...

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """The files of a checkpoint of this kind under another name, in the order of `files`.

        Args:
            out: the new name, of the same kind as `path`.

        Raises:
            UsageError: it cannot have this name.
        """
        ...

    def close(self) -> None:
        """Release the files; closing twice is allowed."""
        ...
