"""Picking one checkpoint out of many by its epoch: from a folder, or by a pattern of names."""

from __future__ import annotations

import re
from pathlib import Path

from ckptflip.checkpoints.markers import is_checkpoint, main_file
from ckptflip.errors import CheckpointError, UsageError

_FIELD = re.compile(r"\{epoch(?::(0?\d*)d)?\}")
_NUMBER = re.compile(r"(?:epoch|ep|e)?[_\-.=]?(\d+)$", re.IGNORECASE)
# One of the files of a set, not a checkpoint of an epoch.
_SHARD = re.compile(r"-\d+-of-\d+|_\d{5}\.weights\.h5$")
_SUFFIXES = frozenset(
    (
        *(".h5", ".hdf5", ".hdf", ".he5", ".keras", ".pt", ".pth", ".ckpt", ".bin", ".safetensors"),
        *(".npz", ".npy", ".gguf", ".onnx", ".index"),
    )
)
# Endings of several parts, the whole of which is no part of the name.
_LONG_SUFFIXES = (".weights.h5", ".weights.json", ".safetensors.index.json", ".bin.index.json")


def is_many(checkpoint: str | Path) -> bool:
    """Whether a name stands for several checkpoints: a folder of them, or a pattern with ``{epoch}``."""
    path = Path(checkpoint)
    return _FIELD.search(str(checkpoint)) is not None or (path.is_dir() and not is_checkpoint(path))


def pick(checkpoint: str | Path, epoch: int | None) -> Path:
    """The checkpoint of an epoch.

    Args:
        checkpoint: a folder of checkpoints whose names end in their epoch (``epoch_005.h5``, ``step_5/``), or
            a pattern such as ``runs/ckpt_{epoch:03d}.h5``.
        epoch: which one.

    Raises:
        UsageError: no epoch was given, or a negative one.
        CheckpointError: there is none of this epoch, or more than one.

    Example:
        >>> str(pick("runs/ckpt_{epoch:03d}.h5", 5))
        Traceback (most recent call last):
        ckptflip.errors.CheckpointError: runs/ckpt_005.h5 does not exist
    """
    if epoch is not None and epoch < 0:
        raise UsageError(f"epoch must be 0 or more, not {epoch}")
    text = str(checkpoint)
    if _FIELD.search(text):
        if epoch is None:
            raise UsageError(f"{text} is a pattern: say which epoch with --epoch N")
        path = Path(_FIELD.sub(lambda m: format(epoch, f"{m.group(1) or ''}d"), text))
        if not path.exists() and not path.with_name(f"{path.name}.index").exists():
            raise CheckpointError(f"{path} does not exist")
        return path
    return _in_folder(Path(checkpoint), epoch)


def _in_folder(folder: Path, epoch: int | None) -> Path:
    by_epoch: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        number = None if _SHARD.search(path.name) else _NUMBER.search(_stem(path))
        if number and (is_checkpoint(path) if path.is_dir() else path.suffix in _SUFFIXES | {".json"}):
            by_epoch.setdefault(int(number.group(1)), []).append(path)
    there = (
        f"there are epochs {_ranges(sorted(by_epoch))}"
        if by_epoch
        else "nothing in it is named after an epoch"
    )
    inside = main_file(folder)
    if not by_epoch and inside is not None:
        raise UsageError(f"{folder} is a model's folder: name {inside}")
    if epoch is None:
        raise UsageError(f"{folder} is a folder: say which checkpoint with --epoch N ({there})")
    found = by_epoch.get(epoch, [])
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint of epoch {epoch}; {there}")
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} has several of epoch {epoch} ({', '.join(p.name for p in found)}); name one"
        )
    return found[0]


def _stem(path: Path) -> str:
    """The name without its ending, whose parts may be several."""
    for suffix in _LONG_SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.name if path.is_dir() else path.stem


def _ranges(numbers: list[int]) -> str:
    """Whole numbers in words: 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
