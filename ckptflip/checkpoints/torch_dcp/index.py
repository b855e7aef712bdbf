"""The ``.metadata`` of a PyTorch distributed checkpoint: which part of which tensor lies where.

It is a pickle; it is read as text is, and never unpickled. Source of the classes that it names:
``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py`` at version 2.13.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct, structs

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.torch_zip.names import part, unique
from ckptflip.checkpoints.torch_zip.pickles import parse
from ckptflip.checkpoints.torch_zip.values import Call, Global, is_count, pairs_of, states_of

NAME = ".metadata"
_LONGEST_PATH = 64
_LONGEST_NAMES = 1 << 28
_MODULES = ("torch.distributed.checkpoint.", "torch.distributed._shard.checkpoint.")


class Chunk(Struct, frozen=True):
    """A box of a tensor: where it begins and its lengths, along each axis, and the item that holds it.

    Attributes:
        start: where the box begins.
        shape: its elements along each axis.
        file: relative to the folder; "" when the index does not tell.
        offset: the item's first byte in the file.
        length: the item's bytes.
        coded: what the item went through before it was written; () for nothing.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    length: int = 0
    coded: tuple[str, ...] = ()


class Entry(Struct, frozen=True):
    """A tensor of the index.

    Attributes:
        name: parts of its place in the state joined by ``/``.
        full_name: its name in the index (fully qualified name).
        path: the keys that lead to it in the state.
        position: its place in the order of the state, as far as known: ranks share out what they all have, so
            the order of the index tells nothing.
        shape: of the whole.
        chunks: its boxes.
    """

    name: str
    full_name: str
    path: tuple[str, ...]
    position: int
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Item(Struct, frozen=True):
    """A pickled value of an optimizer's parameter groups: the keys that lead to it, and where it lies."""

    path: tuple[str, ...]
    file: str
    offset: int
    length: int


class Index(Struct, frozen=True):
    """The tensors, what is none, and which of the latter tell the parameters of an optimizer."""

    entries: list[Entry]
    skipped: list[Skipped]
    items: list[Item]


def read_index(folder: Path) -> Index:
    """Read the index of a distributed checkpoint.

    Raises:
        CheckpointError: it is no pickle, or describes impossible things.
        DamagedError: the latter, said without the file's name.
        OSError: it cannot be read.
    """
    path = folder / NAME
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        value = parse(lambda at, count: os.pread(file.fileno(), count, at), size, str(path))
    fields = _fields(value, "Metadata")
    places = _places(fields.get("storage_data"))
    paths = {k: v for k, v in pairs_of(fields.get("planner_data")) if isinstance(k, str)}
    return _Reader(places, paths).read(pairs_of(fields.get("state_dict_metadata")))


