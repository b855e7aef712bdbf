"""A zarr folder as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ckptflip.checkpoints.laid import LaidOut
from ckptflip.checkpoints.listing import Array, DamagedError, catalogue
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.zarr.chunks import Allowance, Laid, Stored, lay
from ckptflip.checkpoints.zarr.coded import CodedChunks
from ckptflip.checkpoints.zarr.folder import V2, V2_GROUP, V3, find
from ckptflip.checkpoints.zarr.metadata import ArrayHeader, UnsupportedError
from ckptflip.errors import CheckpointError

# Chunks that were never written cost memory without costing disk: so many for each file that is there.
_NEVER_WRITTEN = 1 << 16
_NEVER_WRITTEN_PER_FILE = 16


def recognises(folder: Path) -> bool:
    """Whether a folder is a zarr array or group."""
    return any((folder / name).is_file() for name in (V3, V2, V2_GROUP))


def open_checkpoint(path: Path) -> LaidOut:
    """Open a zarr folder.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    if not recognises(path):
        raise CheckpointError(f"{path} is no zarr folder: it has neither {V3} nor {V2} nor {V2_GROUP}")
    found = find(path)
    if not found.files:
        raise CheckpointError(
            f"{path} cannot be altered: {found.skipped[0].reason}; put the file in its place"
        )
    return laid_out(path, "zarr", found.files, found.arrays, found.skipped)


def laid_out(
    path: Path, format: str, files: Sequence[Path], arrays: Iterable[Stored], skipped: Sequence[Skipped]
) -> LaidOut:
    """A checkpoint of arrays in chunks.

    Args:
        path: its folder.
        format: the format's short name.
        files: all its files; values of the arrays refer to them by position.
        arrays: with unique names.
        skipped: what is left out already.

    Raises:
        CheckpointError: chunks are not what the metadata say.
    """
    laid: list[Laid] = []
    listed: list[Array] = []
    left_out = list(skipped)
    for each, found in _laid(path, files, arrays):
        if isinstance(found, str):
            left_out.append(Skipped(each.name, found))
            continue
        laid.append(found)
        listed.append(Array(each.name, each.header.shape, found.layout, _described(each.header)))
    coded = [c for found in laid for c in found.coded]
    return LaidOut(
        path,
        format,
        files,
        catalogue(listed),
        [a.layout for a in listed],
        skipped=left_out,
        crcs=[s for found in laid for s in found.crcs],
        blobs=CodedChunks(path, coded, len(files[0].relative_to(path).parts) - 1) if coded else None,
        folder=path,
    )


def _laid(path: Path, files: Sequence[Path], arrays: Iterable[Stored]) -> Iterator[tuple[Stored, Laid | str]]:
    """Where each array lies, or why it is left out."""
    allowance = Allowance(_NEVER_WRITTEN + _NEVER_WRITTEN_PER_FILE * len(files))
    names: set[str] = set()
    coded = 0
    for each in arrays:
        if each.name in names:
            yield each, "another array has the same name"
            continue
        names.add(each.name)
        try:
            found = lay(each, len(files) + coded, allowance)
        except UnsupportedError as why:
            yield each, str(why)
        except DamagedError as why:
            raise CheckpointError(f"{path} is damaged: {each.name}: {why}") from None
        else:
            coded += len(found.coded)
            yield each, found


def _described(header: ArrayHeader) -> str:
    """The layout of an array in words."""
    chain = header.chain
    words = ["sharded" if header.sharding else "chunked"]
    words += ["crc32c"] * bool(chain.inner)
    words += [chain.compressor.name] if chain.compressor else []
    words += ["crc32c"] * bool(chain.outer)
    return ", ".join(words)
