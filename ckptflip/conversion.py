"""The verb that converts: the tensors of a checkpoint in another format, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints import Checkpoint, files, opened
from ckptflip.checkpoints.files import Progress
from ckptflip.checkpoints.writers import Entry, Writer
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.faults.catalogue import Tensor, listed, select

_WRITERS = {
    **dict.fromkeys((".h5", ".hdf5", ".hdf", ".he5"), "hdf5"),
    ".safetensors": "safetensors",
    ".npz": "npz",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "torch_zip"),
}
# Listed with another shape than the tensor has where it comes from.
_UNFIT_LAYOUTS = dict.fromkeys(
    ("run of overlapping views", "expanded"), "it shares words with itself or other views; save a clone()"
)
# Formats in which one storage can have several names.
_WITH_ALIASES = ("hdf5", "torch_zip")


class Converted(Struct, frozen=True):
    """What `convert` did.

    Attributes:
        tensors: how many were written.
        nbytes: their bytes together.
        lost_names: other names of written tensors, which the new format cannot give to one storage.
        skipped: what the source's catalogue leaves out, by name.
    """

    tensors: int
    nbytes: int
    lost_names: tuple[str, ...]
    skipped: tuple[str, ...]


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    tensors: str | Iterable[str] = (),
    layers: str | Iterable[str] = (),
    roles: str | Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write the tensors of a checkpoint, of any format, into a new file, with every bit as it is.

    Names, shapes and dtypes stay. What is no tensor (settings, text, code) is not carried over.

    Args:
        checkpoint: what is read.
        out: the new file; its suffix says the format: ``.h5``, ``.safetensors``, ``.npz``, or ``.pt``
            (``.pth``, ``.bin``, ``.ckpt``).
        tensors, layers, roles: limit the conversion; see `ckptflip.faults.Policy`.
        overwrite: whether `out` may be replaced.
        progress: told the bytes written.

    Raises:
        UsageError: an unknown suffix, or `out` exists.
        SelectionError: nothing is selected.
        CheckpointError: the source cannot be read, or holds what the new format cannot.

    Example:
        >>> import ckptflip, h5py, numpy, tempfile, pathlib
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with h5py.File(folder / "a.h5", "w") as f:
        ...     f["w"] = numpy.ones((2, 2), "float32")
        >>> ckptflip.convert(folder / "a.h5", folder / "a.safetensors").tensors
        1
    """
    out = Path(out)
    kind = _WRITERS.get(out.suffix.lower())
    if kind is None:
        raise UsageError(f"{out}: no format is known by {out.suffix!r}; use one of {', '.join(_WRITERS)}")
    writer = cast("Writer", import_module(f"ckptflip.checkpoints.writers.{kind}"))
    files.check_new(out, overwrite=overwrite)
    with opened(checkpoint) as target:
        _check_apart(out, target)
        wanted = select(target.tensors, names=listed(tensors), layers=listed(layers), roles=listed(roles))
        chosen = [(i, _named(target.tensors[i], kind)) for i in wanted]
        _check_fit(out, writer, [tensor for _, tensor in chosen])
        entries = [Entry(tensor, partial(_blocks, target, i, progress)) for i, tensor in chosen]
        with files.new_file(out, overwrite=overwrite) as temporary:
            writer.write(temporary, entries)
        lost = [a for i in wanted for a in target.tensors[i].aliases] if kind not in _WITH_ALIASES else []
        return Converted(
            len(entries),
            sum(t.nbytes for _, t in chosen),
            tuple(lost),
            tuple(s.name for s in target.skipped),
        )


def _blocks(target: Checkpoint, tensor: int, progress: Progress | None) -> Iterator[NDArray[Any]]:
    for block in target.blocks(tensor):
        yield block
        if progress:
            progress(block.nbytes)


def _named(tensor: Tensor, kind: str) -> Tensor:
    return tensor if kind in _WITH_ALIASES else replace(tensor, aliases=())


def _check_apart(out: Path, target: Checkpoint) -> None:
    if out.exists() and any(out.samefile(f) for f in target.files):
        raise UsageError(f"{out} is the checkpoint that is read; name another file")


def _check_fit(out: Path, writer: Writer, tensors: list[Tensor]) -> None:
    unfit = [(t.name, why) for t in tensors if (why := _UNFIT_LAYOUTS.get(t.layout) or writer.unfit(t))]
    if unfit:
        name, why = unfit[0]
        more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
        raise CheckpointError(
            f"{name} cannot be written to {out.name}: {why}{more}; leave it out with --tensors '!{name}', "
            "or write HDF5 (.h5), which holds every dtype"
        )
