"""Faults for the length of a ``with`` block: put in, counted, recorded, and undone at its end."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from msgspec.structs import replace

from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import Record
from ckptflip.faults.stream import check_seed
from ckptflip.live.calls import Due
from ckptflip.live.held import Held
from ckptflip.live.keeping import Kept
from ckptflip.live.part import Count, FaultWarning, Part
from ckptflip.live.protocol import LiveTarget

Names = bool | str | Iterable[str] | None


def faults(
    model: Any,
    policy: Policy | Sequence[Policy],
    *,
    seed: int,
    optimizer: Any = None,
    state: Names = None,
    activations: Any = None,
    module_inputs: Any = None,
    inputs: Names = None,
    gradients: Names = None,
    calls: int | Iterable[int] | None = None,
    every: int | None = None,
    once: bool = False,
    beyond: str = "refuse",
    records: str | Path | None = None,
) -> Faults:
    """Faults in a running model, for the length of a ``with`` block.

    Without `activations`, `module_inputs`, `inputs` and `gradients`, parameters, buffers and, where it is
    given, the optimizer's state are hit, once, on entering the block. What is hit in calls of the model (or
    in backward passes) is drawn anew in each of them, keyed on (seed, call, place) alone. A policy's amount
    holds for each module; the inputs are one place, and so are the state and the gradients. When the block
    ends, also by an exception, every word has its value back and every hook is gone.

    Args:
        model: a PyTorch or Keras model, or any `ckptflip.live.LiveTarget`. Of a Keras model, and of a target,
            the state alone can be hit.
        policy: which bits, how many and how: a policy, or several that act one after the other. Its
            `tensors`, `layers`, `roles` and `ranks` choose among the state; elsewhere the arguments below do.
        seed: 0 … 2^64-1. Faults in the state on entering are those of `ckptflip.inject` with this seed in a
            checkpoint file with the same tensors.
        optimizer: its state may be hit too.
        state: True, or globs on names, to hit the state along with others; see the policy's `tensors`.
        activations: modules whose outputs are hit: names, globs such as ``"conv*"``, classes, or True for all
            layers (see `ckptflip.live.torch_modules.choose`).
        module_inputs: modules whose inputs are hit, likewise: what only they read.
        inputs: True, or globs on the names of the model's arguments: ``"dense"``, ``"ids/0"``.
        gradients: True, or globs on parameters' names: their ``.grad`` at the end of a backward pass.
        calls: these calls of the model alone, counted from 0; of gradients, these backward passes.
        every: the N-th, 2N-th, … call alone. With `calls` or `every`, the state is hit at the beginning of
            each such call, what was hit before having been restored.
        once: only the first of these calls.
        beyond: what becomes of ids that a fault puts beyond their embedding table: ``refuse`` or ``clamp``.
        records: a folder for records, one file for each call that was hit.

    Returns:
        A context manager; see `Faults`.

    Raises:
        UsageError: arguments that make no sense, alone or together.
        SelectionError: names that match nothing, or an amount larger than what they hold.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with faults(model, Policy(bits="exponent"), seed=7, activations=torch.nn.Linear) as live:
        ...     _ = [model(torch.ones(1, 4)) for _ in range(3)]
        >>> [(count.name, count.called, count.effective) for count in live.counts()]
        [('activations/0', 3, 3), ('activations/2', 3, 3)]
    """
    check_seed(seed)
    if beyond not in ("refuse", "clamp"):
        raise UsageError(f"beyond is 'refuse' or 'clamp', not {beyond!r}")
    passing = {"activations": activations, "module_inputs": module_inputs, "inputs": inputs}
    asked = {name: wanted for name, wanted in passing.items() if _is_asked(wanted)}
    of_gradients = globs(gradients, "gradients")
    of_state = globs(True if state is None and not asked and not of_gradients else state, "state")
    kind, kept = framework_of(model), Kept(combine(policy), seed, records)
    _check(kind, kept.policies, bool(asked or of_gradients), calls is not None or every is not None)
    due = Due(calls, every, once)
    parts: list[Part] = []
    held = None
    if of_state:
        policies = narrowed(kept.policies, "", of_state)
        held = Held("state", target_of(model, optimizer, kind), policies, kept, _forget(kind))
        if calls is None and every is None:
            parts.append(_Start(held, seed))
    if asked or (held is not None and not parts):
        from ckptflip.live.torch_session import Calls

        parts.append(Calls(model, asked, due, kept, None if parts else held, clamp=beyond == "clamp"))
    if of_gradients:
        from ckptflip.live.torch_session import Gradients

        parts.append(Gradients(model, of_gradients, due, kept))
    if not parts:
        raise UsageError("nothing is to be hit: state is False, and nothing else is asked for")
    return Faults(kept, parts, model if held is not None else None)


# Blocks that hold faults in a model's state, in the order in which they were entered.
_OPEN: list[Faults] = []


class Faults:
    """What `faults` gives: a context manager that knows what has fired. It serves for one block."""

    def __init__(self, kept: Kept, parts: list[Part], held: Any = None) -> None:
        self._kept, self._parts, self._held = kept, parts, held
        self._entered = False

    @property
    def calls(self) -> int:
        """Calls of the model in the block so far; 0 where they are not counted."""
        return max(part.calls for part in self._parts)

    @property
    def clamped(self) -> int:
        """Ids that a fault put beyond their table and that were clamped."""
        return sum(part.clamped for part in self._parts)

    @property
    def records(self) -> list[Record]:
        """What was done so far, in order: on entering the block, and in each call that was hit."""
        return self._kept.records

    @property
    def effective(self) -> int:
        """Bits that were changed so far."""
        return sum(count.effective for count in self.counts())

    def counts(self) -> list[Count]:
        """What happened at each place."""
        return [count for part in self._parts for count in part.counts()]

    def __enter__(self) -> Faults:
        if self._entered:
            raise UsageError("these faults were in a block before: make new ones with live.faults(…)")
        self._entered = True
        for said in [said for part in self._parts for said in part.doubts()]:
            warnings.warn(said, FaultWarning, stacklevel=2)
        try:
            for part in self._parts:
                part.begin()
        except BaseException:
            self._end()
            raise
        if self._held is not None:
            _OPEN.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = self._close() + self._end()
        if kind is not None:
            return
        for one in said + [one for part in self._parts for one in part.silences()]:
            warnings.warn(one, FaultWarning, stacklevel=2)

    def _close(self) -> list[str]:
        """Be no longer open; what to warn of where a block that was entered later goes on."""
        if self not in _OPEN:
            return []
        place = _OPEN.index(self)
        del _OPEN[place]
        if all(later._held is not self._held for later in _OPEN[place:]):
            return []
        return [
            "a block on the same model was entered after this one and goes on: words that both have hit may "
            "keep a fault. Leave blocks in the reverse order, as nested with statements do"
        ]

    def _end(self) -> list[str]:
        """End every part, whatever becomes of another; what to warn of."""
        said: list[str] = []
        with ExitStack() as ends:
            for part in self._parts:
                ends.callback(_end, part, said)
        return said


def _end(part: Part, said: list[str]) -> None:
    said += part.end()


class _Start:
    """Faults in the state from the beginning of the block to its end."""

    calls = clamped = 0

    def __init__(self, held: Held, seed: int) -> None:
        self._held, self._seed = held, seed

    def counts(self) -> list[Count]:
        return [self._held.count()]

    def doubts(self) -> list[str]:
        return []

    def begin(self) -> None:
        self._held.fire(self._seed, "start")

    def end(self) -> list[str]:
        return self._held.restore()

    def silences(self) -> list[str]:
        return []


def framework_of(model: Any) -> str:
    """Which framework a model is of: ``torch``, ``keras``, or none: ``target``."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    # With the torch backend a Keras model is a PyTorch module too.
    if keras is not None and isinstance(model, keras.Model):
        return "keras"
    if torch is not None and isinstance(model, torch.nn.Module):
        return "torch"
    if all(hasattr(model, name) for name in ("tensors", "read", "xor", "format")):
        return "target"
    raise UsageError(f"a {type(model).__name__} is no PyTorch or Keras model, and no target for faults")


