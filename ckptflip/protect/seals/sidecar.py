"""The seal on disk: a header, digests, shares, and header and digests once more.

    magic, length of the header (8 bytes each), header (JSON), digest and CRC-32 of each cell,
    digest of each share, digest of all that                             the front copy
    shares                                                               where there are any
    the same as the front copy                                           the back copy
    length of a copy, magic (8 bytes each)

Both copies cover themselves and, by the shares' digests, everything else. One that is damaged is told, and
the other one used. The header says how long the file must be: one that is cut or longer is refused.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from ckptflip.errors import SealError
from ckptflip.protect.seals.cuts import LEAST_BLOCK, MOST_BLOCKS, Cuts, cut
from ckptflip.protect.seals.passing import CRC, DIGEST, Groups

MAGIC = b"ckpSEAL\n"
SCHEMA = 1
SUFFIX = ".seal"
KINDS = ("file", "files", "folder")
_ROOT = 32
_ENDS = 16
_MOST_FILES = 1 << 20
# What file systems take; longer names are no files, and asking for them is an error.
_LONGEST_PART, _LONGEST_NAME = 255, 2048
_MOST_HEADER = 1 << 28
_MOST_BYTES = 1 << 60
_Size = Annotated[int, Meta(ge=0, le=_MOST_BYTES)]


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a seal says of itself.

    Attributes:
        ckptflip: version of this package.
        schema: version of the seal's form.
        created: UTC, ISO 8601.
        checkpoint: its name when it was sealed.
        format: the checkpoint's format.
        kind: ``file``, ``files`` (beside each other) or ``folder``.
        files: name and bytes of each; names are relative to the folder, or to that of the first file.
        block: bytes of a block.
        groups: how blocks are grouped for repair; None where there are no shares.
    """

    ckptflip: str
    schema: int
    created: str
    checkpoint: str
    format: str
    kind: str
    files: tuple[tuple[str, _Size], ...]
    block: Annotated[int, Meta(ge=LEAST_BLOCK, le=1 << 44)]
    groups: Groups | None = None


class Seal(Struct, frozen=True, eq=False):
    """A seal that was read.

    Attributes:
        path: the sidecar.
        header: what it says of itself.
        cuts: of the sealed bytes.
        table: digest and CRC-32 of each cell, shape (cells, 20).
        shares: digest of each share, shape (groups × shares of a group, 16).
        shares_at: the first share's first byte in the sidecar.
        faults: what is damaged in the sidecar itself.
    """

    path: Path
    header: Header
    cuts: Cuts
    table: NDArray[np.uint8]
    shares: NDArray[np.uint8]
    shares_at: int
    faults: tuple[str, ...]

    def digest(self, cell: int) -> bytes:
        """The digest of a cell."""
        return self.table[cell, :DIGEST].tobytes()

    def crc(self, cell: int) -> int:
        """The CRC-32 of a cell."""
        return int.from_bytes(self.table[cell, DIGEST:].tobytes(), "little")

    def share(self, number: int) -> NDArray[np.uint8] | None:
        """The bytes of a share; None where they are damaged."""
        with self.path.open("rb") as file:
            data = os.pread(file.fileno(), self.header.block, self.shares_at + number * self.header.block)
        good = blake2b(data, digest_size=DIGEST).digest() == self.shares[number].tobytes()
        return np.frombuffer(data, np.uint8) if good else None


def beside(checkpoint: Path) -> Path:
    """Where the seal of a checkpoint lies unless told otherwise.

    Example:
        >>> str(beside(Path("runs/epoch_005.h5")))
        'runs/epoch_005.h5.seal'
    """
    if checkpoint.name in ("", ".."):
        checkpoint = checkpoint.resolve()
    return checkpoint.with_name(f"{checkpoint.name}{SUFFIX}")


def encoded(header: Header) -> bytes:
    """A header as it is stored."""
    return msgspec.json.encode(header)


def length_of_front(header: bytes, cuts: Cuts, groups: Groups | None) -> int:
    """Bytes of a copy of header and digests."""
    shares = groups.count * groups.shares if groups else 0
    return _ENDS + len(header) + cuts.cells * (DIGEST + CRC) + shares * DIGEST + _ROOT


def finish(
    file: BinaryIO, header: bytes, table: NDArray[np.uint8], shares: NDArray[np.uint8], end: int
) -> None:
    """Write both copies, around the shares that are there already.

    Args:
        file: open for writing.
        header: encoded.
        table: of the cells.
        shares: digests of the shares.
        end: where the back copy begins.
    """
    body = b"".join((MAGIC, len(header).to_bytes(8, "little"), header, table.tobytes(), shares.tobytes()))
    front = body + _root(body)
    file.seek(0)
    file.write(front)
    file.seek(end)
    file.write(front)
    file.write(len(front).to_bytes(8, "little") + MAGIC)


