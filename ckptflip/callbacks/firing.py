"""What all adapters for training frameworks share: refuse early, fire when it is time, keep the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ckptflip.callbacks.schedule import Fired, InjectionSchedule
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.record import Record
from ckptflip.live.target import LiveTarget, undo

Epoch = Callable[[int], int | None]


class Firing:
    """A schedule at work in one training run.

    Args:
        schedule: what hits, and when.
        folder: for records; None keeps them in memory alone.

    Attributes:
        records: of every firing so far, in order.
    """

    def __init__(self, schedule: InjectionSchedule, folder: str | Path | None) -> None:
        if not isinstance(schedule, InjectionSchedule):
            raise UsageError(f"schedule is an InjectionSchedule, not {type(schedule).__name__}")
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise UsageError(f"{folder} is a file; name a folder for records")
        self.schedule, self._folder = schedule, folder
        self.records: list[Record] = []
        self._target: LiveTarget | None = None
        self._rank, self._world = 0, 1

    def prepare(
        self,
        tensors: Sequence[Tensor],
        *,
        target: LiveTarget | None,
        certain: bool = True,
        epochs: int | None = None,
        per_epoch: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Take up a run that is about to begin, or refuse it.

        Args:
            tensors: the catalogue as it will be.
            target: what is hit; None where it differs from step to step.
            certain: whether the catalogue is complete.
            epochs: how many the run has from its very start, where that is known.
            per_epoch: steps in each, likewise.
            rank, world: of this process, and how many there are.

        Raises:
            SelectionError: a policy matches nothing.
            UsageError: the schedule can never fire in this run.
        """
        self.schedule.check(tensors, certain=certain, world=world)
        check_reach(self.schedule, epochs, per_epoch)
        self._target, self._rank, self._world = target, rank, world
        self.records.clear()

    def fire(self, epoch: int | None, step: int, target: LiveTarget | None = None) -> Record | None:
        """Hit the target if this step is due; see `InjectionSchedule.fire`."""
        if not self.schedule.due(epoch, step):
            return None
        hit = target or self._target
        if hit is None:
            raise UsageError("training has not begun: there is no model to hit yet")
        made = self.schedule.fire(
            hit, epoch=epoch, step=step, records=self._folder, rank=self._rank, world=self._world
        )
        if made is not None:
            self.records.append(made)
        return made

    def undo(self, record: Record | str | Path | None) -> int:
        """Give the words of a firing, by default the last, their value back.

        Returns:
            Words that were restored.

        Raises:
            RecordError: training has altered them since. Nothing is altered.
            UsageError: nothing has fired, or it is no longer there to be undone.
        """
        if record is None:
            if not self.records:
                raise UsageError("nothing has fired yet, so there is nothing to undo")
            record = self.records[-1]
        if self._target is None:
            raise UsageError("gradients are gone after their step: there is nothing left to undo")
        return undo(self._target, record)


def check_reach(schedule: InjectionSchedule, epochs: int | None, per_epoch: int | None) -> None:
    """Refuse a schedule that cannot fire in a run of this length.

    Args:
        schedule: the schedule.
        epochs: of the run, from its very start; None where that is not known.
        per_epoch: steps in each, likewise.

    Raises:
        UsageError: no step of the run is hit.

    Example:
        >>> from ckptflip.faults import Policy
        >>> schedule = InjectionSchedule(Policy(), seed=1, epochs=9)
        >>> check_reach(schedule, epochs=3, per_epoch=10)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ckptflip.errors.UsageError: the schedule can never fire in this run: it has the epochs 0 to 2...
    """
    if epochs is None or (per_epoch is None and not schedule.by_epoch):
        return
    # Where the length of an epoch is not known, what is asked of steps cannot be told; of epochs it can.
    steps = range(per_epoch if per_epoch is not None else 1)
    asked = schedule if per_epoch is not None else _epochs_alone(schedule)
    for epoch in range(epochs):
        if any(asked.fires(epoch, epoch * len(steps) + step) for step in steps):
            return
    length = f", and {per_epoch} steps in each" if per_epoch is not None else ""
    raise UsageError(
        f"the schedule can never fire in this run: it has the epochs 0 to {epochs - 1}{length}, counted from "
        "0, and no step of these is hit. Train longer, or change epochs=, steps=, every= or probability="
    )


def passed_over(schedule: InjectionSchedule, step: int, epoch_of: Epoch) -> None:
    """Note as done what a schedule fired before a step.

    For frameworks whose checkpoints keep no state of ours: what fires when follows from the schedule alone,
    so the past can be worked out.

    Args:
        schedule: the schedule.
        step: steps that are complete; 0 starts anew.
        epoch_of: the epoch that a step lay in.
    """
    state = schedule.state_dict()
    done: list[Fired] = []
    schedule.load_state_dict({**state, "fired": []})
    for past in range(step):
        epoch = epoch_of(past)
        if schedule.due(epoch, past):
            done.append(Fired(epoch, past, f"step_{past:06d}.flips.jsonl"))
            fired = [{"epoch": f.epoch, "step": f.step, "record": f.record} for f in done]
            schedule.load_state_dict({**state, "fired": fired})


def _epochs_alone(schedule: InjectionSchedule) -> InjectionSchedule:
    """A schedule of the same epochs that asks nothing of steps."""
    alone = InjectionSchedule(schedule.policies, seed=schedule.seed, epochs=0)
    alone._epochs = schedule._epochs
    return alone
