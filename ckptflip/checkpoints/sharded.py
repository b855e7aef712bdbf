"""Sharded sets of Hugging Face models: an index file that says which shard holds which tensor.

``model.safetensors.index.json`` for safetensors shards, ``pytorch_model.bin.index.json`` for PyTorch ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from ckptflip.checkpoints import shard_index
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.pieces import Layout
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import NewFile, Skipped
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor

_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_INDENTS = (2, None, 4)

Opener = Callable[[Path], LaidOut]


class _Index(Struct, frozen=True):
    """The part of an index that matters here: the shard of each tensor, by name."""

    weight_map: dict[str, str]


class _Merged(Struct):
    """What the shards hold together, and the names of the index that were found in them."""

    files: list[Path]
    tensors: list[Tensor] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    crcs: list[StoredCrc] = field(default_factory=list)
    present: set[str] = field(default_factory=set)


def open_checkpoint(path: Path) -> LaidOut:
    """Open a sharded set by its index file.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or they disagree.
    """
    weight_map = _index(path, shard_index.read(path)).weight_map
    names = list(dict.fromkeys(weight_map.values()))
    files = [shard_index.beside(path, name) for name in names]
    opener = _opener(path)
    return merged(path, weight_map, [opener(f) for f in files])


def merged(path: Path, weight_map: Mapping[str, str], shards: Sequence[LaidOut]) -> LaidOut:
    """One checkpoint of an index file and its shards.

    Args:
        path: the index file.
        weight_map: the shard's file name by the tensor's name.
        shards: all of them, opened; their files lie beside the index.

    Raises:
        CheckpointError: a tensor is not in the shard that the index names.
    """
    found = _Merged(files=[path])
    for shard in shards:
        if shard.blobs is not None:
            raise CheckpointError(f"{shard.path} is compressed; write the set anew without compression")
        _add(found, shard, weight_map)
    missing = next((n for n in weight_map if n not in found.present), None)
    if missing is not None:
        raise CheckpointError(
            f"{path} says that {weight_map[missing]} holds {missing!r}, but it does not: index and shards "
            "are not of one set. Download it again"
        )
    return LaidOut(
        path,
        "sharded",
        found.files,
        found.tensors,
        found.layouts,
        skipped=found.skipped,
        crcs=found.crcs,
        renaming=lambda out: _renamed(path, found.files, out),
    )


def renamed_index(data: bytes, names: Mapping[str, str]) -> bytes:
    """An index with other names for its shards, in the same order and formatted as before.

    Args:
        data: the index file's contents.
        names: the new name of each shard by its old one.

    Example:
        >>> renamed_index(b'{"weight_map": {"a": "m-1.bin"}}', {"m-1.bin": "n-1.bin"})
        b'{"weight_map": {"a": "n-1.bin"}}'
    """
    text = data.decode()
    index = json.loads(text)
    ascii_only = text.isascii()
    layouts = [(i, json.dumps(index, indent=i, ensure_ascii=ascii_only)) for i in _INDENTS]
    indent = next((i for i, dumped in layouts if dumped == text.rstrip()), _INDENTS[0])
    index["weight_map"] = {name: names[shard] for name, shard in index["weight_map"].items()}
    end = text[len(text.rstrip()) :]
    return (json.dumps(index, indent=indent, ensure_ascii=ascii_only) + end).encode()


def _index(path: Path, data: bytes) -> _Index:
    try:
        index = msgspec.json.decode(data, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as why:
        raise CheckpointError(
            f"{path} is no index of shards: {why}. It should say {{'weight_map': {{tensor: file}}}}"
        ) from None
    if not index.weight_map:
        raise CheckpointError(f"{path} names no shards: its weight_map is empty")
    return index


def _opener(path: Path) -> Opener:
    if path.name.endswith(_SUFFIXES[1]):
        from ckptflip.checkpoints.torch_zip.archive import open_checkpoint as open_torch

        return open_torch
    from ckptflip.checkpoints.safetensors import open_checkpoint as open_safetensors

    return open_safetensors


def _add(found: _Merged, shard: LaidOut, weight_map: Mapping[str, str]) -> None:
    """Take in a shard: those of its tensors that the index says to be in it."""
    by = len(found.files)
    for tensor, layout in zip(shard.tensors, shard.layouts, strict=True):
        named = [n for n in (tensor.name, *tensor.aliases) if weight_map.get(n) == shard.path.name]
        if not named:
            reason = f"in {shard.path.name}, which the index does not say"
            found.skipped.append(Skipped(tensor.name, reason))
            continue
        found.tensors.append(replace(tensor, name=named[0], aliases=tuple(named[1:])))
        found.layouts.append(_layout_shifted(layout, by))
        found.present.update(named)
    found.skipped.extend(shard.skipped)
    found.present.update(s.name for s in shard.skipped if weight_map.get(s.name) == shard.path.name)
    found.crcs.extend(_crc_shifted(s, by) for s in shard.crcs)
    found.files.extend(shard.files)


def _layout_shifted(layout: Layout, by: int) -> Layout:
    return replace(layout, pieces=tuple(replace(p, file=p.file + by) for p in layout.pieces))


def _crc_shifted(stored: StoredCrc, by: int) -> StoredCrc:
    return replace(stored, file=stored.file + by, places=tuple((f + by, at) for f, at in stored.places))


def _renamed(path: Path, files: Sequence[Path], out: Path) -> list[NewFile]:
    """The index under another name, and its shards, which carry that name too."""
    suffix = next((s for s in _SUFFIXES if path.name.endswith(s)), ".index.json")
    names = shard_index.new_names(path, suffix, out, [f.name for f in files[1:]])
    data = renamed_index(shard_index.read(path), names)
    return [NewFile(out, data), *(NewFile(out.with_name(names[f.name])) for f in files[1:])]
