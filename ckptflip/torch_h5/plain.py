"""Plain Python values as JSON with type tags: what a training state holds besides arrays.

JSON's own types stand for themselves; every other type is an object with one member, named by the type:
``{"tuple": [0.9, 0.999]}``, ``{"float": "nan"}``, ``{"bytes": "00ff"}``.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ckptflip.errors import CheckpointError

DICTS: dict[str, type[dict[Any, Any]]] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
# Longer integers are written in hex: Python refuses to read decimal ones of more than 4300 digits.
_LONGEST_DECIMAL_BITS = 1024


def dumps(value: Any, where: str) -> str:
    """Write a plain value as ASCII text; NULs and lone surrogates are escaped by JSON.

    Args:
        value: what to write.
        where: its place in the state, for the message when it cannot be stored.

    Example:
        >>> dumps((0.9, float("nan")), "state")
        '{"tuple": [0.9, {"float": "nan"}]}'
        >>> loads(_)
        (0.9, nan)
    """
    return json.dumps(encode(value, where))


def loads(text: str) -> Any:
    """Read what `dumps` wrote."""
    return decode(json.loads(text))


def is_plain(value: Any) -> bool:
    """Say whether a value is stored as one JSON text: neither an array nor a container of arrays or dicts."""
    if isinstance(value, (torch.Tensor, np.ndarray, dict)):
        return False
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)
    return True


def encode(value: Any, where: str) -> Any:
    """Turn a value into JSON's types."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value.bit_length() <= _LONGEST_DECIMAL_BITS else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": _nonfinite(value)}
    if kind is list:
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if kind in (tuple, torch.Size):
        tag = "tuple" if kind is tuple else "torch.Size"
        return {tag: [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if kind in DICTS.values():
        pairs = [[encode(k, f"{where}'s key"), encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
        return {kind.__name__: pairs}
    if kind is complex:
        return {"complex": [encode(value.real, where), encode(value.imag, where)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.dtype:
        return {"torch.dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"torch.device": str(value)}
    if isinstance(value, np.generic):
        return {"numpy": [dtype_name(value.dtype, where), np.asarray(value).tobytes().hex()]}
    hint = " (turn it into a plain dict)" if isinstance(value, dict) else ""
    raise CheckpointError(f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored{hint}")


def decode(value: Any) -> Any:
    """Turn what `encode` made back into the value; ValueError for anything `encode` never makes."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"not a tagged value: {value!r}")
    ((tag, content),) = value.items()
    if tag in DICTS:
        return DICTS[tag]({decode(key): decode(item) for key, item in content})
    if tag in _DECODERS:
        return _DECODERS[tag](content)
    raise ValueError(f"unknown type tag {tag!r}")


def dtype_name(dtype: np.dtype, where: str) -> str:
    """Name a numpy dtype so that `dtype_of` finds it: ``<f4``, ``bfloat16``; refuse objects and structs."""
    if hasattr(ml_dtypes, dtype.name):
        return dtype.name
    if dtype.hasobject or dtype.fields or dtype.subdtype or dtype.itemsize == 0:
        raise CheckpointError(f"{where} has the numpy dtype {dtype}, which cannot be stored")
    return dtype.str


def dtype_of(name: str) -> np.dtype:
    """Find the numpy dtype of a name made by `dtype_name`."""
    dtype = np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)
    if dtype.hasobject:
        raise ValueError(f"dtype {name!r} holds Python objects")
    return dtype


def _nonfinite(value: float) -> str:
    # A NaN other than Python's own carries a payload, which its eight bytes keep.
    packed = struct.pack(">d", value)
    if math.isnan(value) and packed != struct.pack(">d", math.nan):
        return f"0x{packed.hex()}"
    return repr(value)


def _float(text: str) -> float:
    return struct.unpack(">d", bytes.fromhex(text[2:]))[0] if text.startswith("0x") else float(text)


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this PyTorch has no dtype {name!r}")
    return dtype


def _numpy_scalar(content: list[str]) -> Any:
    name, data = content
    return np.frombuffer(bytes.fromhex(data), dtype_of(name))[0]


_DECODERS: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "float": _float,
    "complex": lambda parts: complex(decode(parts[0]), decode(parts[1])),
    "bytes": bytes.fromhex,
    "tuple": lambda items: tuple(decode(item) for item in items),
    "torch.Size": lambda items: torch.Size(items),
    "torch.dtype": _torch_dtype,
    "torch.device": torch.device,
    "numpy": _numpy_scalar,
}
