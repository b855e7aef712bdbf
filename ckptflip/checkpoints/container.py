"""The files that make up a checkpoint: copying them under another name, all of them or none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptflip.checkpoints import files
from ckptflip.checkpoints.files import DIGEST_LIMIT, Progress
from ckptflip.checkpoints.markers import is_checkpoint
from ckptflip.checkpoints.target import Checkpoint
from ckptflip.errors import CheckpointError, UsageError

# Endings of several parts, which a loader wants to see whole.
_LONG_SUFFIXES = (
    ".weights.h5",
    ".weights.json",
    ".safetensors.index.json",
    ".bin.index.json",
    ".index",
)


# What an ending promises.
_KINDS = {
    **dict.fromkeys((".h5", ".hdf5", ".hdf", ".he5"), "HDF5"),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin"), "a PyTorch file"),
    ".keras": "a Keras archive",
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".npy": "npy",
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".zarr": "zarr",
}


def flipped_name(path: Path, word: str = "flipped") -> Path:
    """Where an altered checkpoint goes unless told otherwise.

    Args:
        path: the checkpoint.
        word: what its name gets before the suffix.

    Example:
        >>> str(flipped_name(Path("runs/model.weights.h5"))), str(flipped_name(Path("ckpt-5")))
        ('runs/model.flipped.weights.h5', 'ckpt-5.flipped')
    """
    if path.is_dir():
        return path.with_name(f"{path.name}.{word}")
    for suffix in _LONG_SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            return path.with_name(f"{path.name.removesuffix(suffix)}.{word}{suffix}")
    if not path.exists():  # a prefix that stands for several files
        return path.with_name(f"{path.name}.{word}")
    return path.with_name(f"{path.stem}.{word}{path.suffix}")


def size(paths: Sequence[Path]) -> int:
    """Bytes of several files together."""
    return sum(p.stat().st_size for p in paths)


def digest(paths: Sequence[Path], *, limit: int | None = DIGEST_LIMIT) -> str | None:
    """SHA-256 of a file, or of the digests of several in their order; None above `limit` bytes in all."""
    if len(paths) == 1:
        return files.digest(paths[0], limit=limit)
    if limit is not None and size(paths) > limit:
        return None
    import hashlib

    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{files.digest(path, limit=None)}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def names(source: Checkpoint, out: Path) -> list[Path]:
    """What the files of a checkpoint are called under another name, in the order of its files."""
    if source.folder is not None:
        return [out / f.relative_to(source.folder) for f in source.files]
    return [new.path for new in source.renamed(out)]


def check_new(out: Path, *, overwrite: bool, folder: bool) -> None:
    """Raise UsageError unless a checkpoint may be written under this name.

    Args:
        out: the name.
        overwrite: whether what is there may be replaced.
        folder: whether the checkpoint is a folder.
    """
    if not folder:
        files.check_new(out, overwrite=overwrite)
    elif not out.name:
        raise UsageError(f"{str(out)!r} names no folder; name the new checkpoint's folder with -o")
    elif out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and the checkpoint a folder; name another with -o")
    elif out.exists() and not overwrite:
        raise UsageError(f"{out} exists; name another, or replace it with --overwrite")


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that is more than an old checkpoint: deleting it could not be taken back."""
    if not out.is_dir():
        return
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out} holds the working directory; leave it first, or name another folder")
    if any(out.iterdir()) and not is_checkpoint(out):
        raise UsageError(
            f"{out} is a folder, but no checkpoint: it is not replaced, whatever it holds; name another"
        )


