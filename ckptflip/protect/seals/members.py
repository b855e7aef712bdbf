"""Which files belong to a checkpoint, as its seal names them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from ckptflip.checkpoints import Checkpoint, opened
from ckptflip.checkpoints.markers import is_checkpoint
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.protect.seals.sidecar import Header, is_inside

# Words that say that an HDF5 dataset's data lies in other files, which the checkpoint does not list.
_ELSEWHERE = ("external", "virtual")


class Members(Struct, frozen=True):
    """The files of a checkpoint.

    Attributes:
        path: the checkpoint, beside which its seal lies.
        format: its format's short name.
        kind: ``file``, ``files`` or ``folder``.
        names: of the files, with slashes, relative to `root`.
        root: the folder that they are in.
    """

    path: Path
    format: str
    kind: str
    names: Sequence[str]
    root: Path

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]


@contextmanager
def members(checkpoint: Path) -> Iterator[Members]:
    """The files of a checkpoint, under its locks. A folder of any other kind counts with all that is in it.

    Raises:
        CheckpointError: it is missing, damaged, in use, of an unknown format, or partly lies elsewhere.
        UsageError: an empty folder.
    """
    if checkpoint.is_dir() and not is_checkpoint(checkpoint):
        yield _of_folder(checkpoint, "folder")
        return
    with opened(checkpoint) as target:
        if target.folder is not None:
            yield _of_folder(target.folder, target.format)
            return
        _check_here(target)
        if len(target.files) == 1:
            yield Members(target.path, target.format, "file", [target.path.name], target.path.parent)
            return
        root = target.files[0].parent
        # The index file: a prefix stands for several files, and is none.
        path = target.path if target.path.is_file() else target.files[0]
        yield Members(path, target.format, "files", [_name(f, root) for f in target.files], root)


def paths_of(header: Header, checkpoint: Path) -> tuple[list[Path], Path]:
    """The sealed files as they should be, and the folder that they are in.

    A single file, or a folder, may have been renamed since.
    """
    if header.kind == "file":
        return [checkpoint], checkpoint.parent
    root = checkpoint if header.kind == "folder" else checkpoint.parent
    return [root / name for name, _ in header.files], root


def walked(folder: Path) -> list[str]:
    """The names of all files below a folder, sorted.

    Raises:
        CheckpointError: a folder in it is a link, or something in it is neither a file nor a folder.
    """
    found: list[str] = []
    for here, below, names in os.walk(folder, onerror=_unreadable):
        for name in below:
            if (Path(here) / name).is_symlink():
                raise CheckpointError(
                    f"{Path(here) / name} is a link to a folder; put the folder in its place"
                )
        for name in names:
            path = Path(here) / name
            if not path.is_file():
                raise CheckpointError(f"{path} is neither a file nor a folder, or a link to nothing")
            found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _of_folder(folder: Path, form: str) -> Members:
    names = walked(folder)
    if not names:
        raise UsageError(f"{folder} holds no files: there is nothing to seal")
    return Members(folder, form, "folder", names, folder)


def _check_here(target: Checkpoint) -> None:
    """Refuse data that the checkpoint's own files do not hold: it would look sealed."""
    for tensor in target.tensors:
        if any(word in tensor.layout for word in _ELSEWHERE) and target.format in ("hdf5", "keras"):
            raise CheckpointError(
                f"{target.path} keeps {tensor.name} in other files ({tensor.layout}), which its seal would "
                "not cover. Put all into one folder and seal the folder"
            )


def _name(file: Path, root: Path) -> str:
    name = Path(os.path.relpath(file, root)).as_posix()
    if not is_inside(name):
        raise CheckpointError(
            f"{file} lies outside of {root}, the folder of the checkpoint: it cannot be sealed"
        )
    return name


def _unreadable(why: OSError) -> None:
    raise CheckpointError(f"{why.filename} cannot be read: {why.strerror}")
