"""PyTorch's zip files (``.pt``, ``.pth``, ``.ckpt``, ``.bin``): a pickle, and one stored member per storage.

Neither PyTorch nor a pickle's code is run. Source of the layout: ``torch/serialization.py``, and
``caffe2/serialize/inline_container.h`` for the archive, at version 2.13.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.stored_crcs import StoredCrc
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.torch_zip.exported import exported_trees
from ckptflip.checkpoints.torch_zip.names import unique
from ckptflip.checkpoints.torch_zip.pickles import parse, parse_bytes
from ckptflip.checkpoints.torch_zip.sharing import Shared, Sharing, Storage
from ckptflip.checkpoints.torch_zip.slots import parameter_names
from ckptflip.checkpoints.torch_zip.trees import Tree, View, tensors_in
from ckptflip.checkpoints.zips import STORED, Member, Members, members
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor

_LARGEST_DEFLATED_PICKLE = 1 << 28
_ORDERS = {b"little": "<", b"big": ">"}


class Contents(Struct, frozen=True):
    """What an archive holds.

    Attributes:
        tensors: in the order of their first names.
        skipped: what is left out.
        crcs: the CRC-32 of each storage that holds words of a tensor.
        parameters: for tensors of an optimizer's state, the parameter's name, by the tensor's name.
    """

    tensors: list[Shared]
    skipped: list[Skipped]
    crcs: list[StoredCrc]
    parameters: dict[str, str]


def open_checkpoint(path: Path) -> LaidOut:
    """Open a PyTorch zip file.

    Raises:
        CheckpointError: it cannot be read, is truncated, damaged, or no file that PyTorch saved.
    """
    try:
        with open_plain(path) as file:
            found = contents(file.fileno(), path)
    except OSError as why:
        raise CheckpointError(f"{path} cannot be read: {why.strerror or why}") from None
    layouts = [t.layout for t in found.tensors]
    return LaidOut(
        path,
        "pytorch",
        [path],
        catalogue(found.tensors, found.parameters),
        layouts,
        skipped=found.skipped,
        crcs=found.crcs,
    )


def contents(
    fd: int, where: Path | str, *, file: int = 0, start: int = 0, length: int | None = None
) -> Contents:
    """What an archive, or one that is a part of a file, holds.

    Args:
        fd: the file, open for reading.
        where: its name, for messages.
        file: its position in the checkpoint's list of files.
        start: where the archive begins in it.
        length: the archive's bytes; None: up to the end.

    Raises:
        CheckpointError: damaged, or no archive of PyTorch's.
    """
    archive = members(fd, where, start=start, length=length)
    first = next(iter(archive), "")
    # The name of the folder that holds all is arbitrary: that of the file, by default.
    root = first[: first.find("/") + 1]
    try:
        trees = _named_once(_trees(fd, archive, root, where))
        stored = _Stored(archive, file, _byte_order(archive, root, where))
        for tree, folder in trees:
            stored.add(tree, f"{root}{folder}/")
    except DamagedError as why:
        raise CheckpointError(f"{where} is damaged: {why}. Copy or download it again") from None
    parameters = {name: value for tree, _ in trees for name, value in parameter_names(tree).items()}
    skipped = [s for tree, _ in trees for s in tree.skipped]
    skipped += [
        Skipped(name, f"another view of the words of {each.view.name}, which stands for them")
        for each in stored.tensors
        for name in each.views
    ]
    return Contents(stored.tensors, [*skipped, *stored.skipped], stored.crcs, parameters)


def catalogue(tensors: Sequence[Shared], parameters: dict[str, str]) -> list[Tensor]:
    """The catalogue's entries, with guessed layers and roles."""
    groups: dict[str, set[str]] = {}
    for each in tensors:
        group, _, leaf = each.view.name.rpartition("/")
        groups.setdefault(group, set()).add(leaf)
    found = []
    for each in tensors:
        name, number, layout = each.view.name, each.layout.number, each.layout
        siblings = groups[name.rpartition("/")[0]]
        layer, role = guess(name, number, len(each.view.shape), siblings, parameters.get(name, ""))
        offset = layout.pieces[0].offset if prod(each.shape) else None
        entry = Tensor(name, each.shape, number, layout.order, layer, role, each.aliases, each.how, offset)
        found.append(entry)
    return found


