"""Index files of sharded sets: reading one, finding its shards, and the names of a set under another name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckptflip.checkpoints.files import open_plain
from ckptflip.errors import CheckpointError, UsageError

_LARGEST = 1 << 28


def read(path: Path) -> bytes:
    """An index file's contents.

    Raises:
        CheckpointError: it cannot be read, or is too large for an index.
    """
    try:
        with open_plain(path) as file:
            data = file.read(_LARGEST + 1)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    if len(data) > _LARGEST:
        raise CheckpointError(f"{path} has more than {_LARGEST} bytes: no index of shards")
    return data


def beside(path: Path, name: str) -> Path:
    """The file of a shard: beside the index, perhaps a link to elsewhere, as in Hugging Face's cache.

    Args:
        path: the index.
        name: what it calls the shard.

    Raises:
        CheckpointError: the name leads elsewhere, or there is no such file.
    """
    if name in ("", ".", "..", path.name) or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{path} names the shard {name!r}; only files beside it are read")
    shard = path.with_name(name)
    try:
        found = shard.is_file()
    except OSError:
        found = False
    if not found:
        raise CheckpointError(
            f"{path} names the shard {name}, which is missing. Copy or download the set again"
        )
    return shard


def new_names(path: Path, suffix: str, out: Path, shards: Sequence[str]) -> dict[str, str]:
    """The shards' names in a set whose index is called `out`: they carry that name too.

    Args:
        path: the index now.
        suffix: what the names of such indices end in.
        out: the new index.
        shards: the shards' names now.

    Raises:
        UsageError: `out` is no name of such an index.

    Example:
        >>> new_names(Path("m.index.json"), ".index.json", Path("n.index.json"), ["m-1.bin", "x.bin"])
        {'m-1.bin': 'n-1.bin', 'x.bin': 'n-x.bin'}
    """
    if not out.name.endswith(suffix) or out.name == suffix:
        raise UsageError(f"{path} is an index of shards: name another that ends in {suffix}, not {out.name}")
    old, new = path.name.removesuffix(suffix), out.name.removesuffix(suffix)
    if old == new:
        return {name: name for name in shards}
    names = {n: new + n.removeprefix(old) if n.startswith(old) else f"{new}-{n}" for n in shards}
    if len(set(names.values())) < len(names) or out.name in names.values():
        return {name: f"{new}-{name}" for name in shards}
    return names
