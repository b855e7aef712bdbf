"""An Orbax folder as a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec.structs import replace

from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.orbax.items import AGGREGATE, TREE, WHOLE, items, plain_files
from ckptflip.checkpoints.orbax.ocdbt import MANIFEST, Database, Ocdbt, read_database
from ckptflip.checkpoints.orbax.tree import Tree, read_tree
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.zarr.chunks import Place, Stored, place_of
from ckptflip.checkpoints.zarr.folder import V2, V3, find
from ckptflip.checkpoints.zarr.metadata import LONGEST, UnsupportedError, read_v2, read_v3
from ckptflip.checkpoints.zarr.target import laid_out
from ckptflip.checkpoints.zarr.values import Value
from ckptflip.errors import CheckpointError


def recognises(folder: Path) -> bool:
    """Whether a folder is one Orbax checkpoint: not several, one for each step."""
    return bool(items(folder))


def open_checkpoint(path: Path) -> LaidOut:
    """Open an Orbax folder.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
        MissingExtraError: TensorStore is missing, and the checkpoint is an OCDBT database.
    """
    found = items(path)
    if not found:
        raise CheckpointError(
            f"{path} is no Orbax checkpoint: neither it nor a folder in it has {TREE} or {MANIFEST}. Of a "
            "training with several checkpoints, name the folder of one step"
        )
    files = [path / WHOLE] if (path / WHOLE).is_file() else []
    arrays: dict[str, list[Stored]] = {}
    skipped: list[Skipped] = []
    for item in found:
        try:
            arrays[item], left_out = _item(path, item, files)
        except DamagedError as why:
            raise CheckpointError(f"{path / item} is damaged: {why}") from None
        skipped += [replace(s, name=f"{item}/{s.name}") if len(found) > 1 else s for s in left_out]
    if not files:
        raise CheckpointError(
            f"{path} cannot be altered: its files are links; put the files themselves there"
        )
    if len(found) == 1:
        return laid_out(path, "orbax", files, arrays[found[0]], skipped)
    named = [replace(a, name=f"{item}/{a.name}") for item, several in arrays.items() for a in several]
    return laid_out(path, "orbax", files, named, skipped)


def _item(root: Path, below: str, files: list[Path]) -> tuple[list[Stored], list[Skipped]]:
    """The arrays of one tree. Its files are added to those of the checkpoint."""
    base = root / below
    sizes = plain_files(root, below)
    tree = read_tree(_content(base / TREE, sizes[TREE])) if TREE in sizes else Tree({}, [])
    if MANIFEST in sizes:
        first = [n for n in (TREE, MANIFEST) if n in sizes]
        positions = {n: len(files) + i for i, n in enumerate([*first, *(s for s in sizes if s not in first)])}
        files.extend(base / n for n in positions)
        database = read_database(base, {n: (positions[n], size) for n, size in sizes.items()})
        store = Ocdbt(files, below, database.inline)
        skipped = list(tree.skipped)
        found = list(_arrays(database, store, skipped))
    elif any(n.startswith("ocdbt.process_") for n in sizes):
        raise DamagedError(f"it has parts of OCDBT databases, but no {MANIFEST}: saving was never finished")
    else:
        if TREE in sizes:
            files.append(base / TREE)
        listed = find(root, below, len(files))
        files.extend(listed.files)
        found, skipped = listed.arrays, [*tree.skipped, *listed.skipped]
    if AGGREGATE in sizes:
        skipped.append(Skipped(AGGREGATE, "values in one msgpack file, as old versions of Orbax write them"))
    return _renamed(found, tree, skipped), skipped


def _renamed(found: list[Stored], tree: Tree, skipped: list[Skipped]) -> list[Stored]:
    """Arrays under the names of the tree's leaves; leaves without an array are listed as left out."""
    there = {a.name for a in found} | {s.name for s in skipped}
    missing = [n for array, n in tree.names.items() if array not in there]
    skipped.extend(Skipped(n, "no array in the checkpoint holds it") for n in missing)
    wanted = [tree.names.get(a.name, a.name.replace(".", "/")) for a in found]
    twice = {n for n, count in Counter(wanted).items() if count > 1}
    return [replace(a, name=a.name if n in twice else n) for a, n in zip(found, wanted, strict=True)]


def _arrays(database: Database, store: Ocdbt, skipped: list[Skipped]) -> Iterator[Stored]:
    """The arrays whose metadata and chunks are values of a database."""
    below: dict[str, dict[str, Value]] = {
        key.rpartition("/")[0]: {} for key in database.values if key.rpartition("/")[2] in (V2, V3)
    }
    for key, value in database.values.items():
        owner = _owner(key, below)
        if owner is not None:
            below[owner][key[len(owner) + 1 :] if owner else key] = value
    for owner in sorted(below):
        values = below[owner]
        version = V3 if V3 in values else V2
        try:
            raw = store.read(values[version], 0, min(values[version].size, LONGEST))
            header = read_v3(raw) if version == V3 else read_v2(raw)
        except UnsupportedError as why:
            skipped.append(Skipped(owner, str(why)))
            continue
        except DamagedError as why:
            raise DamagedError(f"{owner}/{version}: {why}") from None
        if header is not None:
            places: dict[Place, Value] = {}
            for key, value in values.items():
                place = place_of(header, key)
                if place is not None:
                    places[place] = value
            yield Stored(owner or "array", header, f"{owner}/" if owner else "", places, store)


def _owner(key: str, arrays: Mapping[str, object]) -> str | None:
    """The array that a key lies in."""
    while key:
        key = key.rpartition("/")[0]
        if key in arrays:
            return key
    return None


def _content(path: Path, size: int) -> bytes:
    if size > LONGEST:
        raise DamagedError(f"{path.name} is longer than {LONGEST} bytes")
    try:
        return path.read_bytes()
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
