"""A TensorBundle as a checkpoint: an index that says where each tensor lies, and data files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.pieces import Layout
from ckptflip.checkpoints.protobuf import ProtobufError, varint
from ckptflip.checkpoints.target import Checkpoint, NewFile, Skipped
from ckptflip.checkpoints.tensorbundle import graph, naming, places
from ckptflip.checkpoints.tensorbundle.entries import Index, read_index
from ckptflip.checkpoints.tensorbundle.places import Placed, as_text
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor

SUFFIX = ".index"
_VARIABLES = Path("variables") / f"variables{SUFFIX}"
# A hundred thousand tensors take some 6 MB in the index, and as much in the graph.
_LARGEST_INDEX = 1 << 25
_LARGEST_GRAPH = 1 << 24
# So many data files are looked for; of more, only those that an entry names.
_MOST_LOOKED_FOR = 10_000


def index_of(path: Path) -> Path | None:
    """The index of the bundle that a path names: a prefix, the index itself, or a SavedModel's folder.

    Returns:
        The index, which may be damaged or missing; None if the path names no bundle.
    """
    if path.is_dir():
        is_model = any((path / f"saved_model.{kind}").is_file() for kind in ("pb", "pbtxt"))
        return path / _VARIABLES if is_model else None
    if path.name.endswith(SUFFIX):
        return path
    index = path.with_name(path.name + SUFFIX) if path.name else path
    return index if not path.exists() and index.is_file() else None


def siblings(index: Path) -> list[Path]:
    """All files of the set that an index belongs to: the index, and the data files that exist, in order.

    Raises:
        CheckpointError: the index cannot be read or is damaged, or a data file that it names is missing.
    """
    return [index, *_shards(index, _parsed(index)).values()]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a bundle, by its prefix or its index, or the variables of a SavedModel, by its folder.

    Raises:
        CheckpointError: it is damaged, or some of its files are missing.
    """
    index = index_of(path)
    if index is None:
        raise CheckpointError(
            f"{path} is no TensorFlow checkpoint: name its .index file, its prefix or a SavedModel's folder"
        )
    parsed = _parsed(index)
    shards = _shards(index, parsed)
    positions = {shard: i for i, shard in enumerate(shards, 1)}
    try:
        places.check_places(parsed, shards)
        found, skipped = places.placed(parsed, positions)
    except DamagedError as why:
        raise CheckpointError(f"{index} is damaged: {why}") from None
    variables = _graph(parsed, shards)
    if isinstance(variables, str):
        remark = Skipped(as_text(graph.KEY), variables)
        skipped = [s if s.name != remark.name else remark for s in skipped]
        variables = {}
    tensors, layouts, copies = _catalogue(found, variables)
    return LaidOut(
        path,
        "tensorbundle",
        [index, *shards.values()],
        tensors,
        layouts,
        skipped=[*skipped, *copies],
        crcs=places.stored_crcs(parsed, positions),
        folder=path if path.is_dir() else None,
        renaming=partial(_renamed, list(shards), parsed.shards),
    )


def _parsed(index: Path) -> Index:
    try:
        with open_plain(index) as file:
            data = file.read(_LARGEST_INDEX + 1)
    except FileNotFoundError:
        raise CheckpointError(
            f"{index} does not exist: without it nothing says where the tensors lie"
        ) from None
    except OSError as why:
        raise CheckpointError(f"{index} cannot be read: {why.strerror or why}") from None
    if len(data) > _LARGEST_INDEX:
        raise CheckpointError(f"{index} is larger than any TensorFlow index ({_LARGEST_INDEX} bytes)")
    try:
        return read_index(data)
    except DamagedError as why:
        raise CheckpointError(f"{index} is damaged, or no index of a TensorFlow checkpoint: {why}") from None


def _shards(index: Path, parsed: Index) -> dict[int, Path]:
    """The data files by number: those that entries name, and those that merely exist."""
    named = {s.shard: s for s in reversed(parsed.saved) if not s.slices}
    for shard, saved in named.items():
        if not 0 <= shard < parsed.shards:
            where = f"data file {shard} of {parsed.shards}"
            raise CheckpointError(f"{index} is damaged: {as_text(saved.key)!r} would lie in {where}")
    some = range(min(parsed.shards, _MOST_LOOKED_FOR))
    found: dict[int, Path] = {}
    for shard in sorted(named.keys() | set(some)):
        path = _shard(index, shard, parsed.shards)
        if path.is_file():
            found[shard] = path
        elif shard in named:
            key = as_text(named[shard].key)
            raise CheckpointError(
                f"{path} does not exist, and {key!r} lies in it; put it beside {index.name}"
            )
    return found


def _shard(index: Path, shard: int, shards: int) -> Path:
    prefix = index.name.removesuffix(SUFFIX)
    return index.with_name(f"{prefix}.data-{shard:05d}-of-{shards:05d}")


def _renamed(shards: Iterable[int], count: int, out: Path) -> Sequence[NewFile]:
    """The files of a bundle under another prefix, or under that of another index."""
    index = out if out.name.endswith(SUFFIX) else out.with_name(out.name + SUFFIX)
    return [NewFile(index), *(NewFile(_shard(index, shard, count)) for shard in shards)]


def _catalogue(
    found: Sequence[Placed], variables: dict[str, graph.Variable]
) -> tuple[list[Tensor], list[Layout], list[Skipped]]:
    """The tensors, where their words lie, and the copies that nothing uses."""
    keys = [naming.Key(f.key, f.layout.number, f.shape) for f in found]
    tensors: list[Tensor] = []
    layouts: list[Layout] = []
    copies: list[Skipped] = []
    for each, named in zip(found, naming.named(keys, variables), strict=True):
        layout = each.layout
        if named.copy_of:
            why = f"a second copy of {named.copy_of} that loading does not use"
            copies.append(Skipped(named.name, why))
            continue
        offset = layout.pieces[0].offset if len(layout.pieces) == 1 else None
        layouts.append(layout)
        tensors.append(
            Tensor(
                named.name,
                each.shape,
                layout.number,
                layout.order,
                named.layer,
                named.role,
                named.aliases,
                each.how,
                offset,
            )
        )
    return tensors, layouts, copies


def _graph(parsed: Index, shards: dict[int, Path]) -> dict[str, graph.Variable] | str:
    """What the graph says of each variable; or why it says nothing."""
    saved = next((s for s in parsed.saved if s.key == graph.KEY), None)
    if saved is None or saved.dtype != places.STRING or saved.shape or saved.slices:
        return {}
    if saved.size > _LARGEST_GRAPH:
        return f"strings; too large to look for names in it ({saved.size} bytes)"
    try:
        with open_plain(shards[saved.shard]) as file:
            file.seek(saved.offset)
            data = file.read(saved.size)
        # A length, a checksum of the length, and the text.
        length, at = varint(data, 0, len(data))
        if at + 4 + length != len(data):
            raise ProtobufError("its length is wrong")
        return graph.variables(data[at + 4 :])
    except (DamagedError, ProtobufError, OSError) as why:
        return f"strings; damaged, so that tensors go by their keys alone ({why})"
