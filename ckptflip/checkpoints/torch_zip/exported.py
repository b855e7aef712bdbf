"""Exported programs of PyTorch (``.pt2``, by ``torch.export.save``): plain members, listed in JSON.

Source: ``torch/export/pt2_archive`` and ``torch/_export/serde/schema.py`` at version 2.13.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError, bits_of
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.torch_zip.dtypes import Dtype, dtype_named
from ckptflip.checkpoints.torch_zip.names import part
from ckptflip.checkpoints.torch_zip.trees import Tree, View
from ckptflip.checkpoints.torch_zip.values import is_count
from ckptflip.checkpoints.zips import Members

_FOLDERS = (("data/weights", "_weights_config.json"), ("data/constants", "_constants_config.json"))
_LARGEST_LIST = 1 << 28
_STRIDED = 7
# The numbers of torch._export.serde.schema.ScalarType.
_DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip


class _Int(Struct, frozen=True):
    as_int: int | None = None


class _Meta(Struct, frozen=True):
    dtype: int
    sizes: tuple[_Int, ...]
    strides: tuple[_Int, ...]
    storage_offset: _Int
    layout: int


class _Payload(Struct, frozen=True):
    path_name: str
    use_pickle: bool = False
    tensor_meta: _Meta | None = None


class _Config(Struct, frozen=True):
    config: dict[str, _Payload]


def exported_trees(archive: Members, root: str) -> list[tuple[Tree, str]]:
    """The tensors of an exported program, and the folder of their storages; none for another archive.

    Raises:
        DamagedError: a list is not as it should be.
        CheckpointError: it cannot be read.
    """
    lists = [
        (folder, name[len(root) + len(folder) + 1 : -len(ending)], name)
        for folder, ending in _FOLDERS
        for name in archive
        if name.startswith(f"{root}{folder}/") and name.endswith(ending)
    ]
    several = len({model for _, model, _ in lists}) > 1
    found = []
    for folder, model, name in lists:
        try:
            config = msgspec.json.decode(archive.read(name, _LARGEST_LIST), type=_Config).config
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as why:
            raise DamagedError(f"{name} is not as it should be ({why})") from None
        found.append((_tree(config, f"{part(model)}/" if several else ""), folder))
    return found


def _tree(config: dict[str, _Payload], prefix: str) -> Tree:
    tree = Tree([], [], [])
    for key, payload in config.items():
        name = prefix + part(key)
        if payload.use_pickle or payload.tensor_meta is None:
            tree.skipped.append(Skipped(name, "it is pickled, or no tensor"))
        elif payload.tensor_meta.layout != _STRIDED:
            tree.skipped.append(Skipped(name, "it is sparse"))
        else:
            meta = payload.tensor_meta
            dtype = dtype_named(_DTYPES.get(meta.dtype, ""))
            if dtype is None:
                tree.skipped.append(Skipped(name, "its dtype is not known"))
            else:
                tree.views.append(_view(name, payload.path_name, dtype, meta))
    return tree


def _view(name: str, storage: str, dtype: Dtype, meta: _Meta) -> View:
    shape, strides = tuple(n.as_int for n in meta.sizes), tuple(n.as_int for n in meta.strides)
    offset = meta.storage_offset.as_int
    lengths, steps = tuple(n for n in shape if is_count(n)), tuple(n for n in strides if is_count(n))
    if lengths != shape or steps != strides or len(shape) != len(strides) or not is_count(offset):
        raise DamagedError(f"{name} has a shape that is not known, or impossible")
    bits_of(lengths, dtype.itemsize * 8)
    return View(name, storage, dtype, offset, lengths, steps)
