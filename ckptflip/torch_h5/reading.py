"""Read a training state back; whatever is wrong with the file becomes one CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py

from ckptflip.errors import CheckpointError
from ckptflip.torch_h5 import arrays, plain
from ckptflip.torch_h5.writing import SCHEMA


def load(path: Path) -> Any:
    """Read the file; nothing in it is executed, and nothing outside it is opened."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        with h5py.File(path, "r") as file:
            schema = file.attrs.get("ckptflip")
            if schema != SCHEMA:
                found = "no such tag" if schema is None else f"the tag {schema!r}"
                raise CheckpointError(f"{path} is not a training state of the form {SCHEMA}: it has {found}")
            return _Reader().container(file)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: its groups are nested without end") from error
    except (
        Exception
    ) as error:  # h5py reports damage as OSError, RuntimeError, KeyError, ValueError, TypeError …
        if not h5py.is_hdf5(path):
            raise CheckpointError(f"{path} is not an HDF5 file, or its start is damaged") from error
        raise CheckpointError(f"{path} is damaged or not complete: {error}") from error


class _Reader:
    """One walk over one file; remembers each dataset, so that hard links become one object."""

    def __init__(self) -> None:
        self._read: dict[int, Any] = {}
        self._groups: set[int] = set()

    def container(self, group: h5py.Group) -> Any:
        address = h5py.h5o.get_info(group.id).addr
        if address in self._groups:
            raise ValueError(f"group {group.name} is linked twice")
        self._groups.add(address)
        kind = group.attrs["container"]
        if kind in ("list", "tuple"):
            items = [self._member(group, str(index)) for index in range(int(group.attrs["length"]))]
            return items if kind == "list" else tuple(items)
        if kind not in plain.DICTS:
            raise ValueError(f"group {group.name} is a container of the unknown kind {kind!r}")
        entries = plain.loads(group.attrs["keys"])
        pairs = [(entry, entry) if isinstance(entry, str) else entry for entry in entries]
        value: Any = plain.DICTS[kind]({key: self._member(group, name) for key, name in pairs})
        if "metadata" in group.attrs:
            value._metadata = plain.loads(group.attrs["metadata"])
        return value

    def _member(self, group: h5py.Group, name: str) -> Any:
        link = group.get(name, getlink=True)
        if link is None:
            return plain.loads(group.attrs[name])
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{group.name}/{name} is a link to elsewhere, which this format never holds")
        member = group[name]
        if isinstance(member, h5py.Group):
            return self.container(member)
        address = h5py.h5o.get_info(member.id).addr
        if address not in self._read:
            self._read[address] = arrays.read(member)
        return self._read[address]