def _trees(fd: int, archive: Members, root: str, where: Path | str) -> list[tuple[Tree, str]]:
    """The tensors of each pickle, and the folder of its storages. TorchScript has one of constants too."""
    if f"{root}data.pkl" not in archive:
        trees = exported_trees(archive, root)
        if not trees:
            raise CheckpointError(
                f"{where} holds no {root}data.pkl, so torch.save did not write it, and no tensors of an "
                "exported program; save the model's state_dict with torch.save"
            )
        return trees
    trees = [(tensors_in(_pickle(fd, archive, f"{root}data.pkl", where)), "data")]
    if f"{root}constants.pkl" in archive:
        constants = _pickle(fd, archive, f"{root}constants.pkl", where)
        trees.append((tensors_in(constants, "constants"), "constants"))
    return trees


def _pickle(fd: int, archive: Members, name: str, where: Path | str) -> Any:
    member = archive[name]
    if member.method != STORED:
        return parse_bytes(archive.read(name, _LARGEST_DEFLATED_PICKLE), f"{where} ({name})")

    def read(at: int, count: int) -> bytes:
        return os.pread(fd, max(0, min(count, member.size - at)), member.offset + at)

    return parse(read, member.size, f"{where} ({name})")


def _named_once(trees: list[tuple[Tree, str]]) -> list[tuple[Tree, str]]:
    """The same with unique names."""
    names = iter(unique(view.name for tree, _ in trees for view in tree.views))
    found = []
    for tree, folder in trees:
        named = [(view, next(names)) for view in tree.views]
        views = [view if view.name == name else structs.replace(view, name=name) for view, name in named]
        found.append((Tree(views, tree.skipped, tree.optimizers), folder))
    return found


def _byte_order(archive: Members, root: str, where: Path | str) -> str:
    """The order of bytes in the storages; files of before PyTorch 2.1 do not say, and are little-endian."""
    name = f"{root}byteorder"
    if name not in archive:
        return "<"
    stated = archive.read(name, 64)
    if stated not in _ORDERS:
        raise CheckpointError(f"{where} is damaged: its byte order is said to be {stated!r}")
    return _ORDERS[stated]


class _Stored:
    """Tensors and CRCs, from the members that hold the storages."""

    def __init__(self, archive: Members, file: int, order: str) -> None:
        self.tensors: list[Shared] = []
        self.skipped: list[Skipped] = []
        self.crcs: list[StoredCrc] = []
        self._archive = archive
        self._file = file
        self._order = order
        self._sharing = Sharing()

    def add(self, tree: Tree, folder: str) -> None:
        """Take in the tensors whose storages lie in a folder."""
        by_storage: dict[str, list[View]] = {}
        for view in tree.views:
            by_storage.setdefault(view.storage, []).append(view)
        found: dict[str, Shared] = {}
        for key, views in by_storage.items():
            member = self._archive[folder + key]
            if member.method != STORED:
                reason = "its storage is compressed; torch.load it and torch.save it again"
                self.skipped += [Skipped(v.name, reason) for v in views]
                continue
            storage = Storage(self._file, member.offset, member.size, self._order)
            found.update((t.view.name, t) for t in self._sharing.tensors(views, storage))
            self.crcs.append(self._crc(member))
        self.tensors += [found[v.name] for v in tree.views if v.name in found]

    def _crc(self, member: Member) -> StoredCrc:
        places = tuple((self._file, at) for at in member.crc_places)
        return StoredCrc("crc32", self._file, member.offset, member.size, places, zero_is_none=True)
