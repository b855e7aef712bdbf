"""Weights that Keras saved in several HDF5 files, with an index that says which groups lie in which."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints import shard_index
from ckptflip.checkpoints.extents import Extent
from ckptflip.checkpoints.hdf5.target import HDF5Checkpoint
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.keras.names import renamed
from ckptflip.checkpoints.patch import Patch
from ckptflip.checkpoints.target import Changes, NewFile, Prepared, Skipped
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import ChecksumEntry

SUFFIX = ".weights.json"
# Each is held open twice.
_MOST_SHARDS = 256


class _Index(Struct, frozen=True):
    """The part of an index that matters here: the shards of each group, by its path."""

    weight_map: dict[str, str | list[str]]


class _Place(Struct, frozen=True):
    """A tensor in its shard: the shard's position, and the tensor's in it."""

    shard: int
    tensor: int


class Shards:
    """Weights in several files. See `ckptflip.checkpoints.target.Checkpoint`.

    Args:
        path: the index.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or they disagree.
    """

    format = "keras sharded"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder: Path | None = None
        index = _index(path)
        names = list(dict.fromkeys(n for given in index.weight_map.values() for n in _listed(given)))
        if len(names) > _MOST_SHARDS:
            raise CheckpointError(f"{path} names {len(names)} shards; at most {_MOST_SHARDS} are opened")
        self.files: Sequence[Path] = [path, *(shard_index.beside(path, name) for name in names)]
        self._shards: list[HDF5Checkpoint] = []
        try:
            for file in self.files[1:]:
                self._shards.append(HDF5Checkpoint(file, naming=_as_stored))
            self._places, stored, self.skipped = _gathered(path, index, self._shards)
        except CheckpointError:
            self.close()
            raise
        self.tensors: Sequence[Tensor] = renamed(stored, _marks(self._shards))

    def close(self) -> None:
        """Release the files; closing twice is allowed."""
        for shard in self._shards:
            shard.close()

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned, native byte order."""
        place = self._places[tensor]
        return self._shards[place.shard].read(place.tensor, words)

    def blocks(self, tensor: int) -> Iterator[NDArray[Any]]:
        """All words of one tensor in order, in blocks of bounded size, native byte order."""
        place = self._places[tensor]
        return self._shards[place.shard].blocks(place.tensor)

    def by_patching(self, tensors: Sequence[int], words: Sequence[NDArray[np.int64]] | None = None) -> bool:
        """Whether words of these tensors can be altered byte for byte, without rewriting a shard."""
        for i, tensor in enumerate(tensors):
            place = self._places[tensor]
            here = None if words is None else [words[i]]
            if not self._shards[place.shard].by_patching([place.tensor], here):
                return False
        return True

    def prepare(
        self,
        changes: Changes,
        checksum: str,
        paths: Sequence[Path] | None = None,
        recorded: Sequence[ChecksumEntry] | None = None,
    ) -> Prepared:
        """Work out how to alter words: see `ckptflip.checkpoints.target.Checkpoint.prepare`."""
        shard_of = np.array([p.shard for p in self._places], np.int32)
        position = np.array([p.tensor for p in self._places], np.int32)
        patches: list[Patch] = []
        finishes: list[Callable[[], None]] = []
        for shard, checkpoint in enumerate(self._shards):
            rows = np.flatnonzero(shard_of[changes.tensor] == shard)
            if not rows.size:
                continue
            here = position[changes.tensor[rows]]
            rows = rows[np.lexsort((changes.word[rows], here))]
            part = Changes(
                position[changes.tensor[rows]], changes.word[rows], changes.mask[rows], changes.fault[rows]
            )
            made = checkpoint.prepare(part, checksum, None if paths is None else [paths[1 + shard]])
            patches += made.patches
            if made.finish is not None:
                finishes.append(made.finish)
        return Prepared(patches, (), (lambda: _all(finishes)) if finishes else None)

    def extents(self) -> Iterator[Extent]:
        """Every range of a shard in which words lie: see `ckptflip.checkpoints.extents`."""
        position = {(p.shard, p.tensor): i for i, p in enumerate(self._places)}
        for shard, checkpoint in enumerate(self._shards):
            for each in checkpoint.extents():
                if (shard, each.tensor) in position:
                    yield replace(each, tensor=position[shard, each.tensor], file=1 + shard)

    def renamed(self, out: Path) -> Sequence[NewFile]:
        """The index under another name, and its shards, which carry that name too.

        Raises:
            UsageError: the name is not that of an index.
        """
        names = shard_index.new_names(self.path, SUFFIX, out, [f.name for f in self.files[1:]])
        data = _renamed_index(shard_index.read(self.path), names)
        return [NewFile(out, data), *(NewFile(out.with_name(names[f.name])) for f in self.files[1:])]


