"""What an Orbax folder holds: one tree, or several items in folders of their own."""

from __future__ import annotations

import os
from pathlib import Path

from ckptflip.checkpoints.orbax.ocdbt import MANIFEST
from ckptflip.errors import CheckpointError

TREE = "_METADATA"
# Beside all items of a checkpoint, or beside the only one's tree.
WHOLE = "_CHECKPOINT_METADATA"
# Where old versions kept small values, beside zarr folders.
AGGREGATE = "checkpoint"
_DEEPEST = 16


def items(folder: Path) -> list[str]:
    """The folders of the trees in a checkpoint: "" for the folder itself, names for folders in it.

    Nothing for a folder of several checkpoints, or of none.
    """
    if _is_item(folder):
        return [""]
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    # What is numbered are the steps of a training, each a checkpoint.
    return [
        n for n in names if not n.isdecimal() and not (folder / n / WHOLE).exists() and _is_item(folder / n)
    ]


def _is_item(folder: Path) -> bool:
    if (folder / TREE).is_file() or (folder / MANIFEST).is_file():
        return True
    return (folder / AGGREGATE).is_file() and any(True for _ in folder.glob("*/.zarray"))


def plain_files(root: Path, below: str) -> dict[str, int]:
    """The files of an item, by their path from its folder, with their sizes. Links are left out.

    Raises:
        CheckpointError: a folder cannot be listed.
    """
    base = root / below
    found: dict[str, int] = {}
    waiting = [""]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(base / here) as entries:
                for entry in entries:
                    name = f"{here}{entry.name}"
                    if entry.is_dir(follow_symlinks=False) and here.count("/") < _DEEPEST:
                        waiting.append(f"{name}/")
                    elif entry.is_file(follow_symlinks=False):
                        found[name] = entry.stat(follow_symlinks=False).st_size
        except OSError as why:
            raise CheckpointError(f"{base / here} cannot be listed: {why.strerror}") from None
    return dict(sorted(found.items()))
