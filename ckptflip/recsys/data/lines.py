"""Big files of lines read in blocks with flat memory; lines that are malformed are set aside and told.

A block is a piece of the file with whole lines, and where its lines lie. Plain and gzip files are told
apart by their first bytes. Lines end with LF or CRLF, the last one may end with the file, and empty ones
are passed over.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.recsys.data.cells import PADDING
from ckptflip.recsys.data.logs import Tally

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

# Longer lines are malformed: the longest line of the official files has some 400 bytes.
MOST_LINE = 4096
BLOCK = 1 << 22
_BEGIN = '{"file": '


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file.

    Attributes:
        text: uint8, the lines and `cells.PADDING` bytes more.
        numbers: int64[n]: each line's number in the file, from 1.
        starts: int64[n]: where it begins.
        ends: int64[n]: where it ends, without LF or CRLF.
    """

    text: Bytes
    numbers: Integers
    starts: Integers
    ends: Integers

    def line(self, index: int) -> bytes:
        """One line's bytes."""
        return self.text[self.starts[index] : self.ends[index]].tobytes()


def blocks(path: Path, *, size: int = BLOCK) -> Iterator[Block]:
    """A file's lines, some `size` bytes at a time.

    Of a line that is too long only the beginning is kept, so a file without line ends takes no memory either.

    Raises:
        WorkloadError: the file is missing, cannot be read, or is a truncated or damaged gzip file; the blocks
            before the damage have been given by then.
    """
    number, rest = 1, b""
    with _opened(path) as file:
        while read := _read(file, size, path):
            cut = read.rfind(b"\n") + 1
            if not cut:
                rest = (rest + read)[: MOST_LINE + 1]
                continue
            block = _block(rest + read[:cut], number)
            number += _lines_in(rest + read[:cut])
            rest = read[cut:]
            if block.numbers.size:
                yield block
    if rest:
        block = _block(rest + b"\n", number)
        if block.numbers.size:
            yield block


def _lines_in(text: bytes) -> int:
    return text.count(b"\n")


def _block(content: bytes, number: int) -> Block:
    text = np.frombuffer(content + bytes(PADDING), np.uint8)
    ends = np.flatnonzero(text[:-PADDING] == ord("\n"))
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    # The byte before an empty first line is the padding's last, which is no CR.
    ends = ends - ((text[ends - 1] == ord("\r")) & (ends > starts))
    kept = ends > starts
    numbers = np.arange(number, number + ends.size)
    if kept.all():
        return Block(text, numbers, starts, ends)
    return Block(text, numbers[kept], starts[kept], ends[kept])


def columns(block: Block, separator: bytes, count: int) -> tuple[Integers, Integers, Flags]:
    """Where the cells of the lines lie that have `count` columns.

    Args:
        block: the lines.
        separator: between two cells: one byte, or the same byte twice.
        count: of columns.

    Returns:
        int64[k, count] where each cell begins, and where it ends, for those k lines; bool[n], which lines
        of the block they are.
    """
    text = block.text
    found = np.flatnonzero(text[:-PADDING] == separator[0])
    if len(separator) == 2:
        found = found[text[found + 1] == separator[1]]
    # Of the separators up to each line's end, those up to its start are of the lines before.
    many = np.searchsorted(found, block.ends) - np.searchsorted(found, block.starts)
    fit = many == count - 1
    if not fit.all():
        found = found[np.repeat(fit, many)]
    inner = found.reshape(-1, count - 1)
    starts = np.concatenate([block.starts[fit, None], inner + len(separator)], axis=1)
    ends = np.concatenate([inner, block.ends[fit, None]], axis=1)
    return starts, ends, fit


def unreadable(block: Block) -> list[tuple[str, Flags]]:
    """Which lines hold a NUL byte, or are too long: bool[n] each."""
    null = np.zeros(block.numbers.size, bool)
    places = np.flatnonzero(block.text[:-PADDING] == 0)
    if places.size:
        null[np.maximum(np.searchsorted(block.starts, places, side="right") - 1, 0)] = True
    return [("with a NUL byte", null), ("too long", block.ends - block.starts > MOST_LINE)]


