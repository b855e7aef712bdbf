"""Which faulty table rows an evaluation reads: a fault in a row that is never looked up cannot show."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptflip import record_files
from ckptflip.errors import UsageError
from ckptflip.faults.record import Record, TensorEntry
from ckptflip.faults.rowwise import layout_of

# The tables of our models under their checkpoint names, also below a group such as model/.
_TABLE = re.compile(r"(?:^|[/.])(?:emb_l|linear_emb)\.(\d+)\.weight$")


class Touched(msgspec.Struct, frozen=True, kw_only=True):
    """How many faulty rows an evaluation reads.

    Attributes:
        rows: table rows with an effective fault (a word that differs before and after), over all tables.
        read: those of them whose id occurs in the evaluation.
        samples: samples of the evaluation that look up a faulty row.
        of: samples of the evaluation.
        faults: effective faulty words in tables.
        read_faults: those of them in a row that is read.
    """

    rows: int
    read: int
    samples: int
    of: int
    faults: int
    read_faults: int

    @property
    def share(self) -> float | None:
        """The share of faulty rows that are read; None where no row is faulty."""
        return self.read / self.rows if self.rows else None


def table_of(name: str) -> int | None:
    """The number of a table by its name in a checkpoint of one of our models, or None.

    Example:
        >>> table_of("model/emb_l.3.weight"), table_of("model/top_l.0.weight")
        (3, None)
    """
    found = _TABLE.search(name)
    return int(found[1]) if found else None


def touched(
    record: Record | str | Path,
    ids: NDArray[np.integer],
    tables: Mapping[str, int] | Callable[[str], int | None] = table_of,
) -> Touched:
    """Count the faulty rows of embedding tables that an evaluation reads.

    Args:
        record: what was altered, or the record's file. Row-wise quantised tables count as the rows they are.
        ids: int[samples, tables], or [samples, tables, ids of a bag]: what the evaluation looks up.
        tables: which column of `ids` a tensor's rows are looked up by: a table of names, or a function that
            gives None for what is no table; of a quantised one the name without its field. Two tensors may
            share a column, as a model's first-order weights and embeddings do; their rows count apart.

    Raises:
        UsageError: `ids` has another shape, no column for a table that was hit, or ids beyond it.
        RecordError: the record's file is missing or damaged.

    Example:
        >>> from ckptflip.faults.plan import empty
        >>> from ckptflip.faults.record import Counts, Header
        >>> header = Header(
        ...     ckptflip="", schema=1, created="", checkpoint="", output="", format="", checksum="leave",
        ...     seed=0, policies=(), size=0, tensors=(),
        ...     counts=Counts(bits_hit=0, bits_effective=0, words_hit=0, words_effective=0, tensors=0),
        ... )
        >>> touched(Record(header, empty()), np.zeros((5, 26), np.int64)).share is None
        True
    """
    if ids.ndim not in (2, 3):
        raise UsageError(f"ids have the shape [samples, tables] or [samples, tables, bag], not {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise UsageError(f"ids are whole numbers, not {ids.dtype}")
    found = record if isinstance(record, Record) else record_files.read(record)
    number = tables.get if isinstance(tables, Mapping) else tables
    reads = np.zeros(len(ids), bool)
    rows = read = faults = read_faults = 0
    for name, (column, size, hit) in _hit_rows(found, number).items():
        if not 0 <= column < ids.shape[1]:
            raise UsageError(f"{name} is table {column}, but the ids have {ids.shape[1]} columns")
        beyond = ids[:, column][(ids[:, column] < 0) | (ids[:, column] >= size)]
        if beyond.size:
            raise UsageError(f"id {beyond[0]} is beyond {name}, which has {size} rows, numbered from 0")
        faulty, words = np.unique(hit, return_counts=True)
        seen = np.isin(faulty, ids[:, column])
        rows, read = rows + faulty.size, read + int(seen.sum())
        faults, read_faults = faults + int(words.sum()), read_faults + int(words[seen].sum())
        looked_up = np.isin(ids[:, column], faulty)
        reads |= looked_up.any(axis=tuple(range(1, looked_up.ndim)))
    return Touched(
        rows=rows, read=read, samples=int(reads.sum()), of=len(ids), faults=faults, read_faults=read_faults
    )


def _hit_rows(
    record: Record, number: Callable[[str], int | None]
) -> dict[str, tuple[int, int, NDArray[np.int64]]]:
    """By table: its column, its rows, and the row of every effective faulty word.

    Codes, scales and biases of a row are one row.
    """
    found: dict[str, tuple[int, int, NDArray[np.int64]]] = {}
    for position, part in record.plan.by_tensor():
        entry = record.header.tensors[position]
        table = entry.name if layout_of(entry.layout) is None else entry.name.rpartition(".")[0]
        column = number(table)
        if column is None:
            continue
        effective = record.plan.before[part] != record.plan.after[part]
        hit = record.plan.word[part][effective] // _words_per_row(entry)
        before = found[table][2] if table in found else hit[:0]
        found[table] = column, entry.shape[0], np.concatenate([before, hit])
    return found


def _words_per_row(entry: TensorEntry) -> int:
    if layout_of(entry.layout) is not None and len(entry.shape) == 1:
        return 1  # a scale or bias for each row
    if len(entry.shape) != 2 or not entry.shape[1]:
        raise UsageError(f"{entry.name} has the shape {entry.shape}: a table has rows and columns")
    return entry.shape[1] * entry.number.parts