def target_of(model: Any, optimizer: Any, kind: str) -> LiveTarget:
    """The tensors of a model as a target, or the target that it is.

    Args:
        model: as for `faults`.
        optimizer: likewise.
        kind: as `framework_of` has it.

    Raises:
        UsageError: an optimizer where there can be none; a model without tensors.
    """
    if kind == "torch":
        from ckptflip.live.torch_tensors import TorchTarget

        return TorchTarget(model, optimizer)
    if optimizer is not None:
        raise UsageError(
            "an optimizer is given for a PyTorch model alone; Keras' is part of the compiled model"
        )
    if kind == "keras":
        from ckptflip.live.keras_variables import KerasTarget

        return KerasTarget(model)
    target: LiveTarget = model
    return target


def _is_asked(wanted: Any) -> bool:
    return wanted is not None and wanted is not False


def globs(wanted: Names, option: str) -> tuple[str, ...]:
    """Globs; True stands for all, and None and False for nothing."""
    if not _is_asked(wanted):
        return ()
    found = (
        ("*",)
        if wanted is True
        else (wanted,)
        if isinstance(wanted, str)
        else tuple(_iterated(wanted, option))
    )
    if not found or not all(isinstance(one, str) for one in found):
        raise UsageError(f"{option} is True, or globs on names, not {wanted!r}")
    return found


def _iterated(wanted: Any, option: str) -> Iterator[Any]:
    try:
        yield from wanted
    except TypeError:
        raise UsageError(f"{option} is True, or globs on names, not {wanted!r}") from None


def narrowed(policies: tuple[Policy, ...], prefix: str, globs: tuple[str, ...]) -> tuple[Policy, ...]:
    """Policies that choose among tensors by these globs; all of them leaves policies as they are."""
    if globs == ("*",) and not prefix:
        return policies
    named = tuple(f"!{prefix}{g[1:]}" if g.startswith("!") else prefix + g for g in globs)
    return tuple(replace(policy, tensors=named) for policy in policies)


def _check(kind: str, policies: Iterable[Policy], passing: bool, by_call: bool) -> None:
    """Refuse what makes no sense together."""
    if kind != "torch" and (passing or by_call):
        what = "a Keras model" if kind == "keras" else "a target"
        raise UsageError(
            f"of {what} the state alone can be hit, when the block is entered: leave the rest out"
        )
    for policy in policies if passing else ():
        for field in ("tensors", "layers", "roles", "ranks"):
            if getattr(policy, field):
                raise UsageError(
                    f"the policy's {field} choose among parameters, buffers and optimizer state; with "
                    "activations, inputs or gradients, name what is hit in these arguments "
                    "(activations='conv*', state='fc*')"
                )


def _forget(kind: str) -> Callable[[], None]:
    """What has to be done when the state has changed."""
    if kind == "torch":
        import torch

        # Autocast keeps copies of weights, in which a fault would not be seen.
        forget: Callable[[], None] = torch.clear_autocast_cache
        return forget
    return lambda: None
