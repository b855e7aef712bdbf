"""PyTorch distributed checkpoints: a folder with an index (``.metadata``) and files of torch zips.

Each zip holds a chunk of a tensor. A tensor that several ranks share is one tensor here, with the index that
its elements have in the whole.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path

from msgspec import Struct

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import DamagedError, bits_of, check_apart
from ckptflip.checkpoints.pieces import Layout, Piece
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.torch_dcp.index import NAME, Chunk, Entry, read_index
from ckptflip.checkpoints.torch_dcp.slots import parameters
from ckptflip.checkpoints.torch_zip.archive import contents
from ckptflip.checkpoints.torch_zip.sharing import Shared
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Shard, Tensor

_RANK = re.compile(r"(?:.*/)?__(\d{1,9})_\d+\.distcp")
_MOST_CORNERS = 1 << 22
# Runs of ranks that a listing names.
_MOST_RUNS = 4


class _Part(Struct, frozen=True):
    """A chunk with the tensor that its item holds; None when there is none to alter, and why."""

    chunk: Chunk
    tensor: Shared | None
    reason: str = ""


_Box = tuple[Chunk, Shared]


def open_checkpoint(path: Path) -> LaidOut:
    """Open a distributed checkpoint.

    Args:
        path: the folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the index describes impossible things.
    """
    folder = path if path.is_dir() else path.parent
    try:
        index = read_index(folder)
        files = _files(index.entries, folder)
        parts, crcs = _parts(index.entries, files, folder)
        tensors, layouts, skipped = _catalogue(index.entries, parts, parameters(index, folder))
    except OSError as why:
        raise CheckpointError(f"{why.filename or folder} cannot be read: {why.strerror or why}") from None
    except DamagedError as why:
        raise CheckpointError(
            f"{folder / NAME} is damaged: {why}. Copy or download the checkpoint again"
        ) from None
    return LaidOut(
        folder,
        "torch distributed",
        [folder / NAME, *(folder / f for f in files)],
        tensors,
        layouts,
        skipped=[*index.skipped, *skipped],
        crcs=crcs,
        folder=folder,
    )


def _catalogue(
    entries: Sequence[Entry], parts: Sequence[Sequence[_Part]], owners: Mapping[str, str]
) -> tuple[list[Tensor], list[Layout], list[Skipped]]:
    """The tensors that can be altered, where their words lie, and the others.

    Args:
        entries: of the index.
        parts: the chunks of each.
        owners: for state of optimizers, the parameters' names.
    """
    groups: dict[str, set[str]] = {}
    for entry in entries:
        group, _, leaf = entry.name.rpartition("/")
        groups.setdefault(group, set()).add(leaf)
    tensors: list[Tensor] = []
    layouts: list[Layout] = []
    skipped: list[Skipped] = []
    several = len({r for e in entries for c in e.chunks if (r := _rank(c.file)) is not None}) > 1
    for entry, chunks in zip(entries, parts, strict=True):
        try:
            boxes, layout = _assembled(entry, chunks)
        except _LeftOut as why:
            skipped.append(Skipped(entry.name, str(why)))
            continue
        siblings, owner = groups[entry.name.rpartition("/")[0]], owners.get(entry.name, "")
        tensors.append(_tensor(entry, boxes, layout, siblings, owner, several_ranks=several))
        layouts.append(layout)
    return tensors, layouts, skipped


class _LeftOut(Exception):  # noqa: N818
    """Why a tensor cannot be altered."""


def _files(entries: Sequence[Entry], folder: Path) -> list[str]:
    """The data files, in the order of their names."""
    files = sorted({c.file for e in entries for c in e.chunks if c.file})
    other = next((f for f in files if f.endswith(".safetensors")), None)
    if other is not None:
        raise CheckpointError(
            f"{folder} keeps its tensors in safetensors files; name one of them, such as {folder / other}"
        )
    return files


def _parts(
    entries: Sequence[Entry], files: Sequence[str], folder: Path
) -> tuple[list[list[_Part]], list[StoredCrc]]:
    """What the items of all chunks hold, file by file."""
    by_file: dict[str, list[tuple[int, Chunk]]] = {}
    parts: list[list[_Part]] = [[] for _ in entries]
    for i, entry in enumerate(entries):
        for chunk in entry.chunks:
            if not prod(chunk.shape):
                continue
            if not chunk.file or chunk.coded:
                by = f"it is stored through {', '.join(chunk.coded)}" if chunk.coded else "a chunk is missing"
                parts[i].append(_Part(chunk, None, by))
            else:
                by_file.setdefault(chunk.file, []).append((i, chunk))
    crcs: list[StoredCrc] = []
    for number, name in enumerate(files, 1):
        if name not in by_file:
            continue
        # Two tensors in one item would be the same words in the catalogue twice.
        items = {
            (c.offset, c.offset + c.length, f"{entries[i].name} {list(c.start)}") for i, c in by_file[name]
        }
        check_apart(items)
        with open_plain(folder / name) as file:
            _check_whole(folder / name, os.fstat(file.fileno()).st_size, items)
            for i, chunk in by_file[name]:
                where = f"{folder / name}, {entries[i].name}"
                part, covering = _item(file.fileno(), where, number, chunk)
                parts[i].append(part)
                crcs += covering
    return parts, crcs


def _check_whole(path: Path, size: int, items: Iterable[tuple[int, int, str]]) -> None:
    """Refuse a data file that ends before what the index says lies in it."""
    start, end, name = max(items, key=lambda item: item[1])
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, and {name} lies at bytes {start} to {end}. Copy or "
            "download it again"
        )


def _item(fd: int, where: str, file: int, chunk: Chunk) -> tuple[_Part, list[StoredCrc]]:
    """The tensor that the item of a chunk holds."""
    found = contents(fd, where, file=file, start=chunk.offset, length=chunk.length)
    if len(found.tensors) != 1 or found.tensors[0].aliases or found.tensors[0].views:
        reason = found.skipped[0].reason if found.skipped else "its item does not hold one plain tensor"
        return _Part(chunk, None, reason), []
    tensor = found.tensors[0]
    if tensor.view.shape != chunk.shape:
        raise CheckpointError(
            f"{where}: a chunk of shape {chunk.shape} holds a tensor of shape {tensor.view.shape}; the files "
            "do not belong together"
        )
    axes = len(chunk.shape)
    if tensor.layout.dims[:axes] != chunk.shape:
        return _Part(chunk, None, "its words stand for several elements each"), []
    return _Part(chunk, tensor), found.crcs


def _assembled(entry: Entry, parts: Sequence[_Part]) -> tuple[list[_Box], Layout]:
    """The chunks of a tensor, each once, and where its words lie.

    Raises:
        _LeftOut: it cannot be altered.
    """
    for part in parts:
        if part.tensor is None:
            raise _LeftOut(part.reason)
    boxes = [(part.chunk, part.tensor) for part in parts if part.tensor is not None]
    boxes = list({(chunk.start, chunk.shape): (chunk, tensor) for chunk, tensor in reversed(boxes)}.values())
    boxes.reverse()
    if not boxes:
        raise _LeftOut("it has no elements" if 0 in entry.shape else "all its chunks are missing")
    first = boxes[0][1].layout
    if any(
        (t.layout.number, t.layout.order, t.layout.bits) != (first.number, first.order, first.bits)
        for _, t in boxes
    ):
        raise DamagedError(f"the chunks of {entry.name} are of different dtypes")
    bits_of(entry.shape, first.number.width)
    _check_cover([(c.start, c.shape) for c, _ in boxes], entry.shape)
    axes = len(entry.shape)
    inner = first.dims[axes:]
    pieces = tuple(
        Piece(p.file, p.offset, p.shape, p.strides, (*chunk.start, *(0 for _ in inner)))
        for chunk, tensor in boxes
        for p in tensor.layout.pieces
    )
    layout = Layout((*entry.shape, *inner), pieces, first.number, first.order, first.bits)
    return boxes, layout


def _tensor(
    entry: Entry,
    boxes: Sequence[_Box],
    layout: Layout,
    siblings: set[str],
    owner: str,
    *,
    several_ranks: bool,
) -> Tensor:
    layer, role = guess(entry.name, layout.number, len(entry.shape), siblings, owner)
    shape, inner = entry.shape, prod(layout.dims[len(entry.shape) :]) // layout.number.parts
    if inner > 1:
        shape = (*shape[:-1], shape[-1] * inner) if shape else (inner,)
    how = f"{len(boxes)} chunks" if len(boxes) > 1 else boxes[0][1].how
    alias = () if entry.full_name == entry.name else (entry.full_name,)
    offset = layout.pieces[0].offset if len(boxes) == 1 else None
    shards = shards_of([c for c, _ in boxes])
    if shards and several_ranks:
        how = f"{how}, {_ranks({s.rank for s in shards})}"
    return Tensor(entry.name, shape, layout.number, layout.order, layer, role, alias, how, offset, shards)


def shards_of(chunks: Sequence[Chunk]) -> tuple[Shard, ...]:
    """Which rank wrote which part, by the files' names; () when a name does not tell."""
    found = [(_rank(c.file), c) for c in chunks]
    shards = tuple(Shard(rank, c.start, c.shape) for rank, c in found if rank is not None)
    return shards if len(shards) == len(found) else ()


