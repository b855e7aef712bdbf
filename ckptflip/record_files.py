"""Records on disk: JSON lines for reading, HDF5 columns for millions of faults."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat, to_values
from ckptflip.bits.words import valid_mask
from ckptflip.checkpoints.files import new_file, open_plain, sync
from ckptflip.errors import CheckpointError, RecordError
from ckptflip.faults.plan import COLUMNS, KINDS, Plan, empty
from ckptflip.faults.policy import MOST_POLICIES
from ckptflip.faults.record import SCHEMA, Header, Record, TensorEntry, bits_of, counts_of

if TYPE_CHECKING:
    import h5py

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
        policies: positions of the combined policies that hit the word; empty when it is the first alone.
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
    policies: tuple[int, ...] = ()


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


def make_folder(folder: Path) -> None:
    """Make a folder for records, unless it is there.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        raise CheckpointError(f"the folder {folder} cannot be made: {why.strerror or why}") from None


def read(path: str | Path) -> Record:
    """Read a record, in either form.

    Raises:
        RecordError: missing, damaged, of a newer version, or no record at all; says where.
    """
    path = Path(path)
    try:
        with open_plain(path) as file:
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
    index: list[list[int]] = [[]] * len(plan)
    if entry.shape:
        index = np.stack(np.unravel_index(elements, entry.shape), axis=1).tolist()
    form = f"%0{-(-number.part_width // 4)}x"
    before, after = ([form % w for w in words.tolist()] for words in (plan.before, plan.after))
    values = (_json_values(words, entry) for words in (plan.before, plan.after))
    sets: dict[int, tuple[int, ...]] = {
        p: () if p == 1 else tuple(i for i in range(MOST_POLICIES) if p >> i & 1)
        for p in set(plan.policies.tolist())
    }
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
    listed: list[Any] = values.tolist()
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
                values = (tensor, *_columns(fault, numbers[tensor]))
            except KeyError:
                raise RecordError(
                    f"record {path}, line {line}: its header names no tensor {fault.tensor!r}"
                ) from None
            except (ValueError, RecursionError) as why:
                raise RecordError(f"record {path}, line {line}: {why}") from None
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        blocks.append(_plan_of(columns, path))
    plan = Plan(*(np.concatenate([getattr(b, c) for b in blocks]) for c in COLUMNS))
    return _checked(Record(header, plan), path)


def _columns(fault: FaultLine, number: NumberFormat) -> tuple[int, int, int, int, int]:
    """Word, hit, before, after and policies of a line; ValueError where they cannot be."""
    if not 0 <= fault.part < number.parts:
        raise ValueError(f"{number.name} has no part {fault.part}")
    first = fault.part * number.part_width
    hit = _bit_set([b - first for b in fault.bits], number.part_width, "bits")
    policies = _bit_set(fault.policies or (0,), MOST_POLICIES, "policies")
    word = fault.element * number.parts + fault.part
    return word, hit, int(fault.before, 16), int(fault.after, 16), policies


def _bit_set(bits: Sequence[int], end: int, what: str) -> int:
    if len(set(bits)) < len(bits) or not all(0 <= b < end for b in bits):
        raise ValueError(f"{what} must be distinct and in range")
    return sum(1 << b for b in bits)


def _plan_of(columns: tuple[list[int], ...], path: Path) -> Plan:
    try:
        made: list[Any] = [np.array(c, kind) for c, kind in zip(columns, KINDS, strict=True)]
    except OverflowError as why:
        raise RecordError(f"record {path}: a number is out of range: {why}") from None
    return Plan(*made)


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
            columns: list[Any] = [
                _column(file[name], kind) for name, kind in zip(COLUMNS, KINDS, strict=True)
            ]
    # h5py raises nearly anything for damaged metadata; OSError is told by the caller.
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, MemoryError):
        raise RecordError(f"{path} is HDF5, but no record of flips (it lacks a record's columns)") from None
    if len({c.shape for c in columns}) != 1 or columns[0].ndim != 1:
        raise RecordError(f"record {path} is damaged: its columns differ in length")
    return _checked(Record(header, Plan(*columns)), path)


def _column(dataset: h5py.Dataset, kind: type) -> NDArray[Any]:
    if dataset.dtype.newbyteorder("=") != kind:
        raise TypeError(f"{dataset.name} holds {dataset.dtype}, not {np.dtype(kind)}")
    column: NDArray[Any] = dataset[()].astype(kind)
    return column


def _header(text: bytes, path: Path) -> Header:
    try:
        schema = msgspec.json.decode(text).get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise RecordError(
                f"record {path} is of schema {schema}; this version reads up to {SCHEMA}: upgrade ckptflip"
            )
        header = msgspec.json.decode(text, type=Header)
        _ = [t.number for t in header.tensors]
    except RecordError:
        raise
    except (ValueError, AttributeError, RecursionError) as why:
        raise RecordError(f"{path} is not a ckptflip record: {why}") from None
    if header.schema < 1 or len({t.name for t in header.tensors}) < len(header.tensors):
        raise RecordError(f"record {path} is damaged: its header contradicts itself")
    return header


def _checked(record: Record, path: Path) -> Record:
    """The record, if it is whole and its positions lie inside its tensors."""
    plan, header = record.plan, record.header
    if len(plan) != header.counts.words_hit:
        raise RecordError(
            f"record {path} is damaged: it lists {len(plan)} of {header.counts.words_hit} words"
        )
    if not len(plan):
        return record
    if plan.tensor.min() < 0 or plan.tensor.max() >= len(header.tensors) or (np.diff(plan.tensor) < 0).any():
        raise RecordError(f"record {path} is damaged: its faults are not in the order of its tensors")
    for tensor, rows in plan.by_tensor():
        entry = header.tensors[tensor]
        words = plan.word[rows]
        most = prod(entry.shape) * entry.number.parts if min(entry.shape, default=0) >= 0 else 0
        inside = words[0] >= 0 and words[-1] < most < 2**63
        if not inside or (np.diff(words) < 1).any():
            raise RecordError(f"record {path} is damaged: a fault lies outside {entry.name} {entry.shape}")
        widest = int(np.maximum(plan.before[rows], plan.after[rows]).max())
        if widest >> (8 * entry.number.word_size) or int(plan.hit[rows].max()) > valid_mask(entry.number):
            raise RecordError(f"record {path} is damaged: a word is too wide for {entry.name} {entry.dtype}")
    if ((plan.before ^ plan.after) & ~plan.hit).any() or counts_of(plan) != header.counts:
        raise RecordError(
            f"record {path} is damaged: its words do not differ in the bits that it says were hit"
        )
    return record
