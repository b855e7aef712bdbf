"""Write a training state: walk it once, datasets and groups as they come."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ckptflip.errors import CheckpointError
from ckptflip.torch_h5 import arrays, plain
from ckptflip.torch_h5.names import RESERVED, member_name

SCHEMA = "torch_h5/1"


def save(state: Any, path: Path) -> None:
    """Write the file under another name beside `path`, and rename it when it is complete and on disk."""
    if not (isinstance(state, dict) or type(state) in (list, tuple)):
        raise CheckpointError(f"a training state is a dict, list or tuple, not a {type(state).__name__}")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with h5py.File(draft, "w") as file:
            file.attrs["ckptflip"] = SCHEMA
            _Writer().container(file, state, "state")
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    except RecursionError as error:
        raise CheckpointError(f"{path}: the state is nested too deeply, or holds itself") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


class _Writer:
    """One walk over one state; remembers where each tensor was written."""

    def __init__(self) -> None:
        self._written: dict[tuple[Any, ...], h5py.Dataset] = {}

    def container(self, group: h5py.Group, value: Any, where: str) -> None:
        if isinstance(value, dict):
            self._dict(group, value, where)
            return
        group.attrs["container"] = type(value).__name__
        group.attrs["length"] = len(value)
        for index, item in enumerate(value):
            self._member(group, str(index), item, f"{where}[{index}]")

    def _dict(self, group: h5py.Group, value: dict[Any, Any], where: str) -> None:
        kind = type(value)
        if plain.DICTS.get(kind.__name__) is not kind:
            raise CheckpointError(f"{where} is a {kind.__name__}: turn it into a plain dict to store it")
        group.attrs["container"] = kind.__name__
        self._metadata(group, value, where)
        taken: set[str] = set()
        names: dict[Any, str] = {}
        for key, item in value.items():
            _check_key(key, where)
            name = member_name(key, taken, RESERVED if plain.is_plain(item) else ())
            taken.add(name)
            names[key] = name
            self._member(group, name, item, f"{where}[{key!r}]")
        # A string that is its member's own name stands for both, which keeps the list readable.
        group.attrs["keys"] = plain.dumps(
            [key if name == key else (key, name) for key, name in names.items()], where
        )
        _name_parameters(group, value, names)

    def _metadata(self, group: h5py.Group, value: dict[Any, Any], where: str) -> None:
        """Keep `_metadata`, which `Module.state_dict` hangs on its OrderedDict for later versions."""
        extra = getattr(value, "__dict__", {})
        if unknown := set(extra) - {"_metadata"}:
            raise CheckpointError(
                f"{where} has attributes that cannot be stored: {', '.join(sorted(unknown))}"
            )
        if extra:
            group.attrs["metadata"] = plain.dumps(extra["_metadata"], f"{where}._metadata")

    def _member(self, group: h5py.Group, name: str, value: Any, where: str) -> None:
        if isinstance(value, torch.Tensor):
            self._tensor(group, name, value, where)
        elif isinstance(value, np.ndarray):
            arrays.write_array(group, name, value, where)
        elif plain.is_plain(value):
            group.attrs[name] = plain.dumps(value, where)
        else:
            self.container(group.create_group(name), value, where)

    def _tensor(self, group: h5py.Group, name: str, tensor: torch.Tensor, where: str) -> None:
        arrays.check_tensor(tensor, where)
        identity = _identity(tensor)
        if identity in self._written:
            group[name] = self._written[identity]
        else:
            self._written[identity] = arrays.write_tensor(group, name, tensor)


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Empty tensors all have the address 0, so only the same object is the same tensor.
    if tensor.numel() == 0:
        return (id(tensor),)
    return (
        tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
        tensor.dtype, tensor.device, type(tensor), tensor.requires_grad, tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def _check_key(key: Any, where: str) -> None:
    if type(key) is tuple:
        for part in key:
            _check_key(part, where)
    elif key is not None and type(key) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where} has the key {key!r} of type {type(key).__name__}, which cannot be stored"
        )


def _name_parameters(group: h5py.Group, value: Mapping[Any, Any], names: Mapping[Any, str]) -> None:
    """Give each state of an optimizer the name of its parameter, where the optimizer knows the names."""
    groups, states = value.get("param_groups"), value.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(states, dict):
        return
    inside = group[names["state"]]
    for one in groups:
        if not isinstance(one, dict):
            continue
        indices, parameters = one.get("params"), one.get("param_names")
        if not isinstance(indices, list) or not isinstance(parameters, list):
            continue
        for index, parameter in zip(indices, parameters, strict=False):
            if str(index) in inside and isinstance(parameter, str):
                inside[str(index)].attrs["name"] = parameter
