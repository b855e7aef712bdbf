"""The dict in a pickled CIFAR file, read without running the pickle.

The official files were pickled by Python 2 (protocol 2): keys and pixels are byte strings, the pixels an
array made by ``numpy.core.multiarray._reconstruct`` and its state. Files that Python 3 pickled are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.checkpoints.torch_zip.pickles import parse
from ckptflip.checkpoints.torch_zip.values import Call, Global, Pairs
from ckptflip.errors import CheckpointError, WorkloadError

_PIXELS = 3 * 32 * 32
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
# The longest is CIFAR-100's training set, of 154 MB; Python 3 pickles bytes above 127 as two in protocol 2.
_LONGEST_STRING = 1 << 29


def read(file: IO[bytes], size: int, where: str, label: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels and labels of a batch.

    Args:
        file: at its beginning; read forward.
        size: its length in bytes.
        where: its name, for messages.
        label: key of the labels.

    Returns:
        uint8[n, 3072] and int64[n], n at least 1.

    Raises:
        WorkloadError: no sound pickle, or it holds something else.
    """

    def window(at: int, count: int) -> bytes:
        file.seek(at)
        return file.read(count)

    try:
        value = parse(window, size, where, _LONGEST_STRING)
    except CheckpointError as error:
        raise WorkloadError(
            str(error).replace("Copy or download the checkpoint", "Download and unpack it")
        ) from None
    entries = _entries(value, where)
    missing = [key for key in ("data", label) if key not in entries]
    if missing:
        raise WorkloadError(
            f"{where} lacks {' and '.join(missing)}, which CIFAR's files have; it holds "
            f"{', '.join(sorted(entries)) or 'nothing'}"
        )
    pixels = _pixels(entries["data"], where)
    labels = _labels(entries[label], where)
    if len(pixels) != len(labels) or not len(labels):
        raise WorkloadError(f"{where} is damaged: {len(pixels)} images, {len(labels)} labels")
    return pixels, labels


def _entries(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Pairs):
        raise WorkloadError(f"{where} holds no dict, as CIFAR's files do")
    named = ((_bytes(key), item) for key, item in value.pairs or [])
    return {key.decode("latin-1"): item for key, item in named if key is not None}


def _pixels(value: Any, where: str) -> NDArray[np.uint8]:
    refusal = WorkloadError(f"{where}: its data is no array of uint8[n, {_PIXELS}], as in CIFAR's files")
    made = isinstance(value, Call) and isinstance(value.function, Global) and value.function.path in _ARRAYS
    states = value.states if made else None
    if not states or not isinstance(states[-1], tuple) or len(states[-1]) != 5:
        raise refusal
    _, shape, dtype, fortran, stored = states[-1]
    whole = isinstance(shape, tuple) and len(shape) == 2 and type(shape[0]) is int and shape[0] > 0
    if not whole or shape[1] != _PIXELS or not _is_uint8(dtype):
        raise refusal
    content = _bytes(stored)
    if content is None or len(content) != shape[0] * _PIXELS:
        raise WorkloadError(f"{where} is damaged: its data does not hold {shape[0]} images")
    flat = np.frombuffer(content, np.uint8)
    return np.ascontiguousarray(flat.reshape(shape, order="F" if fortran is True else "C"))


def _is_uint8(dtype: Any) -> bool:
    called = isinstance(dtype, Call) and dtype.function == Global("numpy", "dtype")
    return called and bool(dtype.args) and _bytes(dtype.args[0]) in (b"u1", b"|u1", b"uint8")


def _labels(value: Any, where: str) -> NDArray[np.int64]:
    if not isinstance(value, Sequence) or not all(type(one) is int and 0 <= one < 1 << 31 for one in value):
        raise WorkloadError(f"{where}: its labels are no list of whole numbers")
    return np.array(value, np.int64)


def _bytes(value: Any) -> bytes | None:
    """A byte string in any of its spellings: Python 2's str, Python 3's bytes, and those in protocol 2."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Call) and value.function == Global("_codecs", "encode"):
        value = value.args[0] if value.args else None
    if not isinstance(value, str):
        return None
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return None
