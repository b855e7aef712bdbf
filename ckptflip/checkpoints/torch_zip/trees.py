"""The tensors in what a pickle describes: their names, and which part of which storage each one is.

Source of the functions that rebuild tensors: ``torch/_utils.py`` and ``torch/_tensor.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError, bits_of
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.torch_zip.dtypes import Dtype, dtype_of, storage_dtype
from ckptflip.checkpoints.torch_zip.names import part
from ckptflip.checkpoints.torch_zip.values import (
    Call,
    Global,
    Pairs,
    Persistent,
    is_count,
    pairs_of,
    states_of,
)

_DEEPEST = 64
# A container that is met again is walked again, for all names of its tensors: up to so many values.
_MOST_AGAIN = 1 << 18
_LONGEST_NAMES = 1 << 28
_ATOMS = (int, float, str, bytes, type(None))
_SPARSE_PARTS = {
    "sparse_coo": ("indices", "values"),
    "sparse_csr": ("crow_indices", "col_indices", "values"),
    "sparse_csc": ("ccol_indices", "row_indices", "values"),
    "sparse_bsr": ("crow_indices", "col_indices", "values"),
    "sparse_bsc": ("ccol_indices", "row_indices", "values"),
}
_NUMPY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")


class View(Struct, frozen=True):
    """A tensor as a part of a storage.

    Attributes:
        name: in the checkpoint.
        storage: the storage's key.
        dtype: of the elements.
        offset: of the first element, in what the dtype counts.
        shape: as PyTorch has it.
        strides: likewise.
        parent: the number of the container that holds it.
        slot: for optimizer state: the number of the optimizer, and the parameter's key in it.
    """

    name: str
    storage: str
    dtype: Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    parent: int = 0
    slot: tuple[int, int | str] | None = None


class Tree(Struct, frozen=True):
    """What was found.

    Attributes:
        views: tensors, in the file's order; several may share words.
        skipped: what looks like a tensor, but is none that can be altered.
        optimizers: the parameter groups of each optimizer's state, as the pickle has them.
    """

    views: list[View]
    skipped: list[Skipped]
    optimizers: list[list[Any]]


def tensors_in(value: Any, name: str = "") -> Tree:
    """The tensors of a value.

    Args:
        value: what `ckptflip.checkpoints.torch_zip.pickles.parse` gives.
        name: of the value itself, before all names; a tensor without any is called ``tensor``.

    Raises:
        DamagedError: a tensor is described in an impossible way.
    """
    walker = _Walker()
    walker.visit(value, name, _Place())
    return Tree(walker.views, walker.skipped, walker.optimizers)


class _Place(Struct, frozen=True):
    """Where the walk is: how deep, inside which container, in a module, in an optimizer's slot."""

    depth: int = 0
    parent: int = 0
    module: bool = False
    slot: tuple[int, int | str] | None = None

    def deeper(self) -> _Place:
        """The place of what stands for a value, under the same name."""
        return _Place(self.depth + 1, self.parent, self.module, self.slot)


