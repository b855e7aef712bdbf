"""What makes a folder a checkpoint: the files by which each format is known."""

from __future__ import annotations

from pathlib import Path

# A folder is a checkpoint of the first format one of whose markers it holds.
FOLDERS = (
    (".metadata", "torch distributed"),
    ("saved_model.pb", "tensorbundle"),
    ("_CHECKPOINT_METADATA", "orbax"),
    ("manifest.ocdbt", "orbax"),
    ("_METADATA", "orbax"),
    ("zarr.json", "zarr"),
    (".zgroup", "zarr"),
    (".zarray", "zarr"),
)

# What holds a model's weights in a folder of settings, vocabularies and licences; an index before its shards.
_MAIN_FILES = (
    *("*.safetensors.index.json", "*.bin.index.json", "*.weights.json"),
    *("*.safetensors", "pytorch_model*.bin"),
)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, not a folder of several."""
    return any((folder / marker).exists() for marker, _ in FOLDERS) or is_old_orbax(folder)


def is_old_orbax(folder: Path) -> bool:
    """Whether a folder holds items of Orbax, one folder each, and nothing else that says so."""
    if not any((each / "_METADATA").exists() for each in folder.iterdir() if each.is_dir()):
        return False
    from ckptflip.checkpoints import orbax

    return orbax.recognises(folder)


def main_file(folder: Path) -> Path | None:
    """The one file of a model's folder that stands for its weights; None where there is none, or more."""
    for pattern in _MAIN_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    return None