@contextlib.contextmanager
def copied(
    source: Checkpoint, out: Path, *, overwrite: bool, progress: Progress | None = None
) -> Iterator[list[Path]]:
    """Copies of a checkpoint's files, which take their names when the block ends well, and else vanish.

    Args:
        source: an open checkpoint.
        out: the new name, of the same kind as the source's; the source's own to replace it.
        overwrite: whether existing files may be replaced.
        progress: told the bytes copied.

    Yields:
        The copies, under temporary names, in the order of the source's files.

    Raises:
        UsageError: files are in the way, or the name is of another kind.
        CheckpointError: something cannot be read or written; no new file is left.
    """
    _check_kind(source, out)
    if source.folder is not None:
        own, wished = source.folder.resolve(), out.resolve()
        if out != source.path and (wished.is_relative_to(own) or own.is_relative_to(wished)):
            raise UsageError(
                f"{out} holds, or lies in, the checkpoint itself, {source.folder}; name a folder beside it"
            )
        with _new_folder(out, source.folder, overwrite=overwrite, progress=progress) as temporary:
            yield [temporary / f.relative_to(source.folder) for f in source.files]
        return
    wanted = source.renamed(out)
    same = out == source.path
    paths = [w.path for w in wanted]
    _check_apart(source, paths, same=same)
    originals = list(source.files)
    with files.new_files(paths, overwrite=overwrite, like=originals, follow=same) as temporaries:
        for new, original, temporary in zip(wanted, originals, temporaries, strict=True):
            if new.data is None:
                files.copy(original, temporary, progress)
            else:
                temporary.write_bytes(new.data)
        yield temporaries


def _check_kind(source: Checkpoint, out: Path) -> None:
    """Refuse a name that promises another format: what is written is of the source's own."""
    promised = _KINDS.get(out.suffix.lower())
    if promised is None or out.suffix.lower() == source.path.suffix.lower():
        return
    if promised != _KINDS.get(source.path.suffix.lower(), promised) or source.folder is not None:
        raise UsageError(
            f"{out} is named like {promised}, and {source.path} is of another format ({source.format}); "
            "give it the same ending, or use `ckptflip convert`"
        )


def _check_apart(source: Checkpoint, wanted: Sequence[Path], *, same: bool) -> None:
    """Refuse names that would replace files of the source, or each other."""
    resolved = [w.resolve() for w in wanted]
    if len(set(resolved)) < len(resolved):
        raise UsageError(f"{wanted[0]} would give two files one name; name another with -o")
    if same:
        return
    own = {f.resolve() for f in source.files}
    for path in wanted:
        if path.resolve() in own:
            raise UsageError(f"{path} belongs to {source.path} itself; name another folder, or another name")


@contextlib.contextmanager
def _new_folder(out: Path, source: Path, *, overwrite: bool, progress: Progress | None) -> Iterator[Path]:
    # What a link stands for, not the link.
    out = out.resolve() if out.is_symlink() else out
    same = out.resolve() == source.resolve()
    if not same:
        check_new(out, overwrite=overwrite, folder=True)
    check_replaceable(out)
    temporary = files.temporary_beside(out)
    try:
        _copy_folder(source, temporary, progress)
        yield temporary
        _copy_modes(source, temporary)
        if not out.exists():
            temporary.rename(out)
        elif same or overwrite:
            files.swap(temporary, out)
        else:
            raise UsageError(f"{out} was created by another process meanwhile; name another with -o")
    except OSError as why:
        raise CheckpointError(
            f"{out} cannot be written: {why.strerror or why}; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_folder(source: Path, target: Path, progress: Progress | None) -> None:
    """Copy a folder: files by content, links only where they stay inside it."""
    root = source.resolve()
    for folder, below, names in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir()
        for name in [*names, *(b for b in below if (Path(folder) / b).is_symlink())]:
            each = Path(folder) / name
            if each.is_symlink() and not _stays(each, root):
                raise CheckpointError(
                    f"{each} is a link out of the checkpoint's folder, or to nothing; copy what it means"
                )
            if each.is_symlink():
                (here / name).symlink_to(each.readlink())
            elif each.is_file():
                files.copy(each, here / name, progress)
            else:
                raise CheckpointError(f"{each} is neither a file nor a folder: it cannot be copied")


def _stays(link: Path, root: Path) -> bool:
    """Whether a link leads to something in the folder."""
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # it leads nowhere, or to itself
        return False


def _copy_modes(source: Path, target: Path) -> None:
    """Permissions come last: what may only be read could not be altered."""
    for folder, _, names in os.walk(source, topdown=False):
        here = target / Path(folder).relative_to(source)
        for each in (*(Path(folder) / n for n in names), Path(folder)):
            copy = here / each.name if each != Path(folder) else here
            if copy.exists() and not copy.is_symlink():
                # A folder stays writable for its owner: it still has to be renamed.
                copy.chmod(each.stat().st_mode & 0o7777 | (0o700 if copy.is_dir() else 0))
