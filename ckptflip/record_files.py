"""Records on disk: JSON lines for reading, HDF5 columns for millions of faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import to_values
from ckptflip.checkpoints.files import new_file, sync
from ckptflip.errors import CkptflipError, RecordError
from ckptflip.faults.plan import COLUMNS, Plan, empty
from ckptflip.faults.record import SCHEMA, Header, Record, TensorEntry, bits_of

_ROWS = 1 << 16
_SUFFIXES_HDF5 = (".h5", ".hdf5")


class FaultLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fault, as a JSON line.

    Attributes:
        tensor: its name.
        element: flat C-order index.
        index: the same along each axis.
        bits: the bits hit, bit 0 the least significant of the element.
        before: the word before, hexadecimal.
        after: the word after.
        value_before: the number it stood for; NaN and infinities as text.
        value_after: the number it stands for now.
        part: 1 for the imaginary part of a complex element (words are those of the part), else 0.
        policies: positions of the combined policies that hit the word, when it is not the first alone.
    """

    tensor: str
    element: int
    index: list[int]
    bits: list[int]
    before: str
    after: str
    value_before: float | int | str
    value_after: float | int | str
    part: int = 0
    policies: tuple[int, ...] = (0,)


def write(record: Record, path: Path, *, overwrite: bool, durable: bool = False) -> None:
    """Write a record: HDF5 when the name ends in ``.h5``, else JSON lines.

    Args:
        record: what to write.
        path: where to.
        overwrite: whether an existing record may be replaced.
        durable: force it to disk before returning.

    Raises:
        UsageError: the file exists.
        CheckpointError: it cannot be written.
    """
    with new_file(path, overwrite=overwrite) as temporary:
        if path.suffix in _SUFFIXES_HDF5:
            _write_hdf5(record, temporary)
        else:
            with temporary.open("wb") as file:
                _write_lines(record, file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
    if durable:
        sync(path)


def read(path: str | Path) -> Record:
    """Read a record, in either form.

    Raises:
        RecordError: missing, damaged, of a newer version, or no record at all; says where.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
            if not is_hdf5:
                file.seek(0)
                return replace(_read_lines(file, path), path=str(path))
        return replace(_read_hdf5(path), path=str(path))
    except OSError as why:
        raise RecordError(f"record {path}: {why.strerror or why}") from None


def lines(record: Record, rows: slice = slice(None)) -> Iterator[FaultLine]:
    """The faults of a record as they stand in its JSON lines."""
    plan = record.plan.take(rows)
    for tensor, part in plan.by_tensor():
        entry = record.header.tensors[tensor]
        for start in range(part.start, part.stop, _ROWS):
            yield from _tensor_lines(entry, plan.take(slice(start, min(start + _ROWS, part.stop))))


def _write_lines(record: Record, file: BinaryIO) -> None:
    encoder = msgspec.json.Encoder()
    file.write(encoder.encode(record.header) + b"\n")
    for tensor, part in record.plan.by_tensor():
        entry = record.header.tensors[tensor]
        for start in range(part.start, part.stop, _ROWS):
            rows = record.plan.take(slice(start, min(start + _ROWS, part.stop)))
            file.write(encoder.encode_lines(_tensor_lines(entry, rows)))


def _tensor_lines(entry: TensorEntry, plan: Plan) -> list[FaultLine]:
    """Lines of faults that all lie in one tensor."""
    number = entry.number
    elements, parts = np.divmod(plan.word, number.parts)
    index = np.stack(np.unravel_index(elements, entry.shape), axis=1).tolist() if entry.shape else [[]] * len(plan)
    form = f"%0{-(-number.part_width // 4)}x"
    before, after = ([form % w for w in words.tolist()] for words in (plan.before, plan.after))
    values = (_json_values(words, entry) for words in (plan.before, plan.after))
    sets = {p: tuple(i for i in range(16) if p >> i & 1) for p in np.unique(plan.policies).tolist()}
    return list(
        map(
            FaultLine,
            [entry.name] * len(plan),
            elements.tolist(),
            index,
            bits_of(plan.hit, number, parts),
            before,
            after,
            *values,
            parts.tolist(),
            [sets[p] for p in plan.policies.tolist()],
        )
    )


def _json_values(words: NDArray[np.uint64], entry: TensorEntry) -> list[Any]:
    values = to_values(words.astype(entry.number.word_dtype), entry.number)
    listed = values.tolist()
    if entry.number.is_float:
        for i in np.flatnonzero(~np.isfinite(values)).tolist():
            listed[i] = str(listed[i])
    return listed


def _read_lines(file: BinaryIO, path: Path) -> Record:
    header = _header(file.readline(), path)
    names = {t.name: i for i, t in enumerate(header.tensors)}
    numbers = [t.number for t in header.tensors]
    decoder = msgspec.json.Decoder(FaultLine)
    blocks = [empty()]
    line = 1
    while True:
        batch = file.readlines(_ROWS * 128)
        if not batch:
            break
        columns: tuple[list[int], ...] = ([], [], [], [], [], [])
        for text in batch:
            line += 1
            try:
                fault = decoder.decode(text)
                tensor = names[fault.tensor]
                shift = fault.part * numbers[tensor].part_width
                values = (
                    tensor,
                    fault.element * numbers[tensor].parts + fault.part,
                    sum(1 << (b - shift) for b in fault.bits),
                    int(fault.before, 16),
                    int(fault.after, 16),
                    sum(1 << p for p in fault.policies),
                )
            except (msgspec.DecodeError, KeyError, ValueError) as why:
                raise RecordError(f"record {path}, line {line}: {why}") from None
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        blocks.append(_plan_of(columns, path))
    plan = Plan(*(np.concatenate([getattr(b, c) for b in blocks]) for c in COLUMNS))
    return _checked(Record(header, plan), path)


def _plan_of(columns: tuple[list[int], ...], path: Path) -> Plan:
    kinds = (np.int32, np.int64, np.uint64, np.uint64, np.uint64, np.uint16)
    try:
        return Plan(*(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))
    except OverflowError as why:
        raise RecordError(f"record {path}: a number is out of range: {why}") from None


def _write_hdf5(record: Record, path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("header", data=np.frombuffer(msgspec.json.encode(record.header), np.uint8))
        for column in COLUMNS:
            file.create_dataset(column, data=getattr(record.plan, column))


def _read_hdf5(path: Path) -> Record:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            header = _header(file["header"][()].tobytes(), path)
            kinds = (np.int32, np.int64, np.uint64, np.uint64, np.uint64, np.uint16)
            plan = Plan(*(file[c][()].astype(kind) for c, kind in zip(COLUMNS, kinds, strict=True)))
    except (KeyError, AttributeError, TypeError) as why:
        raise RecordError(f"{path} is HDF5, but no record: {why}") from None
    if len({getattr(plan, c).shape for c in COLUMNS}) != 1 or plan.tensor.ndim != 1:
        raise RecordError(f"record {path} is damaged: its columns differ in length")
    return _checked(Record(header, plan), path)


def _header(text: bytes, path: Path) -> Header:
    try:
        schema = msgspec.json.decode(text).get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise RecordError(f"record {path} is of schema {schema}; this version reads up to {SCHEMA}: upgrade ckptflip")
        header = msgspec.json.decode(text, type=Header)
        _ = [t.number for t in header.tensors]
    except (msgspec.DecodeError, AttributeError, CkptflipError) as why:
        if isinstance(why, RecordError):
            raise
        raise RecordError(f"{path} is not a ckptflip record: {why}") from None
    return header


def _checked(record: Record, path: Path) -> Record:
    """The record, if it is whole and its positions lie inside its tensors."""
    plan, header = record.plan, record.header
    if len(plan) != header.counts.words_hit:
        raise RecordError(f"record {path} is damaged: it lists {len(plan)} of {header.counts.words_hit} words")
    if not len(plan):
        return record
    if plan.tensor.min() < 0 or plan.tensor.max() >= len(header.tensors) or (np.diff(plan.tensor) < 0).any():
        raise RecordError(f"record {path} is damaged: its faults are not in the order of its tensors")
    for tensor, rows in plan.by_tensor():
        entry = header.tensors[tensor]
        words = plan.word[rows]
        most = int(np.prod(entry.shape, dtype=object)) * entry.number.parts
        widest = np.maximum(plan.before[rows], plan.after[rows]).max()
        if words[0] < 0 or words[-1] >= most or (np.diff(words) < 1).any() or int(widest) >> entry.number.part_width:
            raise RecordError(f"record {path} is damaged: a fault lies outside {entry.name} {entry.shape}")
    return record