@lru_cache(4096)
def _rank(file: str) -> int | None:
    named = _RANK.fullmatch(file)
    return int(named[1]) if named else None


def _ranks(ranks: Collection[int]) -> str:
    """Ranks in words.

    Example:
        >>> _ranks({3}), _ranks({0, 1, 2, 5}), _ranks(range(0, 20, 2))
        ('rank 3', 'ranks 0-2, 5', 'ranks 0, 2, 4 … 18')
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [f"{low}-{high}" if high > low else str(low) for low, high in runs]
    some = ", ".join(words) if len(words) <= _MOST_RUNS else f"{', '.join(words[:3])} … {words[-1]}"
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}"


def _check_cover(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> None:
    """Make sure that boxes cover a tensor, each element once.

    The corners of a box, with signs that alternate along each axis, determine it. So boxes that cover the
    whole exactly have the corners of the whole, after those of opposite signs have cancelled.

    Raises:
        _LeftOut: they do not.
    """
    cut = [i for i, n in enumerate(shape) if any(box[1][i] != n for box in boxes)]
    if len(boxes) << len(cut) > _MOST_CORNERS:
        raise _LeftOut(f"its {len(boxes)} chunks are cut along too many axes")
    corners: Counter[str] = Counter()
    for start, lengths in boxes:
        _count(corners, [(start[i], start[i] + lengths[i]) for i in cut], 1)
    _count(corners, [(0, shape[i]) for i in cut], -1)
    if any(corners.values()):
        covered = sum(prod(lengths) for _, lengths in boxes)
        what = "overlap" if covered >= prod(shape) else f"hold {covered} of its {prod(shape)} elements"
        raise _LeftOut(f"its chunks {what}")


def _count(corners: Counter[str], ends: Iterable[tuple[int, int]], sign: int) -> None:
    for corner in product(*[((low, 1), (high, -1)) for low, high in ends]):
        corners[",".join(str(at) for at, _ in corner)] += sign * prod(s for _, s in corner)