def read(path: Path) -> Seal:
    """Read a seal. Nothing in it is believed before its digest was found right.

    Raises:
        SealError: there is none, it is cut, damaged in both copies, of a newer version, or absurd.
    """
    try:
        if path.exists() and not path.is_file():
            raise SealError(f"{path} is no plain file, so no seal")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            copies = [_copy(file, 0, size, path), _copy(file, _back(file, size), size, path)]
    except FileNotFoundError:
        raise SealError(
            f"{path} does not exist: nothing is known of the checkpoint. Seal it while it is known to be "
            "good (ckptflip seal), or name its seal with --seal"
        ) from None
    except OSError as why:
        raise SealError(f"{path} cannot be read: {why.strerror or why}") from None
    good = [c for c in copies if isinstance(c, Seal)]
    if not good:
        raise SealError(f"{path} is no whole seal: {copies[0]}. Nothing can be verified with it")
    faults = [
        f"the {name} copy of its digests is damaged"
        for name, found in zip(("front", "back"), copies, strict=True)
        if not isinstance(found, Seal)
    ]
    one = good[0]
    if len(good) == 2 and _differ(one, good[1]):
        raise SealError(f"{path} holds two seals that contradict each other. Nothing can be verified with it")
    return msgspec.structs.replace(one, faults=tuple(faults))


def _differ(one: Seal, other: Seal) -> bool:
    same = np.array_equal(one.table, other.table) and np.array_equal(one.shares, other.shares)
    return not same or one.header != other.header


def _root(body: bytes) -> bytes:
    return blake2b(body, digest_size=_ROOT).digest()


def _back(file: BinaryIO, size: int) -> int:
    """Where the back copy begins, by the last bytes; -1 where they are damaged."""
    end = os.pread(file.fileno(), _ENDS, max(0, size - _ENDS))
    length = int.from_bytes(end[:8], "little")
    return size - _ENDS - length if end[8:] == MAGIC and length <= size - _ENDS else -1


def _copy(file: BinaryIO, at: int, size: int, path: Path) -> Seal | str:
    """A copy of header and digests, or why it is none."""
    head = os.pread(file.fileno(), _ENDS, at) if at >= 0 else b""
    if head[:8] != MAGIC:
        return "it does not begin as one"
    length = int.from_bytes(head[8:], "little")
    if length > min(_MOST_HEADER, size - at):
        return "its header is longer than the file"
    encoded = os.pread(file.fileno(), length, at + _ENDS)
    try:
        header = msgspec.json.decode(encoded, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as why:
        return f"its header is damaged ({why})"
    wrong = _absurd(header)
    if wrong:
        return wrong
    cuts = cut([s for _, s in header.files], header.block)
    front = length_of_front(encoded, cuts, header.groups)
    count = header.groups.count * header.groups.shares if header.groups else 0
    due = 2 * front + count * header.block + _ENDS
    if due != size:
        return f"it has {size} bytes, where {due} are due: it was cut, or something was added"
    body = os.pread(file.fileno(), front, at)
    if len(body) < front or body[-_ROOT:] != _root(body[:-_ROOT]):
        return "its digests are damaged"
    tables = np.frombuffer(body, np.uint8, front - _ROOT - _ENDS - length, _ENDS + length)
    cells = tables[: cuts.cells * (DIGEST + CRC)].reshape(-1, DIGEST + CRC)
    shares = tables[cuts.cells * (DIGEST + CRC) :].reshape(-1, DIGEST)
    return Seal(path, header, cuts, cells, shares, front, ())


def _absurd(header: Header) -> str:
    """What in a header cannot be; "" where nothing is wrong. Seals come from strangers, too."""
    if header.schema != SCHEMA:
        return f"its form is of version {header.schema}, and {SCHEMA} is known; use a newer ckptflip"
    total = sum(size for _, size in header.files)
    blocks = -(-total // header.block)
    names = [name for name, _ in header.files]
    if header.kind not in KINDS or not 0 < len(names) <= (1 if header.kind == "file" else _MOST_FILES):
        return f"it seals {len(names)} files as {header.kind!r}"
    if header.block & (header.block - 1) or blocks > MOST_BLOCKS or total > _MOST_BYTES:
        return f"its blocks of {header.block} bytes, {blocks} of them in {len(names)} files, cannot be"
    if any(not is_inside(name) for name in names) or len(set(names)) < len(names):
        return "it names files outside of the checkpoint, or one twice"
    groups = header.groups
    if groups is None:
        return ""
    fits = 1 <= groups.count <= max(blocks, 1) and groups.rows == -(-blocks // groups.count)
    if not fits or groups.shares < 1 or groups.rows < 1 or groups.rows + groups.shares > 256:
        return f"its {groups.count} groups of {groups.rows} blocks and {groups.shares} shares cannot be"
    return ""


def is_inside(name: str) -> bool:
    """Whether a file's name leads nowhere but into the folder that it is taken in.

    Example:
        >>> is_inside("c/0/1"), is_inside("../x"), is_inside("/etc/passwd"), is_inside("a//b")
        (True, False, False, False)
    """
    parts = name.split("/")
    usual = all(p not in ("", ".", "..") and len(os.fsencode(p)) <= _LONGEST_PART for p in parts)
    return usual and "\0" not in name and len(os.fsencode(name)) <= _LONGEST_NAME
