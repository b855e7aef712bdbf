"""Tensors that pass by, a module's output or input, as a target for the faults of one call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.errors import LiveError, SelectionError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import KINDS, Plan
from ckptflip.faults.policy import Policy
from ckptflip.live import torch_words
from ckptflip.live.calls import seed_of
from ckptflip.live.carrying import alter
from ckptflip.live.target import Armed

# So many shapes of one module's tensors are remembered with what was worked out for them.
_SHAPES = 32

Found = Sequence[tuple[str, torch.Tensor]]


class Passed:
    """Faults that were put into tensors as they passed.

    Args:
        site: the place's name.
        times: how often something had passed there before in the same call of the model.
        tensors: the catalogue of what passed.
        done: the faults; or one flip as (tensor, word, mask, word before), a plan only when asked for.
    """

    __slots__ = ("_done", "_site", "_tensors", "_times")

    def __init__(
        self, site: str, times: int, tensors: Sequence[Tensor], done: Plan | tuple[int, int, int, int]
    ) -> None:
        self._site, self._times, self._tensors, self._done = site, times, tensors, done

    @property
    def plan(self) -> Plan:
        """The faults."""
        if isinstance(self._done, Plan):
            return self._done
        tensor, word, mask, before = self._done
        columns: list[Any] = [
            np.array([value], kind)
            for value, kind in zip((tensor, word, mask, before, before ^ mask, 1), KINDS, strict=True)
        ]
        return Plan(*columns)

    def named(self) -> list[Tensor]:
        """The catalogue with names that tell the times apart: ``activations/relu@2`` is the second."""
        if not self._times:
            return list(self._tensors)
        name = f"{self._site}@{self._times + 1}"
        return [replace(t, name=name + t.name[len(self._site) :]) for t in self._tensors]


class Site:
    """A place where tensors pass: the output or the inputs of a module, or the inputs of the model.

    Args:
        name: of the place, such as ``activations/conv1``; its tensors' names begin with it.
        layer: the module's name.
        policies: what is drawn each time something passes.
        seed: of all draws.

    Attributes:
        called: how often something passed.
        fired: how often that was hit.
        hit: bits that were drawn.
        effective: bits that differ before and after.
        idle: how often nothing that passed had an element to hit.
        times: how often something passed in the present call of the model.
        seed: of all draws.
        next_seed: of the next draw, where it has been worked out already.
    """

    def __init__(self, name: str, layer: str, policies: tuple[Policy, ...], seed: int) -> None:
        self.name, self.layer = name, layer
        self.seed = seed
        self.next_seed: int | None = None
        self._policies = policies
        self._known: dict[Any, _Ready | None] = {}
        self.called = self.fired = self.hit = self.effective = self.idle = self.times = 0

    def begin(self, seed: int | None) -> None:
        """Begin a call of the model, for whose first passing `seed_of` gives this seed."""
        self.times, self.next_seed = 0, seed

    def strike(
        self, call: int, found: Found, free: Collection[int]
    ) -> tuple[Passed | None, dict[int, torch.Tensor]]:
        """Draw faults and put them into tensors that pass: where they are, or into copies.

        Args:
            call: of the model, from 0.
            found: the tensors, each once, and what they are called behind the place's name.
            free: the `id` of those that may be altered where they are.

        Returns:
            What was done, or None; and the copies, by the `id` of the tensor that each one replaces.

        Raises:
            LiveError: a tensor whose words cannot be altered.
            SelectionError: the policy wants more than there is.
        """
        times, seed = self.times, self.next_seed
        self.times += 1
        self.called += 1
        self.next_seed = None
        ready = self._ready(found)
        if ready is None:
            self.idle += 1
            return None, {}
        if seed is None:
            seed = seed_of(self.seed, call, self.name, times)
        if ready.lone:
            return self._flip(ready, found, free, seed, times)
        return self._hit(ready, found, free, seed, times)

    def _flip(
        self, ready: _Ready, found: Found, free: Collection[int], seed: int, times: int
    ) -> tuple[Passed, dict[int, torch.Tensor]]:
        """One flip in tensors of a plain kind: as `_hit`, without arrays, for nothing is asked for more."""
        i, word, mask = ready.armed.one(seed)
        tensor = found[i][1]
        copies: dict[int, torch.Tensor] = {}
        if id(tensor) not in free:
            copies[id(tensor)] = tensor = tensor.clone()
        before = torch_words.flip_one(tensor, ready.target.tensors[i].number, word, mask)
        self.fired += 1
        self.hit += 1
        self.effective += 1
        return Passed(self.name, times, ready.target.tensors, (i, word, mask, before)), copies

    def _hit(
        self, ready: _Ready, found: Found, free: Collection[int], seed: int, times: int
    ) -> tuple[Passed | None, dict[int, torch.Tensor]]:
        target = ready.target
        target.now = [tensor for _, tensor in found]
        copies: dict[int, torch.Tensor] = {}
        try:
            for i in target.spread:
                target.now[i] = found[i][1].clone(memory_format=torch.contiguous_format)
            plan = ready.armed.draw(seed)
            if not len(plan):
                return None, {}
            for i in dict.fromkeys(plan.tensor.tolist()):
                tensor = found[i][1]
                if i in target.spread:
                    copies[id(tensor)] = target.now[i]
                elif id(tensor) not in free:
                    copies[id(tensor)] = target.now[i] = tensor.clone()
            alter(target, plan, plan.before, plan.after)
        finally:
            target.now = []
        self.fired += 1
        self.hit += plan.bits_hit
        self.effective += plan.bits_effective
        return Passed(self.name, times, target.tensors, plan), copies

    def _ready(self, found: Found) -> _Ready | None:
        """What was worked out for tensors of this kind, or is now; None where they have no elements."""
        kind = tuple([_kind(path, tensor) for path, tensor in found])
        if kind not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.clear()
            self._known[kind] = self._worked_out(found)
        return self._known[kind]

    def _worked_out(self, found: Found) -> _Ready | None:
        if not any(tensor.numel() for _, tensor in found):
            return None
        target = _Tensors(self.name, self.layer, found)
        try:
            armed = Armed(target, self._policies)
        except SelectionError as why:
            raise SelectionError(f"{self.name}: {why}") from None
        plain = all(torch_words.is_row(tensor) for _, tensor in found)
        return _Ready(target, armed, plain and armed.lone)


class _Ready(Struct, frozen=True, eq=False):
    """What does not change while tensors of one kind pass.

    Attributes:
        target: of the tensors.
        armed: the policies.
        lone: whether each draw is one flip, in tensors that lie in plain rows.
    """

    target: _Tensors
    armed: Armed
    lone: bool


class _Tensors:
    """Tensors of one kind as a `ckptflip.live.LiveTarget`; `now` are those that pass at the moment."""

    format = "pytorch calls"

    def __init__(self, name: str, layer: str, found: Found) -> None:
        self.spread = {i for i, (_, tensor) in enumerate(found) if _is_spread(tensor)}
        self.tensors: list[Tensor] = []
        self.now: list[torch.Tensor] = []
        for i, (path, tensor) in enumerate(found):
            full = f"{name}/{path}" if path else name
            whole = torch.empty(tensor.shape, dtype=tensor.dtype) if i in self.spread else tensor
            try:
                number = torch_words.number_of(whole)
            except ValueError as why:
                raise LiveError(
                    f"{full} cannot be hit: it is {why}. Leave it out: name '!{layer or path}' too"
                ) from None
            self.tensors.append(Tensor(full, tuple(tensor.shape), number, "<", layer, "other", (), "passing"))

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions."""
        return torch_words.read(self.now[tensor], self.tensors[tensor].number, words)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor."""
        torch_words.xor(self.now[tensor], self.tensors[tensor].number, words, masks)


def _kind(path: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that decides how a tensor's words are reached; what is like another needs no second look."""
    try:
        where = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
    except RuntimeError:
        return path, tensor.layout  # sparse or nested
    return path, type(tensor), where, tensor.is_neg(), tensor.is_conj()


def _is_spread(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor was expanded, so that several of its elements are one place in memory."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    return not torch_words.is_apart(tensor.shape, tensor.stride())