class _Walker:
    def __init__(self) -> None:
        self.views: list[View] = []
        self.skipped: list[Skipped] = []
        self.optimizers: list[list[Any]] = []
        self._seen: set[int] = set()
        self._path: set[int] = set()
        self._again_left = _MOST_AGAIN
        self._containers = 0
        self._letters = 0

    def visit(self, value: Any, name: str, place: _Place) -> None:
        """Look for tensors in a value."""
        if isinstance(value, _ATOMS) or id(value) in self._path:
            return
        if place.depth > _DEEPEST:
            self._skip(name, "it is nested too deep")
            return
        if id(value) in self._seen:
            self._again_left -= _weight(value)
            if self._again_left < 0:
                return
        self._seen.add(id(value))
        self._path.add(id(value))
        if isinstance(value, Persistent):
            self._bare_storage(value, name, place)
        elif isinstance(value, Call):
            path = value.function.path if isinstance(value.function, Global) else ""
            _HANDLERS.get(path, _Walker._object)(self, value, name, place)
        elif isinstance(value, Pairs):
            self._mapping(value, name, place)
        elif isinstance(value, list | tuple):
            self._children(enumerate(value), name, place)
        self._path.discard(id(value))

    def _children(
        self, pairs: Iterable[tuple[Any, Any]], name: str, place: _Place, module: bool = False
    ) -> None:
        """Visit what lies in a container, under its keys."""
        self._containers += 1
        inside = _Place(place.depth + 1, self._containers, module, place.slot)
        joined = f"{name}{'.' if place.module and module else '/'}" if name else ""
        for key, value in pairs:
            if not isinstance(value, _ATOMS):
                self.visit(value, joined + part(key), inside)

    def _mapping(self, value: Pairs | Call, name: str, place: _Place) -> None:
        pairs = pairs_of(value)
        few = pairs if len(pairs) < 64 else ()
        found = {key: value for key, value in few if key == "state" or key == "param_groups"}
        groups = found.get("param_groups")
        if not isinstance(groups, list) or not isinstance(found.get("state"), Pairs | Call):
            self._children(pairs, name, place)
            return
        self.optimizers.append(groups)
        self._children((p for p in pairs if p[0] != "state"), name, place)
        number, prefix = len(self.optimizers) - 1, f"{name}/state" if name else "state"
        for key, slots in pairs_of(found["state"]):
            slot = (number, key) if isinstance(key, int | str) else None
            self.visit(slots, f"{prefix}/{part(key)}", _Place(place.depth + 2, slot=slot))

    def _object(self, call: Call, name: str, place: _Place) -> None:
        """Any object: what it is made from, its attributes, what it holds."""
        self._children(enumerate(call.args), name, place)
        for state in states_of(call):
            self._attributes(state, call, name, place)
        if call.pairs:
            self._mapping(call, name, place)
        self._children(enumerate(call.items or ()), name, place)

    def _attributes(self, state: Any, call: Call, name: str, place: _Place) -> None:
        if not isinstance(state, Pairs):
            self.visit(state, name, place.deeper())
            return
        pairs = pairs_of(state)
        keys = {k for k, _ in pairs if isinstance(k, str)}
        if {"_parameters", "_buffers", "_modules"} <= keys:
            # A whole torch.nn.Module: its tensors get the names they have in its state_dict.
            for key, value in pairs:
                inner = key in ("_parameters", "_buffers", "_modules")
                self._children(pairs_of(value) if inner else [(key, value)], name, place, module=True)
            return
        script = isinstance(call.function, Global) and call.function.module.startswith("__torch__")
        self._children(pairs, name, place, module=script)

    def _bare_storage(self, storage: Persistent, name: str, place: _Place) -> None:
        key, dtype, count = _storage(storage, name)
        if dtype is None:
            self._skip(name, "its storage is of an unknown type")
        else:
            self._add(View(name, key, dtype, 0, (count,), (1,), place.parent, place.slot))

    def _dense(self, call: Call, name: str, place: _Place) -> None:
        """``_rebuild_tensor``, ``_v2`` and ``_v3``, ``_rebuild_qtensor``: storage, offset, size, strides."""
        if len(call.args) < 4:
            raise DamagedError(f"{name or 'its tensor'} is described by too little")
        storage, offset, size, strides = call.args[:4]
        key, dtype, _ = _storage(storage, name)
        if call.function.name == "_rebuild_tensor_v3":
            dtype = dtype_of(call.args[6]) if len(call.args) > 6 else None
        if dtype is None:
            self._skip(name, "its dtype is not known")
            return
        lazy = dict(pairs_of(call.args[-1])) if len(call.args) > 6 else {}
        if lazy.get("conj") or lazy.get("neg"):
            # What the loader shows is not what is stored: a record's values would be wrong.
            self._skip(name, "stored before it is conjugated or negated; save tensor.resolve_conj()")
            return
        shape, steps = _lengths(size, name), _lengths(strides, name)
        if len(shape) != len(steps) or not is_count(offset):
            raise DamagedError(f"{name or 'its tensor'} has the shape {shape} with the strides {steps}")
        self._add(View(name, key, dtype, offset, shape, steps, place.parent, place.slot))
        if call.function.name == "_rebuild_qtensor" and len(call.args) > 4:
            scheme = call.args[4]
            if isinstance(scheme, tuple) and len(scheme) > 2:
                # Scales and zero points per channel are tensors; one for all are plain numbers.
                self._children(zip(("scales", "zero_points"), scheme[1:3], strict=True), name, place)

    def _wrapped(self, call: Call, name: str, place: _Place) -> None:
        """A parameter, a list of TorchScript's …: what is wrapped, and attributes given to it."""
        self.visit(call.args[0] if call.args else None, name, place.deeper())
        for extra in call.args[1:]:
            if isinstance(extra, Pairs):
                self._children(pairs_of(extra), name, place)

    def _typed(self, call: Call, name: str, place: _Place) -> None:
        """``_rebuild_from_type_v2``: a function, the tensor's class, the function's arguments, attributes."""
        if len(call.args) < 3 or not isinstance(call.args[2], tuple):
            raise DamagedError(f"{name or 'its tensor'} is described by too little")
        function, _, args, *states = call.args
        if function != Global("torch._utils", "_rebuild_wrapper_subclass"):
            self.visit(Call(function, args), name, place.deeper())
        for state in states:
            for each in state if isinstance(state, tuple) else (state,):
                for key, value in pairs_of(each):
                    if key == "_local_tensor":
                        # The part of a distributed tensor that this process holds.
                        self.visit(value, name, place.deeper())
                    elif key != "_spec":
                        self._children([(key, value)], name, place)

    def _sparse(self, call: Call, name: str, place: _Place) -> None:
        layout, data = (*call.args, None, None)[:2]
        if isinstance(layout, Call):
            layout = layout.args[0] if layout.args else None
        known = layout.rpartition(".")[2] if isinstance(layout, str) else ""
        if not isinstance(data, tuple) or known not in _SPARSE_PARTS:
            self._skip(name, "it is a sparse tensor of an unknown layout")
            return
        self._children(zip(_SPARSE_PARTS[known], data, strict=False), name, place)

    def _nested(self, call: Call, name: str, place: _Place) -> None:
        parts = ("buffer", "sizes", "strides", "offsets")
        self._children(zip(parts, call.args, strict=False), name, place)

    def _meta(self, call: Call, name: str, place: _Place) -> None:
        self._skip(name, "a meta tensor has no data")

    def _subclass(self, call: Call, name: str, place: _Place) -> None:
        self._skip(name, "a tensor subclass without data of its own")

    def _numpy(self, call: Call, name: str, place: _Place) -> None:
        self._skip(name, "a numpy array lies inside the pickle")

    def _skip(self, name: str, reason: str) -> None:
        self._count(name)
        self.skipped.append(Skipped(name or "tensor", reason))

    def _add(self, view: View) -> None:
        try:
            bits_of(view.shape, view.dtype.itemsize * 8)
        except DamagedError as why:
            raise DamagedError(f"{view.name or 'its tensor'}: {why}") from None
        self._count(view.name)
        self.views.append(view if view.name else _renamed(view, "tensor"))

    def _count(self, name: str) -> None:
        self._letters += len(name)
        if self._letters > _LONGEST_NAMES:
            raise DamagedError("the names of its tensors are too long")


