"""Sealing a checkpoint: what its bytes are, written beside it, while they are known to be good."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from math import ceil
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip import __version__
from ckptflip.checkpoints import files
from ckptflip.checkpoints.files import Progress
from ckptflip.errors import CheckpointError, UsageError
from ckptflip.protect.seals import code, sidecar
from ckptflip.protect.seals.cuts import Cuts, block_for, cut
from ckptflip.protect.seals.members import Members, members
from ckptflip.protect.seals.passing import DIGEST, Groups, table_of
from ckptflip.protect.seals.stream import State, Stream, state_of
from ckptflip.protect.seals.work import workers_for

# What `--repair` costs unless told otherwise.
USUAL_COST = 0.05
_SHARES = 4
_LEAST_COST, _MOST_COST = 0.005, 1.0


class Sealed(Struct, frozen=True):
    """What was sealed.

    Attributes:
        path: the seal.
        files: how many files it covers.
        bytes: how many bytes.
        block: bytes of a block.
        blocks: how many there are.
        size: bytes of the seal.
        groups: groups of blocks that are repaired together; 0 without shares.
        shares: how many blocks of each may be lost.
    """

    path: Path
    files: int
    bytes: int
    block: int
    blocks: int
    size: int
    groups: int
    shares: int


def seal(
    checkpoint: str | Path,
    *,
    repair: float | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Sealed:
    """Write a seal beside a checkpoint: digests of all of its blocks and, if asked for, shares to repair it.

    Args:
        checkpoint: a checkpoint, or any folder, which is sealed with all that is in it.
        repair: the share of the checkpoint's size that may be spent on the erasure code, 0.005 to 1; None: no
            code. Single and double flips can be mended without one.
        out: the seal; by default the checkpoint's name with ``.seal`` added.
        overwrite: whether a seal that is there may be replaced.
        workers: threads; by default one for each processor, eight at most.
        progress: told the bytes read.

    Raises:
        CheckpointError: the checkpoint cannot be read, or was written while it was sealed.
        UsageError: a seal is there, or a number makes no sense.

    Example:
        >>> import os, tempfile, numpy as np
        >>> folder = tempfile.mkdtemp()
        >>> path = os.path.join(folder, "w.npy")
        >>> np.save(path, np.zeros(1000, np.float32))
        >>> sealed = seal(path, repair=0.5)
        >>> sealed.path.name, sealed.bytes, sealed.shares
        ('w.npy.seal', 4128, 1)
    """
    if repair is not None and not _LEAST_COST <= repair <= _MOST_COST:
        raise UsageError(
            f"what repair may cost must be {_LEAST_COST} to {_MOST_COST} of the checkpoint, not {repair}"
        )
    threads = workers_for(workers)
    with members(Path(checkpoint)) as found:
        path = Path(out) if out is not None else sidecar.beside(found.path)
        files.check_new(path, overwrite=overwrite)
        _check_apart(path, found)
        _check_names(found)
        before = [state_of(p) for p in found.paths]
        sizes = [_size(p, s) for p, s in zip(found.paths, before, strict=True)]
        cuts = cut(sizes, block_for(sum(sizes)))
        groups = groups_for(cuts.blocks, repair) if repair is not None and cuts.blocks else None
        with files.new_file(path, overwrite=overwrite) as temporary:
            length = _write(temporary, found, sizes, cuts, groups, threads, progress)
            _check_unchanged(found.paths, before)
        files.sync(path)
    count, shares = (groups.count, groups.shares) if groups else (0, 0)
    return Sealed(path, len(sizes), cuts.total, cuts.block, cuts.blocks, length, count, shares)


def groups_for(blocks: int, cost: float) -> Groups:
    """The groups of a code that costs a share of the data: four shares each where that is possible.

    Example:
        >>> groups_for(32768, 0.05)
        Groups(count=409, rows=81, shares=4)
        >>> groups_for(5, 0.05)
        Groups(count=1, rows=5, shares=1)
    """
    affordable = ceil(cost * blocks)
    for shares in range(min(_SHARES, affordable), 0, -1):
        count = affordable // shares
        rows = -(-blocks // count)
        if rows + shares <= code.MOST:
            break
    return Groups(count, rows, shares)


def _write(
    path: Path,
    found: Members,
    sizes: Sequence[int],
    cuts: Cuts,
    groups: Groups | None,
    workers: int,
    progress: Progress | None,
) -> int:
    """Write a seal's file; its length."""
    header = sidecar.encoded(
        sidecar.Header(
            ckptflip=__version__,
            schema=sidecar.SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            checkpoint=found.path.name,
            format=found.format,
            kind=found.kind,
            files=tuple(zip(found.names, sizes, strict=True)),
            block=cuts.block,
            groups=groups,
        )
    )
    shares = np.empty((groups.count * groups.shares if groups else 0, DIGEST), np.uint8)
    front = sidecar.length_of_front(header, cuts, groups)
    with path.open("r+b") as file:

        def keep(first: int, made: NDArray[np.uint8]) -> None:
            for number, each in enumerate(made, first):
                shares[number] = np.frombuffer(blake2b(each.data, digest_size=DIGEST).digest(), np.uint8)
            _write_all(file.fileno(), made, front + first * cuts.block)

        stream = Stream(found.paths, cuts.files, whole=True)
        table = table_of(cuts, stream, groups, keep, workers, progress)
        sidecar.finish(file, header, table, shares, front + len(shares) * cuts.block)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _write_all(descriptor: int, data: NDArray[np.uint8], offset: int) -> None:
    view = np.ascontiguousarray(data).reshape(-1).data
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _size(path: Path, state: State | None) -> int:
    if state is None:
        raise CheckpointError(f"{path} is missing, or no plain file: it cannot be sealed")
    return state.size


def _check_apart(path: Path, found: Members) -> None:
    if found.kind == "folder" and path.resolve().is_relative_to(found.root.resolve()):
        raise UsageError(f"{path} would lie in the folder that it seals; name another place with -o")
    if path.resolve() in {p.resolve() for p in found.paths}:
        raise UsageError(f"{path} belongs to the checkpoint itself; name another with -o")


def _check_names(found: Members) -> None:
    """Refuse names that a seal, which keeps them as text, could not hold or would refuse when it is read."""
    for name in (found.path.name, *found.names):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"the name {os.fsencode(name)!r} is not UTF-8, and a seal keeps names as text: rename it"
            ) from None
    for name in found.names:
        if not sidecar.is_inside(name):
            raise CheckpointError(f"the name {name!r} is one that no seal can hold: rename the file")


def _check_unchanged(paths: Sequence[Path], before: Sequence[State | None]) -> None:
    for path, state in zip(paths, before, strict=True):
        if state_of(path) != state:
            raise CheckpointError(
                f"{path} was written while it was sealed; no seal was kept. Seal it when the save is over"
            )
