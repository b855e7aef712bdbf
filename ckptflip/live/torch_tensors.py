"""A PyTorch model, its optimizer and its gradients as a target for faults, where they are in memory."""

from __future__ import annotations

import copy
import operator
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptflip.checkpoints.target import Skipped
from ckptflip.errors import LiveError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.live import torch_words
from ckptflip.live.torch_catalogue import Fetch, Found, catalogue, named, nested
from ckptflip.torch_h5.names import member_name

_DTYPE = operator.attrgetter("dtype")


class TorchTarget:
    """The tensors of a PyTorch model in memory; see `ckptflip.live.LiveTarget`.

    Names are those that the same state has in a file of `ckptflip.torch_h5`: ``model/conv1.weight``,
    ``buffers/cache`` for buffers that a state dict leaves out, ``optimizer/state/0/exp_avg``; and
    ``gradients/conv1.weight``. What wraps a model (``torch.compile``, ``DistributedDataParallel``) adds
    nothing to its names. Tied parameters are one tensor with aliases. No tensor is copied: words are altered
    where they are, unseen by autograd, as by a fault in memory.

    Args:
        model: its parameters and buffers.
        optimizer: the tensors in its state, once it has made them; most optimizers do in their first step.
        gradients: the ``.grad`` of every parameter of the model, where there is one.

    Raises:
        UsageError: neither a model nor an optimizer, or what is none; gradients without a model; a scripted
            model.

    Example:
        >>> target = TorchTarget(torch.nn.BatchNorm1d(2))
        >>> [t.name for t in target.tensors if t.role == "statistic"]
        ['model/running_mean', 'model/running_var']
    """

    format = "pytorch live"

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        gradients: bool = False,
    ) -> None:
        if model is None and optimizer is None:
            raise UsageError("a target needs a model, an optimizer or both")
        if gradients and model is None:
            raise UsageError("gradients were asked for without a model: pass the model too")
        self._model = None if model is None else unwrapped(model)
        self._optimizer = None if optimizer is None else _checked(inner_optimizer(optimizer))
        self._gradients = gradients
        self._shape = _Structure(self._model)
        self._tensors: Sequence[Tensor] = ()
        self._fetch: list[Fetch] = []
        self._slots: list[Fetch] = []
        self._places: list[Any] = []
        self._seen: list[Any] = []
        self.skipped: Sequence[Skipped] = ()

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The catalogue as of now: the same object again for as long as nothing has changed.

        Raises:
            LiveError: parameters or modules were added, removed or replaced since the target was made.
        """
        self._shape.check()
        seen = self._marks()
        if seen != self._seen or not self._fetch or any(slot() is None for slot in self._slots):
            found = self._found()
            self._tensors, self._fetch, self.skipped = catalogue(found)
            self._slots = [fetch for fetch in self._fetch if isinstance(fetch, weakref.ref)]
            self._places = [_mark(fetch()) for fetch in self._fetch]
            self._seen = seen
        return self._tensors

    def holds(self, catalogue: Sequence[Tensor], tensors: Iterable[int]) -> bool:
        """Whether some tensors of a catalogue are where they were when it was given out; looks at no others.

        Args:
            catalogue: as `tensors` gave it.
            tensors: positions in it.
        """
        if catalogue is not self._tensors:
            return False
        for i in tensors:
            tensor = self._fetch[i]()
            if tensor is None or _mark(tensor) != self._places[i]:
                return False
        return True

    def tensor(self, tensor: int) -> torch.Tensor:
        """One tensor of the catalogue itself."""
        found: torch.Tensor = self._fetch[tensor]()
        return found

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned; nothing else of the tensor is read."""
        return torch_words.read(self._fetch[tensor](), self._tensors[tensor].number, words)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor, in place. Positions are distinct."""
        torch_words.xor(self._fetch[tensor](), self._tensors[tensor].number, words, masks)

    def foreseen(self) -> tuple[Sequence[Tensor], bool]:
        """The catalogue as it will be when an optimizer has taken a step and there are gradients.

        The optimizer is rehearsed on tensors without memory, so that nothing of the real ones is touched.

        Returns:
            The catalogue, and whether it is certain: False for an optimizer that cannot be rehearsed.
        """
        self._shape.check()
        found, certain = list(self._of_model()), True
        if self._gradients:
            found += self._of_gradients(expected=True)
        if self._optimizer is not None:
            state = self._optimizer.state
            if not state:
                state, certain = _rehearsed(self._optimizer)
            found += self._of_optimizer(state)
        return catalogue(found, foreseen=True)[0], certain

    def _found(self) -> list[Found]:
        found = list(self._of_model())
        if self._optimizer is not None:
            found += self._of_optimizer(self._optimizer.state)
        if self._gradients:
            found += self._of_gradients()
        return found

    def _marks(self) -> list[Any]:
        """What tells whether the catalogue still holds."""
        marks = _marks(self._shape.tensors())
        if self._optimizer is not None:
            marks += _slot_marks(self._optimizer.state)
        if self._gradients:
            marks += [p.grad is None or p.grad.layout for p in self._shape.parameters]
        return marks

    def _of_model(self) -> Iterator[Found]:
        if self._model is None:
            return
        kept: dict[str, Fetch] = {}
        unsaved: dict[str, Fetch] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            prefix = f"{name}." if name else ""
            for key in _present(module._parameters):
                kept[prefix + key] = _member(module._parameters, key)
            for key in _present(module._buffers):
                own = unsaved if key in module._non_persistent_buffers_set else kept
                own[prefix + key] = _member(module._buffers, key)
        for group, members in (("model", kept), ("buffers", unsaved)):
            yield from named(group, members)

    def _of_gradients(self, expected: bool = False) -> Iterator[Found]:
        if self._model is None:
            return
        present: dict[str, Fetch] = {}
        for name, parameter in self._model.named_parameters():
            if expected and parameter.requires_grad:
                present[name] = _itself(parameter)
            elif not expected and parameter.grad is not None:
                present[name] = _gradient(parameter)
        yield from named("gradients", present)

    def _of_optimizer(self, state: Mapping[Any, Any]) -> Iterator[Found]:
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        known = {} if self._model is None else {id(p): n for n, p in self._model.named_parameters()}
        numbers: dict[int, int] = {}
        for group in groups:
            names = group.get("param_names", ())
            for i, parameter in enumerate(group["params"]):
                numbers.setdefault(id(parameter), len(numbers))
                if i < len(names):
                    known[id(parameter)] = names[i]
        for key, slots in state.items():
            owner = id(key) if isinstance(key, torch.Tensor) else None
            part = member_name(numbers.get(owner, key) if owner is not None else key, ())
            given = known.get(owner, "") if owner is not None else ""
            yield from nested(f"optimizer/state/{part}", slots, given)
        for i, group in enumerate(groups):
            rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            yield from nested(f"optimizer/param_groups/{i}", rest, "")


class _Structure:
    """Which modules, parameters and buffers a model is made of."""

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._owned: list[tuple[dict[str, Any], str, Any, str]] = []
        self._sizes: list[tuple[dict[str, Any], int, str]] = []
        self._buffers: list[dict[str, Any]] = []
        self.parameters: list[torch.nn.Parameter] = []
        for name, module in [] if model is None else model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise UsageError(
                    f"{f'module {name!r}' if name else 'the model'} is scripted (torch.jit), which keeps its "
                    "parameters out of reach: inject into the module that it was made from, or into its file"
                )
            prefix = f"{name}." if name else ""
            for owner in (module._modules, module._parameters):
                self._owned += [(owner, key, value, prefix + key) for key, value in owner.items()]
                self._sizes.append((owner, len(owner), name or type(module).__name__))
            self.parameters += [p for p in module._parameters.values() if p is not None]
            self._buffers.append(module._buffers)
        self._filled = [owner for owner, size, _ in self._sizes if size]
        self._empty = [owner for owner, size, _ in self._sizes if not size]
        # Most modules have no buffers and get none.
        self._bare = [buffers for buffers in self._buffers if not buffers]
        # Views show what is in a dict at any time; making them anew takes longer than reading them.
        self._buffered = [dict.values(buffers) for buffers in self._buffers if buffers]
        self._held = [dict.values(owner) for owner in self._filled]
        self._keys = [key for _, key, _, _ in self._owned]
        self._addresses = self._where()

    def check(self) -> None:
        """Raise LiveError when parameters or modules were added, removed or replaced."""
        # Before every firing: what nearly always holds is found out without a loop in Python.
        same_names = not any(self._empty) and list(chain.from_iterable(self._filled)) == self._keys
        if same_names and self._where() == self._addresses:
            return
        changed = [name for owner, key, value, name in self._owned if owner.get(key) is not value]
        changed += [name for owner, size, name in self._sizes if len(owner) != size]
        if changed:
            raise LiveError(
                f"the model is no longer the one that was prepared for injection: {changed[0]!r} was "
                "replaced, added or removed since. Change the model first, then make a new target or injector"
            )

    def tensors(self) -> list[torch.Tensor | None]:
        """Parameters and buffers as they are now; buffers may come and go, as caches do."""
        buffers = map(dict.values, self._buffers) if any(self._bare) else self._buffered
        return [*self.parameters, *chain.from_iterable(buffers)]

    def _where(self) -> bytes:
        """The addresses of all modules and parameters, as bytes: `_owned` keeps alive those that were first.

        An array of objects asks nothing of them, where a list would compare tensors by their numbers.
        """
        return np.fromiter(chain.from_iterable(self._held), object, len(self._keys)).tobytes()


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside what ``torch.compile`` and ``DistributedDataParallel`` put around it.

    Raises:
        UsageError: not a module, or FullyShardedDataParallel, which keeps its parameters in pieces.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    while True:
        kind = type(model).__name__
        if kind == "FullyShardedDataParallel":
            raise UsageError(
                "FullyShardedDataParallel keeps its parameters in flat pieces, which cannot be hit by name: "
                "inject into its checkpoints instead"
            )
        inner = {
            "OptimizedModule": "_orig_mod",
            "DataParallel": "module",
            "DistributedDataParallel": "module",
        }
        if kind not in inner or not type(model).__module__.startswith("torch."):
            return model
        model = getattr(model, inner[kind])


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that has the state and takes the steps, inside what Accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _checked(optimizer: Any) -> Any:
    if not all(hasattr(optimizer, name) for name in ("state", "param_groups")):
        raise UsageError(f"an optimizer is a torch.optim.Optimizer, not {type(optimizer).__name__}")
    return optimizer


def _marks(tensors: list[torch.Tensor | None]) -> list[Any]:
    """What tells whether tensors are still where they were."""
    try:
        return [*map(torch.Tensor.data_ptr, tensors), *map(_DTYPE, tensors)]
    except (RuntimeError, ValueError, TypeError):
        return [tensor if tensor is None else _mark(tensor) for tensor in tensors]


def _mark(tensor: torch.Tensor) -> Any:
    """What tells whether a tensor is still where it was."""
    try:
        return tensor.data_ptr(), tensor.dtype
    except (RuntimeError, ValueError):
        return id(tensor)  # sparse, or not made yet: it has no place in memory


def _slot_marks(state: Mapping[Any, Any]) -> list[Any]:
    """What tells whether an optimizer still holds the same tensors."""
    marks: list[Any] = []
    for slots in state.values():
        for value in slots.values() if isinstance(slots, dict) else (slots,):
            if isinstance(value, torch.Tensor):
                marks.append(id(value))
            elif isinstance(value, dict | list | tuple):
                # Lists grow and lose tensors from step to step: a mark that equals no other.
                marks.append(object())
    return marks


def _rehearsed(optimizer: torch.optim.Optimizer) -> tuple[Mapping[Any, Any], bool]:
    """The state that an optimizer's first step makes, on tensors without memory; and whether that worked."""
    stand_in = copy.copy(optimizer)
    stand_in.state = defaultdict(dict)
    back: dict[torch.Tensor, torch.Tensor] = {}
    stand_in.param_groups = []
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            shadow = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
            shadow.grad = torch.empty_like(shadow) if parameter.requires_grad else None
            back[shadow] = parameter
            parameters.append(shadow)
        plain = {name: False for name in ("fused", "foreach", "capturable") if name in group}
        stand_in.param_groups.append({**group, "params": parameters, **plain})
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            type(optimizer).step(stand_in)
    except Exception:
        # Whatever an optimizer of any make may raise where there is no data.
        return {}, False
    return {back.get(key, key): value for key, value in stand_in.state.items()}, True


def _present(members: Mapping[str, Any]) -> list[str]:
    return [key for key, value in members.items() if value is not None]


def _member(owner: Mapping[str, Any], key: str) -> Fetch:
    return lambda: owner[key]


def _itself(tensor: torch.Tensor) -> Fetch:
    return lambda: tensor


def _gradient(parameter: torch.Tensor) -> Fetch:
    return lambda: parameter.grad
