"""OCDBT databases, where Orbax keeps the values of zarr arrays: where each lies, and giving some new ones.

TensorStore reads the tree of keys (its nodes are compressed and carry a CRC-32C each). A value lies as it is
in a data file, or, when it is small, in the node that holds its key.

Source: the documentation of TensorStore's ``ocdbt`` driver and of ``tensorstore.ocdbt.dump``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError, check_apart
from ckptflip.checkpoints.orbax.nodes import decoded_bound
from ckptflip.checkpoints.zarr.values import Value, Writer
from ckptflip.errors import CheckpointError, MissingExtraError

MANIFEST = "manifest.ocdbt"
_HIGHEST = 32
# Keys and small values of a checkpoint together; Orbax lets a node have 100 MB.
_MOST_DECODED = 1 << 29


class Database(Struct, frozen=True):
    """The newest version of a database.

    Attributes:
        values: by key. Those that lie in a node have no file, and their bytes in `inline`.
        inline: the bytes of small values, by key.
    """

    values: dict[str, Value]
    inline: dict[str, bytes]


def read_database(folder: Path, files: Mapping[str, tuple[int, int]]) -> Database:
    """Find all values.

    Args:
        folder: where the database is.
        files: the plain files in it, by their path from there: position among the checkpoint's files and
            size.

    Raises:
        MissingExtraError: TensorStore is missing.
        DamagedError: the database is damaged, or refers to other files.
    """
    base = _opened({"driver": "file", "path": f"{folder.resolve()}/"})
    left = _MOST_DECODED - _bound(folder / MANIFEST, 0, files[MANIFEST][1])
    versions = _dumped(base, None).get("versions")
    if not versions:
        raise DamagedError(f"{MANIFEST} lists no version (or others do, which is not supported)")
    root = versions[-1]["root"].get("location")
    found = Database({}, {})
    spans: dict[int, list[tuple[int, int, str]]] = {}
    waiting = [] if root is None else [(root, b"", versions[-1]["root_height"])]
    seen: set[str] = set()
    while waiting:
        location, prefix, height = waiting.pop()
        _, offset, length = _place(location, "btreenode", files)
        left -= _bound(folder / _path(location), offset, length)
        if location in seen or left < 0 or not 0 <= height <= _HIGHEST:
            raise DamagedError(f"its tree of keys has a loop, or more than {_MOST_DECODED} bytes")
        seen.add(location)
        node = _dumped(base, location)
        if node["height"] != height:
            raise DamagedError("its tree of keys is not as high as it says")
        for entry in node["entries"]:
            if height:
                below = prefix + entry.get("subtree_common_prefix", b"")
                waiting.append((entry["location"], below, height - 1))
            else:
                _take(found, spans, prefix + entry.get("key", b""), entry, files)
    for ranges in spans.values():
        check_apart(ranges)
    return found


def _take(
    found: Database,
    spans: dict[int, list[tuple[int, int, str]]],
    raw: bytes,
    entry: Mapping[str, Any],
    files: Mapping[str, tuple[int, int]],
) -> None:
    """Take in one key."""
    try:
        key = raw.decode()
    except UnicodeDecodeError:
        raise DamagedError(f"its tree has a key that is no text ({raw[:60]!r})") from None
    if key in found.values:
        raise DamagedError(f"its tree has {key[:100]!r} twice")
    if "inline_value" in entry:
        found.inline[key] = entry["inline_value"]
        found.values[key] = Value(key, -1, 0, len(entry["inline_value"]))
        return
    file, offset, length = _place(entry["indirect_value"], "value", files)
    spans.setdefault(file, []).append((offset, offset + length, key))
    found.values[key] = Value(key, file, offset, length)


def _place(location: str, kind: str, files: Mapping[str, tuple[int, int]]) -> tuple[int, int, int]:
    """File, offset and length of ``kind:folder:name:offset:length``."""
    parts = location.split(":")
    if len(parts) != 5 or parts[0] != kind or _path(location) not in files:
        raise DamagedError(f"it refers to {location[:200]!r}, which is not in its folder")
    file, size = files[_path(location)]
    offset, length = int(parts[3]), int(parts[4])
    if not (offset >= 0 and 0 <= length <= size - offset):
        raise DamagedError(
            f"{_path(location)} has {size} bytes, and bytes {offset} to {offset + length} are used"
        )
    return file, offset, length


def _path(location: str) -> str:
    """The file of a location."""
    return "".join(location.split(":")[1:-2])


def _bound(path: Path, offset: int, length: int) -> int:
    """Bytes that a node may decode to."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return decoded_bound(file.read(length))
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None


def _tensorstore() -> Any:
    try:
        return import_module("tensorstore")
    except ImportError:
        raise MissingExtraError("tensorstore", "orbax", "an OCDBT database (Orbax)") from None


def _opened(spec: Mapping[str, Any]) -> Any:
    return _tensorstore().KvStore.open(spec).result()


def _dumped(base: Any, location: str | None) -> Any:
    """A node of the tree; None: the manifest."""
    try:
        return _tensorstore().ocdbt.dump(base, location).result()
    except (ValueError, OSError, UnicodeDecodeError, MemoryError) as why:
        raise DamagedError(f"TensorStore cannot read it ({str(why)[:300]})") from None


class Ocdbt:
    """A store whose values are those of a database. See `ckptflip.checkpoints.zarr.values.Store`.

    Args:
        files: all files of the checkpoint.
        below: the database's folder, from the checkpoint's.
        inline: the bytes of values that lie in nodes, by key.
    """

    def __init__(self, files: Sequence[Path], below: str, inline: Mapping[str, bytes]) -> None:
        self._files = files
        self._below = below
        self._inline = inline

    def read(self, value: Value, start: int, length: int) -> bytes:
        """See `Store.read`."""
        if value.file < 0:
            return self._inline[value.key][start : start + length]
        path = self._files[value.file]
        try:
            with path.open("rb") as file:
                file.seek(value.offset + start)
                data = file.read(length)
        except OSError as why:
            raise CheckpointError(f"{path} cannot be read: {why.strerror}") from None
        if len(data) != length:
            raise CheckpointError(f"{path} was truncated while it was read")
        return data

    @contextlib.contextmanager
    def writing(self, root: Path) -> Iterator[Writer]:
        """See `Store.writing`. All new values come with one new version of the database."""
        folder = root / self._below if self._below else root
        try:
            base = {"driver": "file", "path": f"{folder.resolve()}{os.sep}"}
            with _tensorstore().Transaction() as transaction:
                yield _Values(_opened({"driver": "ocdbt", "base": base}).with_transaction(transaction))
        except (ValueError, OSError) as why:
            raise CheckpointError(f"TensorStore cannot write the altered copy: {str(why)[:300]}") from None


class _Values:
    def __init__(self, values: Any) -> None:
        self._values = values

    def read(self, key: str) -> bytes | None:
        found = self._values.read(key).result()
        return bytes(found.value) if found.state == "value" else None

    def write(self, key: str, data: bytes) -> None:
        self._values[key] = data
