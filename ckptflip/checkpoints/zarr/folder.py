"""Finding zarr arrays in a folder: each folder is listed once, and links are not followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.zarr.chunks import Place, Stored, place_of
from ckptflip.checkpoints.zarr.metadata import LONGEST, ArrayHeader, UnsupportedError, read_v2, read_v3
from ckptflip.checkpoints.zarr.values import Folder, Value
from ckptflip.errors import CheckpointError

V3 = "zarr.json"
V2 = ".zarray"
V2_GROUP = ".zgroup"
# Where there are several, the first counts.
_METADATA = (V3, V2, V2_GROUP)
_DEEPEST = 100
# The name of the only array of a checkpoint that is one: not the folder's, since copies have other names.
LONE_ARRAY = "array"


class Found(Struct, frozen=True):
    """What a folder holds.

    Attributes:
        files: metadata and chunks, in the order of their names.
        arrays: what can be altered, in the order of their names.
        skipped: what cannot.
    """

    files: list[Path]
    arrays: list[Stored]
    skipped: list[Skipped]


def find(root: Path, below: str = "", first: int = 0) -> Found:
    """List the arrays of a folder.

    Args:
        root: the checkpoint's folder.
        below: the folder to list, from there.
        first: how many files of the checkpoint come before.

    Raises:
        CheckpointError: a folder or metadata cannot be read, or say what cannot be true.
    """
    found = Found([], [], [])
    store = Folder(root)
    start = f"{below}/" if below else ""
    waiting = [""]
    while waiting:
        here = waiting.pop()
        if here.count("/") > _DEEPEST:
            raise CheckpointError(f"{root / start / here} lies more than {_DEEPEST} folders deep")
        entries = _listed(root / start / here)
        metadata = next((m for m in _METADATA if m in entries), None)
        try:
            header = _header(root / start / here / metadata, entries[metadata], found) if metadata else None
        except UnsupportedError as why:
            found.skipped.append(Skipped(_shown(here), str(why)))
            continue
        if header is not None:
            _add(found, header, here, entries, store, (root, start, first))
            continue
        folders = [n for n, e in entries.items() if e.is_dir(follow_symlinks=False)]
        waiting.extend(f"{here}{name}/" for name in sorted(folders, reverse=True))
        linked = sorted(n for n, e in entries.items() if e.is_symlink() and Path(e.path).is_dir())
        found.skipped.extend(Skipped(_shown(f"{here}{name}"), "a link to a folder") for name in linked)
    return found


def _header(path: Path, entry: os.DirEntry[str], found: Found) -> ArrayHeader | None:
    """What a metadata file says; None: it is a group's."""
    if _plain_size(entry) is None:
        raise UnsupportedError(f"{path.name} is a link, or no plain file")
    found.files.append(path)
    if path.name == V2_GROUP:
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise DamagedError(f"it is longer than {LONGEST} bytes")
        return read_v3(raw) if path.name == V3 else read_v2(raw)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
    except DamagedError as why:
        raise CheckpointError(f"{path} is damaged: {why}") from None


def _add(
    found: Found,
    header: ArrayHeader,
    here: str,
    entries: dict[str, os.DirEntry[str]],
    store: Folder,
    where: tuple[Path, str, int],
) -> None:
    """Take in an array with its chunk files."""
    root, start, first = where
    prefix = f"{start}{here}"
    base = root / prefix
    values: dict[Place, Value] = {}
    for key, entry in _chunk_files(base, entries, len(header.shape) + 1):
        place = place_of(header, key)
        if place is None and not entry.is_symlink():
            continue
        size = _plain_size(entry)
        if size is None or place is None:
            found.skipped.append(Skipped(_shown(here), f"{key} is a link, or no plain file"))
            return
        values[place] = Value(f"{prefix}{key}", first + len(found.files), 0, size)
        found.files.append(base / key)
    found.arrays.append(Stored(_shown(here), header, prefix, values, store))


def _chunk_files(
    base: Path, entries: dict[str, os.DirEntry[str]], depth: int
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What lies in an array's folder and is no folder itself: key and entry."""
    waiting = [("", entries)]
    while waiting:
        here, listed = waiting.pop()
        for name in sorted(listed, reverse=True):
            entry = listed[name]
            if not entry.is_dir(follow_symlinks=False):
                yield f"{here}{name}", entry
            elif here.count("/") < depth:
                waiting.append((f"{here}{name}/", _listed(base / here / name)))


def _listed(folder: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except OSError as why:
        raise CheckpointError(f"{folder} cannot be listed: {why.strerror}") from None


def _plain_size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a plain file; None for anything else, links among them."""
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
    except OSError as why:
        raise CheckpointError(f"{entry.path} cannot be read: {why.strerror}") from None


def _shown(here: str) -> str:
    """The name of an array in a catalogue."""
    name = os.fsencode(here.rstrip("/")).decode("utf-8", "backslashreplace")
    return name or LONE_ARRAY