def open_checkpoint(path: Path) -> Shards:
    """Open sharded weights by their index.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or they disagree.
    """
    return Shards(path)


def _as_stored(tensors: Sequence[Tensor], _: Marks) -> Sequence[Tensor]:
    return tensors


def _all(finishes: Sequence[Callable[[], None]]) -> None:
    for finish in finishes:
        finish()


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def _index(path: Path) -> _Index:
    try:
        index = msgspec.json.decode(shard_index.read(path), type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as why:
        raise CheckpointError(
            f"{path} is no index of Keras' shards: {why}. It should say {{'weight_map': {{group: file}}}}"
        ) from None
    if not index.weight_map:
        raise CheckpointError(f"{path} names no shards: its weight_map is empty")
    return index


def _gathered(
    path: Path, index: _Index, shards: Sequence[HDF5Checkpoint]
) -> tuple[list[_Place], list[Tensor], list[Skipped]]:
    """The tensors of all shards that the index knows, in the order of the shards."""
    places: list[_Place] = []
    tensors: list[Tensor] = []
    skipped: list[Skipped] = []
    owner: dict[str, str] = {}
    unseen = {group.strip("/"): _listed(given) for group, given in index.weight_map.items()}
    groups = {group: frozenset(given) for group, given in unseen.items()}
    for s, shard in enumerate(shards):
        name = shard.path.name
        for t, tensor in enumerate(shard.tensors):
            group = tensor.name.rpartition("/")[0]
            if name not in groups.get(group, ()):
                skipped.append(Skipped(tensor.name, f"in {name}, where the index does not look for it"))
            elif tensor.name in owner:
                skipped.append(
                    Skipped(tensor.name, f"in {name} too; Keras reads that of {owner[tensor.name]}")
                )
            else:
                owner[tensor.name] = name
                places.append(_Place(s, t))
                tensors.append(tensor)
                unseen.pop(group, None)
        skipped += [replace(each, name=f"{each.name} in {name}") for each in shard.skipped]
    if unseen and not skipped:
        group, given = next(iter(unseen.items()))
        raise CheckpointError(
            f"{path} says that {given[0] if given else 'a shard'} holds {group!r}, but it does not: "
            "index and shards are not of one set. Copy the set again"
        )
    return places, tensors, skipped


def _marks(shards: Sequence[HDF5Checkpoint]) -> Marks:
    """The marks of all shards together: a group's name stands in the first of its shards alone."""
    given: dict[str, str] = {}
    for shard in shards:
        for path, name in shard.marks.vars.items():
            given[path] = given.get(path) or name
    return Marks(given)


def _renamed_index(data: bytes, names: dict[str, str]) -> bytes:
    """The index with other names for the shards, written as Keras writes it."""
    index = json.loads(data)
    index["weight_map"] = {
        group: names[given] if isinstance(given, str) else [names[g] for g in given]
        for group, given in index["weight_map"].items()
    }
    return json.dumps(index, indent=4).encode()