def first_reasons(found: list[tuple[str, Flags]]) -> tuple[dict[str, Flags], Flags]:
    """Give each bad line one reason, the first that holds.

    Returns:
        bool[n] by reason, for reasons that some line has; bool[n], which lines have none.
    """
    bad: dict[str, Flags] = {}
    sound = np.ones(found[0][1].size, bool)
    for reason, mask in found:
        first = mask & sound
        if first.any():
            bad[reason] = first
            sound &= ~first
    return bad, sound


Put = Callable[[Path, Block, NDArray[Any], str], None]


@contextmanager
def quarantine(path: Path | None) -> Iterator[Put]:
    """Where malformed lines go: a function of file, block, the lines' places in it, and the reason.

    Each becomes a line of JSON with `file`, `line` (its number from 1), `reason` and `text`, the line's bytes
    as Latin-1, of a line too long the first 4096. The file is made when the first line is set aside.

    Args:
        path: the file; None to write none. A file that holds anything else is not written over.

    Raises:
        UsageError: the file is there and holds something else, or cannot be written.
    """
    if path is not None:
        _check_replaceable(path)
    opened: list[IO[str]] = []

    def put(source: Path, block: Block, places: NDArray[Any], reason: str) -> None:
        if path is None:
            return
        if not opened:
            opened.append(_created(path))
        for place in places.tolist():
            entry = {
                "file": str(source),
                "line": int(block.numbers[place]),
                "reason": reason,
                "text": block.line(place)[:MOST_LINE].decode("latin-1"),
            }
            opened[0].write(json.dumps(entry) + "\n")

    try:
        yield put
    finally:
        for file in opened:
            file.close()


def _check_replaceable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            begin = file.read(len(_BEGIN))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"malformed lines cannot be written to {path}: {error.strerror}") from None
    if begin not in (b"", _BEGIN.encode()):
        raise UsageError(f"malformed lines are not written over {path}, which holds something else")
    path.unlink()


def _created(path: Path) -> IO[str]:
    try:
        return path.open("w", encoding="ascii")
    except OSError as error:
        raise UsageError(f"malformed lines cannot be written to {path}: {error.strerror}") from None


def check_share(tally: Tally, most: float | None, what: str) -> None:
    """Refuse a log with too many malformed lines, or with no other.

    Args:
        tally: of the whole log.
        most: the largest share of malformed lines, 0 to 1; None for any, as long as one line is sound.
        what: the log, for the message.

    Raises:
        WorkloadError: there are too many, or no line is sound.
    """
    reasons = ", ".join(f"{count} {reason}" for reason, count in tally.malformed.items())
    if tally.lines == 0:
        raise WorkloadError(f"{what} holds no lines")
    if tally.set_aside == tally.lines:
        raise WorkloadError(
            f"{what}: all {tally.lines} lines are malformed ({reasons}). Is it a file of another layout?"
        )
    if most is not None and tally.set_aside > most * tally.lines:
        raise WorkloadError(
            f"{what}: {tally.set_aside} of {tally.lines} lines are malformed ({reasons}), a share of "
            f"{tally.set_aside / tally.lines:.2g}; at most {most:g} was allowed"
        )


def check_options(most_malformed: float | None) -> None:
    """Raise UsageError unless the share is None or from 0 to 1."""
    if most_malformed is not None and not 0 <= most_malformed <= 1:
        raise UsageError(f"the share of malformed lines allowed is from 0 to 1, not {most_malformed!r}")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if packed:
                with gzip.open(file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield file
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror or error}") from None


def _read(file: IO[bytes], size: int, path: Path) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise WorkloadError(
            f"{path} is a truncated or damaged gzip file ({error}): download it again"
        ) from None
