"""PyTorch's zip: a state dict as `torch.save` writes it, put together without PyTorch.

Layout: `archive/data.pkl` (pickle protocol 2, which names torch's own functions), one record per storage
under `archive/data/`, each at a multiple of 64 bytes. `torch.load(path, weights_only=True)` reads it.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckptflip.checkpoints.pieces import strides_of
from ckptflip.checkpoints.writers import Entry, raw
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor

# Storage classes of the dtypes that torch.save writes as typed storages.
_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage",
    "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage", "complex128": "ComplexDoubleStorage",
}  # fmt: skip
# The others lie in untyped storages, their dtype beside them.
_NAMED = frozenset(
    (
        *("uint16", "uint32", "uint64", "complex32"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
)
_NUMBER = re.compile(r"0|[1-9]\d{0,8}")
_ALIGNMENT = 64
_ROOT = "archive"
Tree = dict["str | int", "Tree | int"]


def unfit(tensor: Tensor) -> str | None:
    """Why PyTorch cannot hold a tensor; None if it can."""
    name = tensor.number.name
    return None if name in _STORAGES or name in _NAMED else f"PyTorch has no {name}"


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file. See `ckptflip.checkpoints.writers.Writer`."""
    tree: Tree = {}
    for i, entry in enumerate(entries):
        for name in (entry.tensor.name, *entry.tensor.aliases):
            _plant(tree, name, i)
    with path.open("wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, out, "data.pkl", [bytes(_pickled(tree, [e.tensor for e in entries]))])
        _record(archive, out, ".format_version", [b"1"])
        _record(archive, out, ".storage_alignment", [str(_ALIGNMENT).encode()])
        _record(archive, out, "byteorder", [b"little"])
        for i, entry in enumerate(entries):
            _record(archive, out, f"data/{i}", (raw(b) for b in entry.blocks()))
        _record(archive, out, "version", [b"3\n"])


def _plant(tree: Tree, name: str, tensor: int) -> None:
    """Put a tensor into nested dictionaries: `optimizer/state/0/exp_avg` lies three deep.

    PyTorch's optimizers number their parameters; all other keys are text.
    """
    parts = name.split("/")
    numbered = (a == "state" and _NUMBER.fullmatch(b) for a, b in zip(["", *parts], parts, strict=False))
    *folders, leaf = (int(p) if n else p for p, n in zip(parts, numbered, strict=True))
    for folder in folders:
        below = tree.setdefault(folder, {})
        if not isinstance(below, dict):
            raise CheckpointError(f"{name!r} cannot be written: {folder!r} is a tensor and would hold others")
        tree = below
    if leaf in tree:
        raise CheckpointError(f"{name!r} cannot be written: there are two tensors, or others within it")
    tree[leaf] = tensor


def _record(archive: zipfile.ZipFile, out: Any, name: str, blocks: Any) -> None:
    """Write one member whose data begin at a multiple of the alignment."""
    member = zipfile.ZipInfo(f"{_ROOT}/{name}")
    # What the local header takes: 30 bytes, the name, the zip64 sizes, and then the padding's own 4 bytes.
    behind = out.tell() + 30 + len(member.filename.encode()) + 20 + 4
    padding = -behind % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=True) as file:
        for block in blocks:
            file.write(block)


def _pickled(tree: Tree, tensors: Sequence[Tensor]) -> Iterator[int]:
    yield from b"\x80\x02"
    yield from _dictionary(tree, tensors)
    yield from b"."


def _dictionary(tree: Tree, tensors: Sequence[Tensor]) -> bytes:
    parts = [b"}("]
    for key, value in tree.items():
        parts.append(_integer(key) if isinstance(key, int) else _text(key))
        parts.append(
            _dictionary(value, tensors) if isinstance(value, dict) else _tensor(value, tensors[value])
        )
    return b"".join([*parts, b"u"])


def _tensor(storage: int, tensor: Tensor) -> bytes:
    """A call of torch's function that makes a tensor of a storage: (storage, offset, size, stride, …)."""
    name = tensor.number.name
    typed = name in _STORAGES
    kind = _global("torch", _STORAGES[name]) if typed else _global("torch.storage", "UntypedStorage")
    # A storage is named by what `persistent_load` gets: ("storage", class, key, device, elements).
    elements = tensor.size if typed else tensor.nbytes
    place = b"(" + _text("storage") + kind + _text(str(storage)) + _text("cpu") + _integer(elements) + b"tQ"
    strides = strides_of(tensor.shape, 1)
    arguments = [place, _integer(0), _integers(tensor.shape), _integers(strides), b"\x89", _hooks()]
    if not typed:
        arguments.append(_global("torch", name))
    function = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
    return _global("torch._utils", function) + b"(" + b"".join(arguments) + b"tR"


def _hooks() -> bytes:
    return _global("collections", "OrderedDict") + b")R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def _integer(number: int) -> bytes:
    if 0 <= number < 1 << 31:
        return b"J" + number.to_bytes(4, "little")
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _integers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"
