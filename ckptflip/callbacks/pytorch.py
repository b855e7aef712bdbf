"""Faults in a plain PyTorch training loop: hooks on the optimizer's steps, or a call in each step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptflip.errors import MissingExtraError, UsageError
from ckptflip.faults.record import Record

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Injecting into a PyTorch loop") from error

from ckptflip.callbacks.firing import Firing
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.live.torch_tensors import TorchTarget, inner_optimizer


class Injector:
    """Injects into a PyTorch model while a loop of your own trains it.

    In a ``with`` block it hooks the optimizer: faults hit when a step is complete, or, with `gradients`, just
    before it, when the gradients are there. It counts the optimizer's steps itself; a step that a
    ``GradScaler`` leaves out is none. Where the schedule names epochs, tell it: ``injector.epoch = epoch``.
    Without a ``with`` block, call `step` where the faults should hit. No hook is put on the model, so a
    compiled one skips none.

    Of a distributed run, each process makes its own injector; the schedule's `ranks` say which are hit.
    DistributedDataParallel sends the buffers of rank 0 to all before every forward pass, so faults in the
    buffers of other ranks alone last until then.

    Args:
        schedule: what hits, and when.
        model: the model; wrapped or compiled is fine.
        optimizer: its optimizer, whose steps are hooked and whose state may be hit.
        gradients: whether gradients may be hit, as ``gradients/conv1.weight``. A loop that passes a closure
            to ``optimizer.step`` computes them too late for that, and is refused in its first step.
        records: a folder for records; each is written before the first word is altered.

    Attributes:
        epoch: the epoch, from 0; None until you set it.
        steps: optimizer steps that are complete.
        target: the tensors that may be hit.

    Raises:
        SelectionError: a policy of the schedule matches nothing in this model.
        UsageError: a rank that does not exist, and other things that make no sense.

    Example:
        >>> from ckptflip.faults import Policy
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = InjectionSchedule(Policy(bits="sign", tensors=("weight",)), seed=1, steps=2)
        >>> with Injector(schedule, model, optimizer) as injector:
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(3, 4)).sum().backward()
        ...         optimizer.step()
        >>> [(record.header.output, record.bits_effective) for record in injector.records]
        [('step 2', 1)]
    """

    def __init__(
        self,
        schedule: InjectionSchedule,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        gradients: bool = False,
        records: str | Path | None = None,
    ) -> None:
        self._firing = Firing(schedule, records)
        self.target = TorchTarget(model, optimizer, gradients)
        self.epoch: int | None = None
        self.steps = 0
        self._optimizer = None if optimizer is None else inner_optimizer(optimizer)
        self._gradients = gradients
        self._handles: list[Any] = []
        tensors, certain = self.target.foreseen()
        rank, world = _distributed()
        self._firing.prepare(tensors, target=self.target, certain=certain, rank=rank, world=world)

    @property
    def schedule(self) -> InjectionSchedule:
        """What hits, and when; `schedule.fired` says what did."""
        return self._firing.schedule

    @property
    def records(self) -> list[Record]:
        """Of every firing so far, in order."""
        return self._firing.records

    def __enter__(self) -> Injector:
        if self._handles:
            raise UsageError("this injector is in use already: leave its with block first, or make another")
        if self._optimizer is not None:
            self._attach(self._optimizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hooked = bool(self._handles)
        self.detach()
        if hooked and kind is None and not self.schedule.fired and self.schedule.probability is None:
            warnings.warn(
                f"the injection schedule fired nothing in the {self.steps} optimizer steps up to here: check "
                "its epochs and steps, and that the loop steps the optimizer that the injector was given",
                stacklevel=2,
            )

    def detach(self) -> None:
        """Take the hooks off the optimizer; done at the end of a ``with`` block."""
        while self._handles:
            self._handles.pop().remove()

    def step(self, epoch: int | None = None, step: int | None = None) -> Record | None:
        """Hit the model if the schedule says so; for loops without hooks. Call it once in every step.

        Args:
            epoch: the epoch, from 0; by default `self.epoch`.
            step: the step, from 0 over the whole run; by default the number of earlier calls.

        Returns:
            The record, or None where nothing is due.

        Raises:
            UsageError: the injector hooks the optimizer, so that a call would count steps twice.
            CkptflipError: what `InjectionSchedule.fire` raises.
        """
        if self._handles:
            raise UsageError(
                "inside its with block the injector is called by the optimizer; to call step yourself, leave "
                "the with block out"
            )
        if epoch is not None:
            self.epoch = epoch
        if step is not None:
            self.steps = step
        made = self._fire()
        self.steps += 1
        return made

    def undo(self, record: Record | str | Path | None = None) -> int:
        """Give the words of a firing their value back, as long as training has not altered them since.

        Args:
            record: which; by default the last one.

        Returns:
            Words that were restored.

        Raises:
            RecordError: training has gone on since. Nothing is altered.
            UsageError: nothing has fired yet.
        """
        return self._firing.undo(record)

    def state_dict(self) -> dict[str, Any]:
        """What to put into your checkpoint, so that a resumed run does not inject twice: plain values."""
        return {"schedule": self.schedule.state_dict(), "epoch": self.epoch, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            UsageError: the state is of another schedule, or none at all.
        """
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if not isinstance(steps, int):
            raise UsageError("this is no state of an injector: pass what its state_dict() returned")
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.steps = state.get("epoch"), steps

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise UsageError(
                f"{type(optimizer).__name__} has no hooks for its steps: leave the with block out, and call "
                "injector.step(epoch, step) after each step"
            )
        # A compiled optimizer.step runs its hooks inside; they must not become part of what is compiled.
        if self._gradients:
            self._handles.append(optimizer.register_step_pre_hook(torch.compiler.disable(self._before)))
        self._handles.append(optimizer.register_step_post_hook(torch.compiler.disable(self._after)))

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise UsageError(
                "the loop passes a closure to optimizer.step, which computes the gradients inside it: faults "
                "put into them before would be lost. Leave gradients=True out, or compute them before"
            )
        self._fire()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._gradients:
            self._fire()
        self.steps += 1

    def _fire(self) -> Record | None:
        return self._firing.fire(self.epoch, self.steps)


def _distributed() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) outside distributed runs."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
