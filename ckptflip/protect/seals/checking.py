"""Holding a checkpoint against its seal: which cells, shares and files are not what they were."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints.files import Progress
from ckptflip.errors import CheckpointError
from ckptflip.protect.seals import work
from ckptflip.protect.seals.members import paths_of
from ckptflip.protect.seals.passing import digest_of, each_cell
from ckptflip.protect.seals.sidecar import Seal
from ckptflip.protect.seals.stream import Stream, state_of


class Checked:
    """What a pass over a checkpoint found.

    Args:
        seal: of the checkpoint.
        paths: its files, in the seal's order.

    Attributes:
        bad: damaged cells, ascending.
        bad_shares: damaged shares of the seal, by number.
        sizes: bytes of each file now; None where it is missing.
    """

    def __init__(self, seal: Seal, paths: Sequence[Path]) -> None:
        self.seal = seal
        self.paths = paths
        states = [state_of(p) for p in paths]
        self.sizes: Sequence[int | None] = [None if s is None else s.size for s in states]
        there = [None if s is None else p for p, s in zip(paths, states, strict=True)]
        self.stream = Stream(there, seal.cuts.files, whole=False)
        self.bad: list[int] = []
        self.bad_shares: set[int] = set()

    def run(self, workers: int, progress: Progress | None) -> Checked:
        """Read all that is sealed, and the shares."""
        lock = threading.Lock()

        def note(cell: int, data: NDArray[np.uint8]) -> None:
            if digest_of(data) != self.seal.digest(cell) or self._is_beyond(cell):
                with lock:
                    self.bad.append(cell)

        each_cell(self.seal.cuts, self.stream, note, workers, progress)
        self.bad.sort()

        def share(number: int) -> None:
            if self.seal.share(number) is None:
                with lock:
                    self.bad_shares.add(number)

        work.over(range(len(self.seal.shares)), share, workers)
        return self

    @cached_property
    def missing(self) -> list[int]:
        """Files that are not there."""
        return [i for i, size in enumerate(self.sizes) if size is None]

    @property
    def whole(self) -> bool:
        """Whether every sealed byte is there and right, and every file has its length."""
        return not self.bad and all(
            size == due for size, (_, due) in zip(self.sizes, self.seal.header.files, strict=True)
        )

    def extra(self, checkpoint: Path) -> list[str]:
        """Files in a sealed folder that were not there when it was sealed."""
        if self.seal.header.kind != "folder" or not checkpoint.is_dir():
            return []
        known = {name for name, _ in self.seal.header.files}
        found = (p for p in checkpoint.rglob("*") if p.is_symlink() or not p.is_dir())
        return sorted(n for n in (p.relative_to(checkpoint).as_posix() for p in found) if n not in known)

    def _is_beyond(self, cell: int) -> bool:
        """Whether a cell lies beyond its file's end: what reads as zeros is not there, even if zeros were."""
        file, _, end = self.seal.cuts.in_file(cell)
        size = self.sizes[file]
        return size is None or end > size


def checked(seal: Seal, checkpoint: Path, workers: int, progress: Progress | None) -> Checked:
    """Read a checkpoint against its seal.

    Raises:
        CheckpointError: nothing of it is there.
    """
    paths, _ = paths_of(seal.header, checkpoint)
    found = Checked(seal, paths)
    if seal.header.kind == "folder" and checkpoint.exists() and not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is a file, and {seal.path} the seal of a folder")
    if len(found.missing) == len(paths):
        raise CheckpointError(f"{checkpoint} is not there: none of the files that {seal.path} names is")
    return found.run(workers, progress)
