"""Reading the fault files of other injectors: which element of what, and which bits. Nothing is executed.

hdf5_corrupter saves the sequence of its injections as JSON, ``{"/conv1/W": [[[0, 2, 1, 1], [5, 30]]]}``: for
each location the indices of an element and its bits, counted from the left: 0 is the sign. PyTorchALFI
pickles a numpy array with one column for each fault: layer, filter, channel, depth, height, width, bit (from
the left too).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.torch_zip.pickles import parse
from ckptflip.checkpoints.torch_zip.values import Call, Global
from ckptflip.errors import CheckpointError, RecordError

# What PyTorchALFI keeps of each fault; further rows say what became of it.
ROWS = 7
_LARGEST = 1 << 28
_MOST_FAULTS = 1 << 22
_NUMBERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8")


class Sequence(Struct, frozen=True):
    """One injection of hdf5_corrupter's.

    Attributes:
        location: the dataset, or the group that it lies in.
        index: of the element.
        bits: from the left, 0 the sign; one given twice was inverted twice.
    """

    location: str
    index: tuple[int, ...]
    bits: tuple[int, ...]


def read_sequence(path: Path) -> list[Sequence]:
    """Read the sequence that hdf5_corrupter saved with its option ``--saveInjectionSequence``.

    Raises:
        RecordError: no such file, or one from which no bit of an element can be told; says why.
    """
    try:
        data = json.loads(_content(path))
    except (ValueError, RecursionError) as why:
        raise RecordError(f"{path} is no JSON: {why}") from None
    if not isinstance(data, dict) or not data:
        raise RecordError(f"{path} is no injection sequence: it maps no locations to injections")
    found: list[Sequence] = []
    for location, injections in data.items():
        if not isinstance(injections, list):
            raise RecordError(f"{path}: {location} has no list of injections")
        found += _at_location(path, location, injections)
    if len(found) > _MOST_FAULTS:
        raise RecordError(f"{path} lists more than {_MOST_FAULTS} injections")
    return found


def read_alfi(path: Path) -> NDArray[np.int64]:
    """Read the faults that PyTorchALFI drew: ``…_fault_locs.bin``, or ``…_updated_rs_fault_locs.bin``.

    Returns:
        An array of 7 rows, a column for each fault.

    Raises:
        RecordError: no such file, or no such array.
    """
    data = _content(path)
    try:
        value = parse(lambda at, count: data[at : at + count], len(data), str(path), longest=_LARGEST)
    except CheckpointError as why:
        raise RecordError(f"{why}") from None
    shape, numbers = _array(value, path)
    if len(shape) != 2 or shape[0] < ROWS or not 1 <= shape[1] <= _MOST_FAULTS:
        raise RecordError(
            f"{path} holds an array {shape}; faults of PyTorchALFI have {ROWS} rows or more, one column each"
        )
    return numbers.reshape(shape)[:ROWS]


def is_json(path: Path) -> bool:
    """Whether a file looks like JSON rather than a pickle."""
    return _content(path, 64).lstrip()[:1] in (b"{", b"[")


def _content(path: Path, most: int = _LARGEST + 1) -> bytes:
    try:
        with open_plain(path) as file:
            data = file.read(most)
    except OSError as why:
        raise RecordError(f"{path}: {why.strerror or why}") from None
    if len(data) > _LARGEST:
        raise RecordError(f"{path} is larger than any list of faults")
    return data


def _at_location(path: Path, location: str, injections: list[Any]) -> Iterator[Sequence]:
    for number, injection in enumerate(injections, 1):
        where = f"{path}: {location}, injection {number}"
        if not isinstance(injection, list) or len(injection) != 2 or not isinstance(injection[0], list):
            raise RecordError(
                f"{where} names no element: it was saved by a version, or with settings, that draw one at "
                "random each time"
            )
        index, bits = injection
        if bits is None:
            continue  # the probability of injecting did not let it happen
        if not index:
            raise RecordError(f"{where} names no element: save the sequence with its indices")
        if isinstance(bits, int):
            raise RecordError(
                f"{where} altered an integer: its bit is counted in the digits of the number as it was, "
                "not in the stored word"
            )
        if not _whole(index) or not _whole(bits, least=-2):
            raise RecordError(f"{where}: {str(injection)[:80]} is no index with bits")
        if -2 in bits or -1 in bits:
            raise RecordError(f"{where} scaled the value, by a factor that the file does not tell")
        yield Sequence(location, tuple(index), tuple(bits))


def _whole(values: Any, least: int = 0) -> bool:
    return isinstance(values, list) and all(type(v) is int and least <= v < 2**62 for v in values)


def _array(value: Any, path: Path) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """A pickled array: its shape and its numbers in C order."""
    parts = _parts(value)
    if parts is None:
        raise RecordError(f"{path} is no pickled numpy array, as PyTorchALFI saves its faults")
    shape, dtype, is_fortran, body = parts
    count = int(np.prod(shape, dtype=np.float64)) if _whole(list(shape)) else -1
    if not 0 <= count <= 64 * _MOST_FAULTS:
        raise RecordError(f"{path} is damaged: its array has the shape {shape}")
    if isinstance(body, list) and dtype == "O":
        numbers = np.array([_number(v) for v in body])
    elif dtype[1:] in _NUMBERS:
        kind = np.dtype(dtype)
        if not isinstance(body, bytes) or len(body) != count * kind.itemsize:
            raise RecordError(f"{path} is damaged: its array lacks numbers")
        numbers = np.frombuffer(body, kind).astype(np.float64)
    else:
        raise RecordError(f"{path} holds an array of {dtype}, not of numbers")
    if numbers.size != count:
        raise RecordError(f"{path} is damaged: its array lacks numbers")
    ordered = numbers.reshape(shape, order="F" if is_fortran else "C")
    wanted = ordered[:ROWS]
    if not (np.isfinite(wanted) & (wanted == np.floor(wanted)) & (np.abs(wanted) < 2**53)).all():
        raise RecordError(f"{path}: the places of its faults are no whole numbers")
    with np.errstate(invalid="ignore"):
        return shape, ordered.astype(np.int64)


def _parts(value: Any) -> tuple[tuple[int, ...], str, bool, Any] | None:
    """Shape, dtype, whether columns come first, and contents of a pickled array; None: it is none."""
    if not isinstance(value, Call) or not isinstance(value.function, Global):
        return None
    name = value.function.name
    if name == "_reconstruct" and value.states and isinstance(value.states[0], tuple):
        state = value.states[0]
        if len(state) == 5 and isinstance(state[1], tuple):
            return state[1], _dtype(state[2]), bool(state[3]), state[4]
    if name == "_frombuffer" and len(value.args) == 4 and isinstance(value.args[2], tuple):
        body, dtype, shape, order = value.args
        if isinstance(body, Call) and body.args:
            body = body.args[0]
        return shape, _dtype(dtype), order == "F", body
    return None


def _dtype(value: Any) -> str:
    """A pickled dtype as numpy spells it, such as ``<i8``; "" for one that is none."""
    if not isinstance(value, Call) or not value.args or not isinstance(value.args[0], str):
        return ""
    state = value.states[0] if value.states else ()
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "<"
    return "O" if value.args[0].startswith("O") else f"{order}{value.args[0]}"


def _number(value: Any) -> float:
    """A number among objects; NaN for anything else."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Call) and isinstance(value.function, Global) and len(value.args) == 2:
        dtype, raw = _dtype(value.args[0]), value.args[1]
        if dtype[1:] in _NUMBERS and isinstance(raw, bytes) and len(raw) == np.dtype(dtype).itemsize:
            return float(np.frombuffer(raw, dtype)[0])
    return float("nan")
