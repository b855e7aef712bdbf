"""Faults in the calls of a PyTorch model: what modules give and take, and what the model is given.

A gate stands before the model; hooks are on its modules during the calls that are hit alone, so that others
cost next to nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from math import inf
from threading import get_ident
from typing import Any

import torch

from ckptflip.errors import LiveError, SelectionError
from ckptflip.faults.catalogue import matches
from ckptflip.faults.policy import Policy
from ckptflip.live.calls import Due, keys_of, seeds_of
from ckptflip.live.torch_gate import Gate, Through
from ckptflip.live.torch_modules import Chosen
from ckptflip.live.torch_passing import Found, Passed, Site
from ckptflip.live.torch_tables import Ids, tables
from ckptflip.live.torch_values import leaves, rebuilt

# Operators whose backward pass does not use their result: it may change unseen, and gradients are those of
# the operator plus a constant.
_FREE = frozenset(
    (
        *(
            "ConvolutionBackward0",
            "AddmmBackward0",
            "MmBackward0",
            "BmmBackward0",
            "AddBackward0",
            "SubBackward0",
        ),
        *("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "NativeLayerNormBackward0"),
        *(
            "NativeGroupNormBackward0",
            "EmbeddingBackward0",
            "EmbeddingBagBackward0",
            "MaxPool2DWithIndicesBackward0",
        ),
        *("AvgPool2DBackward0", "MeanBackward1", "UnsafeViewBackward0"),
    )
)
_VIEWS = frozenset(
    ("ViewBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0", "TBackward0")
)

_FEW = 16

State = Callable[[int], None]
Done = Callable[[int, list[Passed]], None]


class TorchCalls:
    """The gate and the hooks of one ``with`` block.

    Args:
        model: without what wraps it.
        policies: drawn anew wherever something passes.
        seed: of all draws.
        due: which calls are hit.
        outputs: modules whose outputs are hit.
        entries: modules whose inputs are hit.
        inputs: globs on the names of the model's inputs; empty: they are not hit.
        clamp: what becomes of ids beyond a table.
        state: called at the start of each call that is due, or None.
        done: called at the end of each call in which something passed was hit.

    Attributes:
        due_calls: those that were due.
        sites: where tensors pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        policies: tuple[Policy, ...],
        seed: int,
        due: Due,
        *,
        outputs: Sequence[Chosen] = (),
        entries: Sequence[Chosen] = (),
        inputs: Sequence[str] = (),
        clamp: bool = False,
        state: State | None = None,
        done: Done,
    ) -> None:
        self._model, self._due, self._inputs, self._state, self._done = model, due, inputs, state, done
        self._outputs = [(c, Site(_name("activations", c.name), c.name, policies, seed)) for c in outputs]
        self._entries = [(c, Site(_name("module_inputs", c.name), c.name, policies, seed)) for c in entries]
        self._input = Site("inputs", "", policies, seed)
        self.sites = [site for _, site in (*self._outputs, *self._entries)]
        self.sites += [self._input] if inputs else []
        self._seed, self._keys = seed, keys_of([site.name for site in self.sites])
        # Only ids that may have been hit are looked at.
        self._tables = [(m, Ids(n, clamp)) for n, m in tables(model)] if inputs or entries else []
        self._names = _argument_names(model) if inputs else []
        self._gate = Gate(model, self._reach)
        self._handles: list[Any] = []
        self._passed: list[Passed] = []
        self._depth = self._thread = 0
        self._call = -1
        self.due_calls = 0

    @property
    def calls(self) -> int:
        """Of the model so far, without those in the middle of a call that is hit."""
        return self._gate.calls

    @property
    def clamped(self) -> int:
        """Ids and offsets that were clamped."""
        return sum(ids.clamped for _, ids in self._tables)

    def attach(self) -> None:
        """Stand before the model's calls."""
        self._gate.wait = self._due.next(0)
        self._gate.open()

    def detach(self) -> None:
        """Leave the model as it was."""
        self._gate.close()
        self._leave()

    def _reach(self, through: Through, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is due, or one in the middle of such a call."""
        inner = self._depth > 0
        if inner:
            self._gate.calls -= 1
            self._check_thread()
            self._depth += 1
        else:
            self._enter(self._gate.calls - 1)
        try:
            # A call in the middle of another is given what the model itself has computed.
            if self._inputs and not inner:
                args, kwargs = self._strike_inputs(args, kwargs)
            return through(*args, **kwargs)
        finally:
            if self._depth:
                self._depth -= 1
                if not self._depth:
                    self._leave()

    def _enter(self, call: int) -> None:
        """Begin a call that is hit."""
        if torch.jit.is_tracing():
            raise LiveError(
                "torch.jit.trace records what the model computes, and would keep the faults of this one call "
                "for ever: trace it outside the block"
            )
        self.due_calls += 1
        self._call, self._depth, self._thread = call, 1, get_ident()
        self._gate.wait = -1
        try:
            if self._state is not None:
                self._state(call)
            # Of a few places, each seed is worked out sooner by itself.
            many = len(self.sites) > _FEW
            seeds = seeds_of(self._seed, call, self._keys) if many else repeat(None, len(self.sites))
            for site, seed in zip(self.sites, seeds, strict=True):
                site.begin(seed)
            if not self._handles:
                self._hook_modules()
        except BaseException:
            self._leave()
            raise

    def _hook_modules(self) -> None:
        """Put the hooks of a call on."""
        handles = self._handles
        for chosen, site in self._entries:
            hook: Any = self._entry_hook(site)
            handles.append(chosen.module.register_forward_pre_hook(hook, with_kwargs=True))
        for module, ids in self._tables:
            handles.append(module.register_forward_pre_hook(self._checking(ids), with_kwargs=True))
        for chosen, site in self._outputs:
            hook = self._output_hook(site, chosen)
            handles.append(chosen.module.register_forward_hook(hook, with_kwargs=True))

    def _checking(self, ids: Ids) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return ids(module, args, kwargs) if self._is_ours() else None

        return hook

    def _leave(self) -> None:
        """End a call that is hit, however it ended."""
        self._depth = 0
        gate = self._gate
        if gate.is_open and gate.wait < 0:
            gate.wait = inf if self._due.once else self._due.next(self._call + 1)
        # Between two calls that are both due, the hooks may as well stay.
        if not gate.is_open or gate.wait != self._call + 1:
            while self._handles:
                self._handles.pop().remove()
        passed, self._passed = self._passed, []
        if passed:
            self._done(self._call, passed)

    def _output_hook(self, site: Site, chosen: Chosen) -> Callable[..., Any]:
        own, fresh = chosen.own, chosen.fresh

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._is_ours():
                return None
            found = [("", output)] if isinstance(output, torch.Tensor) else _each(output)
            taken = {_storage(tensor) for tensor in _flat((*args, kwargs))} if own and not fresh else ()
            free = (
                [id(t) for _, t in found if _is_free(t) and not (taken and _storage(t) in taken)]
                if own
                else ()
            )
            return self._strike(site, found, free, output)

        return hook

    def _entry_hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if not self._is_ours():
                return None
            names = [str(i) for i in range(len(args))]
            given = {**dict(zip(names, args, strict=True)), **kwargs}
            made = self._strike(site, _each(given), (), given)
            return None if made is None else (tuple(made[n] for n in names), {k: made[k] for k in kwargs})

        return hook

    def _strike(self, site: Site, found: Found, free: Any, value: Any) -> Any:
        """Hit what passes; the value with copies in it, or None where nothing had to be copied."""
        passed, copies = site.strike(self._call, found, free)
        if passed is not None:
            self._passed.append(passed)
        return rebuilt(value, copies) if copies else None

    def _strike_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is given, hit."""
        names = [self._names[i] if i < len(self._names) else str(i) for i in range(len(args))]
        given = {**dict(zip(names, args, strict=True)), **kwargs}
        every = _each(given)
        found = [(path, tensor) for path, tensor in every if is_meant(path, self._inputs)]
        if not found:
            there = ", ".join(path for path, _ in every) or "none"
            raise SelectionError(
                f"inputs {', '.join(self._inputs)} match none of the model's inputs; its tensors are {there}"
            )
        made = self._strike(self._input, found, (), given)
        if made is None:
            return args, kwargs
        return tuple(made[n] for n in names), {k: made[k] for k in kwargs}

    def _is_ours(self) -> bool:
        """Whether a module is called by the model, in a call that is hit, and by Python."""
        if not self._depth or torch.compiler.is_compiling():
            return False
        self._check_thread()
        return True

    def _check_thread(self) -> None:
        if get_ident() != self._thread:
            raise LiveError(
                "the model is called in two threads at once, so that no run would equal another. Call it in "
                "one thread, or give each thread a model of its own"
            )


def _name(kind: str, module: str) -> str:
    return f"{kind}/{module}" if module else kind


def _each(value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a value, each once."""
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for path, tensor in leaves(value):
        seen.setdefault(id(tensor), (path, tensor))
    return list(seen.values())


def _flat(given: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors among a layer's arguments, which are hardly ever nested."""
    for one in given:
        if isinstance(one, torch.Tensor):
            yield one
        elif one:
            yield from (tensor for _, tensor in leaves(one))


def _is_free(tensor: torch.Tensor) -> bool:
    made = tensor.grad_fn
    if made is None:
        return not tensor.requires_grad
    while (kind := type(made).__name__) in _VIEWS and made.next_functions[0][0] is not None:
        made = made.next_functions[0][0]
    return kind in _FREE


def _storage(tensor: torch.Tensor) -> int:
    # Sparse tensors have none; they are refused by name where they would be hit.
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def is_meant(path: str, globs: Sequence[str]) -> bool:
    """Whether an input is selected: by any glob, and by none with a ``!``."""
    plain = [glob for glob in globs if not glob.startswith("!")]
    away = any(matches(path, glob[1:]) for glob in globs if glob.startswith("!"))
    return not away and (not plain or any(matches(path, glob) for glob in plain))


def _argument_names(model: torch.nn.Module) -> list[str]:
    """The names of the model's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        return []
