"""Targets whose row-wise quantised tables are codes, scales and biases: checkpoints, tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints.target import Changes, Checkpoint, NewFile, Prepared, Skipped
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import ChecksumEntry, Record, TensorEntry
from ckptflip.faults.rowwise import Rowwise
from ckptflip.live.target import LiveTarget
from ckptflip.recsys.tables.split import Split, recorded_tables, tables_of


class TableCheckpoint:
    """An open checkpoint with some tables as their fields. See `ckptflip.checkpoints.target.Checkpoint`.

    Args:
        stored: the checkpoint.
        tables: its row-wise ones by position in its catalogue, and their layouts.

    Raises:
        SelectionError: a tensor is no such table.
    """

    def __init__(self, stored: Checkpoint, tables: Mapping[int, Rowwise]) -> None:
        self.stored = stored
        self._split = Split(stored.tensors, tables)
        self.path: Path = stored.path
        self.format: str = stored.format
        self.files: Sequence[Path] = stored.files
        self.folder: Path | None = stored.folder
        self.tensors: Sequence[Tensor] = self._split.tensors
        self.skipped: Sequence[Skipped] = stored.skipped

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order."""
        return self._split.read(self.stored.read, tensor, words)

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        part = self._split.parts[tensor]
        if part.row is None:
            yield from self.stored.blocks(part.base)
            return
        width, rest = part.row.width, np.empty(0, np.uint8)
        for block in self.stored.blocks(part.base):
            data = np.concatenate([rest, block])
            whole = data.size // width * width
            rest = data[whole:]
            if whole:
                yield self._split.of_rows(tensor, data[:whole].reshape(-1, width))

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether words of these tensors can be altered byte for byte, without rewriting a file."""
        bases = [self._split.parts[t].base for t in tensors]
        if words is None:
            return self.stored.by_patching(sorted(set(bases)))
        held: dict[int, list[NDArray[np.int64]]] = {}
        for base, tensor, some in zip(bases, tensors, words, strict=True):
            held.setdefault(base, []).append(self._split.stored_words(tensor, some))
        merged = [np.unique(np.concatenate(several)) for several in held.values()]
        return self.stored.by_patching(list(held), merged)

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: see `ckptflip.checkpoints.target.Checkpoint.prepare`."""
        return self.stored.prepare(self._split.stored_changes(changes), checksum, paths, recorded)

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """The files of a checkpoint of this kind under another name, in the order of `files`."""
        return self.stored.renamed(out)

    def close(self) -> None:
        """Release the files; closing twice is allowed."""
        self.stored.close()


class TableTarget:
    """Tensors in memory with some tables as their fields. See `ckptflip.live.LiveTarget`.

    Args:
        stored: the tensors, such as a `ckptflip.live.torch_tensors.TorchTarget`.
        policy: its `rowwise` says which tensors are tables, and in what layout; or the record whose tables
            are meant, to undo or replay it.

    Raises:
        SelectionError: the policy selects nothing, or a tensor that is no such table.

    Example:
        >>> import torch
        >>> from ckptflip.live import inject, undo
        >>> from ckptflip.live.torch_tensors import TorchTarget
        >>> model = torch.nn.Module()
        >>> model.register_buffer("emb", torch.ops.quantized.embedding_bag_4bit_prepack(torch.rand(10, 6)))
        >>> policy = Policy(tensors=("emb",), rowwise="int4", fields=("scale",), bits="sign")
        >>> target = TableTarget(TorchTarget(model), policy)
        >>> record = inject(target, policy, seed=1)
        >>> record.header.tensors[0].name, record.header.tensors[0].dtype, undo(target, record)
        ('model/emb.scale', 'float16', 1)
    """

    def __init__(self, stored: LiveTarget, policy: Policy | Sequence[Policy] | Record) -> None:
        self.stored = stored
        self.format: str = stored.format
        self._tables: Callable[[Sequence[Tensor]], Mapping[int, Rowwise]]
        if isinstance(policy, Record):
            entries = policy.header.tensors
            self._tables = lambda tensors: recorded_tables(entries, tensors)
        else:
            policies = combine(policy)
            self._tables = lambda tensors: tables_of(policies, tensors)
        self._seen: Sequence[Tensor] = ()
        self._split = Split((), {})
        self._refresh()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The catalogue as of now: the same object again for as long as nothing has changed."""
        return self._refresh().tensors

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned; nothing else of the tensor is read."""
        return self._split.read(self.stored.read, tensor, words)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor, in place. Positions are distinct."""
        order = np.argsort(words)
        places = np.full(words.size, tensor, np.int32)
        changes = self._split.stored_changes(Changes(places, words[order], masks[order], masks[order]))
        for base, rows in changes.by_tensor():
            self.stored.xor(base, changes.word[rows], changes.mask[rows])

    def _refresh(self) -> Split:
        """Take up the catalogue as it is now."""
        tensors = self.stored.tensors
        if tensors is not self._seen:
            self._split = Split(tensors, self._tables(tensors))
            self._seen = tensors
        return self._split


def as_asked(checkpoint: Checkpoint, policies: Sequence[Policy]) -> Checkpoint:
    """A checkpoint with the tables that policies name as their fields; itself where they name none.

    Raises:
        SelectionError: a policy selects nothing, or a tensor that is no such table.
        UsageError: two policies say different things of one table.
    """
    tables = tables_of(policies, checkpoint.tensors)
    return TableCheckpoint(checkpoint, tables) if tables else checkpoint


def as_recorded(checkpoint: Checkpoint, entries: Sequence[TensorEntry]) -> Checkpoint:
    """A checkpoint with the tables that a record hits as their fields; without them where it hits none.

    Args:
        checkpoint: any, seen in whatever way.
        entries: the record's tensors.
    """
    stored = checkpoint.stored if isinstance(checkpoint, TableCheckpoint) else checkpoint
    tables = recorded_tables(entries, stored.tensors)
    return TableCheckpoint(stored, tables) if tables else stored