class _Reader:
    """Puts together what the index says of each tensor in its several places."""

    def __init__(self, places: dict[str, dict[str, Any]], paths: dict[str, Any]) -> None:
        self._places = places
        self._paths = paths
        self._positions = {name: i for i, name in enumerate(paths)}
        self._letters = 0

    def read(self, described: Sequence[tuple[Any, Any]]) -> Index:
        """The entries, under unique names."""
        found: list[Entry] = []
        skipped: list[Skipped] = []
        items: list[Item] = []
        for full_name, value in described:
            if not isinstance(full_name, str):
                raise DamagedError("the name of a tensor is no text")
            path = self._path(full_name)
            name = "/".join(path)
            self._letters += len(name)
            if self._letters > _LONGEST_NAMES:
                raise DamagedError("the names of its tensors are too long")
            if _is_class(value, "BytesStorageMetadata"):
                skipped.append(Skipped(name, "it is no tensor"))
                items += self._item(full_name, path)
                continue
            fields = _fields(value, "TensorStorageMetadata")
            shape = _lengths(fields.get("size"), name)
            chunks = fields.get("chunks")
            if not isinstance(chunks, list):
                raise DamagedError(f"{name} has no list of chunks")
            boxes = tuple(self._chunk(full_name, chunk, shape) for chunk in chunks)
            position = self._positions.get(full_name, len(self._positions))
            found.append(Entry(name, part(full_name), path, position, shape, boxes))
        names = unique(entry.name for entry in found)
        entries = [
            e if e.name == name else structs.replace(e, name=name)
            for e, name in zip(found, names, strict=True)
        ]
        return Index(entries, skipped, items)

    def _path(self, full_name: str) -> tuple[str, ...]:
        """The keys that lead to a tensor in the state; its full name alone where they are not known."""
        path = self._paths.get(full_name)
        if not isinstance(path, tuple) or not 0 < len(path) <= _LONGEST_PATH:
            path = (full_name,)
        return tuple(part(key) for key in path)

    def _item(self, full_name: str, path: tuple[str, ...]) -> list[Item]:
        """The place of a value that is no tensor, if it is one of those that tell parameters."""
        place = self._places.get(_key(full_name, None)) if "param_groups" in path else None
        if place is None:
            return []
        file, offset, length, coded = _place(place, full_name)
        return [] if coded else [Item(path, file, offset, length)]

    def _chunk(self, full_name: str, value: Any, whole: tuple[int, ...]) -> Chunk:
        fields = _fields(value, "ChunkStorageMetadata")
        start, shape = _lengths(fields.get("offsets"), full_name), _lengths(fields.get("sizes"), full_name)
        if len(start) != len(whole) or len(shape) != len(whole):
            raise DamagedError(f"a chunk of {full_name} has another number of axes than the tensor")
        if any(s + n > w for s, n, w in zip(start, shape, whole, strict=True)):
            raise DamagedError(f"a chunk of {full_name} reaches beyond the tensor")
        place = self._places.get(_key(full_name, start))
        if place is None:
            return Chunk(start, shape)
        return Chunk(start, shape, *_place(place, f"a chunk of {full_name}"))


def _place(fields: dict[str, Any], what: str) -> tuple[str, int, int, tuple[str, ...]]:
    """The file, the first byte, the length of an item, and what it went through before it was written."""
    file, offset, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not isinstance(file, str) or not (is_count(offset) and is_count(length)):
        raise DamagedError(f"the place of {what} is not given")
    if not file or PurePosixPath(file).is_absolute() or ".." in file.split("/") or "\0" in file:
        raise DamagedError(f"{what} is said to lie in {file!r}, outside the checkpoint")
    coded = fields.get("transform_descriptors") or ()
    names = tuple(part(c) for c in coded) if isinstance(coded, list | tuple) else ("something",)
    return file, offset, length, names


def _places(storage_data: Any) -> dict[str, dict[str, Any]]:
    """What is said of each item, by tensor and start of the chunk."""
    found: dict[str, dict[str, Any]] = {}
    for index, place in pairs_of(storage_data):
        fields = _fields(index, "MetadataIndex")
        name, start = fields.get("fqn"), fields.get("offset")
        if isinstance(name, str):
            at = None if start is None else _lengths(start, name)
            found.setdefault(_key(name, at), _fields(place, "_StorageInfo"))
    return found


def _key(full_name: str, start: tuple[int, ...] | None) -> str:
    """Tells an item from all others; what is no tensor starts nowhere."""
    return f"{full_name}\0{start}"


def _is_class(value: Any, name: str) -> bool:
    called = value.function if isinstance(value, Call) else None
    return isinstance(called, Global) and called.name == name and called.module.startswith(_MODULES)


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an object of one of PyTorch's classes."""
    if not _is_class(value, name):
        raise DamagedError(f"it holds something else where PyTorch has a {name}")
    found: dict[str, Any] = {}
    for state in states_of(value):
        found.update((k, v) for k, v in pairs_of(state) if isinstance(k, str))
    return found


def _lengths(value: Any, name: str) -> tuple[int, ...]:
    """A ``torch.Size``."""
    if isinstance(value, Call) and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or len(value) > 63 or not all(is_count(n) for n in value):
        raise DamagedError(f"{name} has lengths that are no numbers, negative, or too many")
    return tuple(value)