def _renamed(view: View, name: str) -> View:
    return View(name, view.storage, view.dtype, view.offset, view.shape, view.strides, view.parent, view.slot)


def _weight(value: Any) -> int:
    """How many values are looked at when this one is walked again."""
    weight = 1 + len(pairs_of(value))
    if isinstance(value, Call):
        weight += len(value.args) + len(value.items or ()) + sum(_weight(s) for s in _flat(states_of(value)))
    elif isinstance(value, list | tuple):
        weight += len(value)
    return weight


def _flat(states: Iterable[Any]) -> Iterable[Any]:
    """States without those that are objects themselves: these are weighed when they are met."""
    return (s for s in states if not isinstance(s, Call))


def _storage(value: Any, name: str) -> tuple[str, Dtype | None, int]:
    """The key, the dtype and the elements of a storage: ("storage", its class, key, device, elements)."""
    parts = value.id if isinstance(value, Persistent) else None
    if not isinstance(parts, tuple) or len(parts) < 5 or parts[0] != "storage":
        raise DamagedError(f"{name or 'its tensor'} has no storage")
    kind, key, count = parts[1], parts[2], parts[4]
    if not isinstance(key, str) or not is_count(count):
        raise DamagedError(f"{name or 'its tensor'} has a storage without key or size")
    dtype = storage_dtype(kind)
    return key, dtype, count


def _lengths(value: Any, name: str) -> tuple[int, ...]:
    """A shape or strides: a tuple, or a ``torch.Size`` made from one."""
    if isinstance(value, Call) and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple | list) or not all(is_count(n) for n in value):
        raise DamagedError(f"{name or 'its tensor'} has lengths that are no numbers, or negative")
    return tuple(value)


_Handler = Callable[[_Walker, Call, str, _Place], None]
_HANDLERS: dict[str, _Handler] = {
    **{
        f"torch._utils.{name}": _Walker._dense
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
    },
    "torch._utils._rebuild_parameter": _Walker._wrapped,
    "torch._utils._rebuild_parameter_with_state": _Walker._wrapped,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Walker._wrapped,
    "torch._utils._rebuild_device_tensor_from_numpy": _Walker._wrapped,
    "torch._utils._rebuild_xla_tensor": _Walker._wrapped,
    "torch.nested._internal.nested_tensor._rebuild_njt": _Walker._wrapped,
    **dict.fromkeys(
        (f"torch.jit._pickle.build_{kind}list" for kind in ("tensor", "int", "double", "bool")),
        _Walker._wrapped,
    ),
    "torch._tensor._rebuild_from_type_v2": _Walker._typed,
    "torch._tensor._rebuild_from_type": _Walker._typed,
    "torch._utils._rebuild_sparse_tensor": _Walker._sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _Walker._sparse,
    "torch._utils._rebuild_nested_tensor": _Walker._nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _Walker._meta,
    "torch._utils._rebuild_wrapper_subclass": _Walker._subclass,
    **dict.fromkeys(_NUMPY, _Walker._numpy),
}
