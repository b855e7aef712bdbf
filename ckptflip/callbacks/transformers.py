"""Hugging Face `Trainer`: faults while it trains, a tracker of its convergence, a guard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptflip.callbacks.firing import Firing
from ckptflip.callbacks.guard import DivergenceGuard
from ckptflip.callbacks.recovery import TorchState
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.callbacks.tracker import ConvergenceTracker
from ckptflip.errors import MissingExtraError
from ckptflip.faults.record import Record

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "callbacks", "Injecting into the Trainer") from error

from ckptflip.live.torch_tensors import TorchTarget, unwrapped


class TrainerInjector(TrainerCallback):  # type: ignore[misc]
    """Injects into the model that a Hugging Face `Trainer` trains.

    Steps are optimizer steps (``state.global_step``). Faults hit when a step is complete; with `gradients`,
    before the optimizer uses the gradients, after they were clipped. They are unscaled then, except with
    fp16 and ``max_grad_norm=0``, where the scaler divides them in the step itself. What has fired travels in
    ``trainer_state.json``. Of a distributed run, the schedule's `ranks` are ``args.process_index``. Compiled
    models (``torch_compile=True``) are hit too.

    Args:
        schedule: what hits, and when.
        gradients: whether gradients may be hit, as ``gradients/layer.weight``.
        records: a folder for records; each is written before the first word is altered.

    Attributes:
        records: of every firing so far, in order.

    Raises:
        SelectionError, UsageError: before training starts: a policy that matches nothing, a schedule that
            cannot fire in this run, a model whose parameters are kept in pieces.
    """

    def __init__(
        self, schedule: InjectionSchedule, *, gradients: bool = False, records: str | Path | None = None
    ) -> None:
        self._firing = Firing(schedule, records)
        self._gradients = gradients
        self._epoch = 0
        self._key = f"ckptflip.TrainerInjector, seed {schedule.seed}"

    @property
    def records(self) -> list[Record]:
        return self._firing.records

    def on_train_begin(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        target = TorchTarget(unwrapped(run["model"]), run["optimizer"], self._gradients)
        tensors, certain = target.foreseen()
        schedule = self._firing.schedule
        found = state.stateful_callbacks.get(self._key) if state.global_step else None
        schedule.load_state_dict(found or {**schedule.state_dict(), "fired": []})
        epochs, per_epoch = length_of(args, state, run["train_dataloader"])
        self._firing.prepare(
            tensors,
            target=target,
            certain=certain,
            epochs=epochs,
            per_epoch=per_epoch,
            rank=args.process_index,
            world=args.world_size,
        )
        self._note(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        self._epoch = epoch_of(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        if self._gradients:
            self._fire(state, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        if not self._gradients:
            self._fire(state, state.global_step - 1)

    def undo(self, record: Record | str | Path | None = None) -> int:
        """Give the words of a firing their value back; see `ckptflip.callbacks.Injector.undo`."""
        return self._firing.undo(record)

    def _fire(self, state: Any, step: int) -> None:
        if self._firing.schedule.due(self._epoch, step):
            self._firing.fire(self._epoch, step)
            self._note(state)

    def _note(self, state: Any) -> None:
        # The Trainer writes this dict, of plain values, into every checkpoint.
        state.stateful_callbacks[self._key] = self._firing.schedule.state_dict()


class TrainerTracker(TrainerCallback):  # type: ignore[misc]
    """Feeds a `ConvergenceTracker` what the `Trainer` logs: one row for each epoch that is evaluated.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: ConvergenceTracker) -> None:
        self.tracker = tracker
        self._logs: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        self._logs = {}
        self.tracker.begin(state.num_train_epochs, start=epoch_of(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **run: Any) -> None:
        self._logs.update({name: value for name, value in logs.items() if not name.startswith("eval_")})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **run: Any
    ) -> None:
        measured = self._logs | dict(metrics)
        measured.pop("epoch", None)
        self.tracker.logged(epoch_of(state), measured)
        self._logs = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        self.tracker.end()


class TrainerGuard(TrainerCallback):  # type: ignore[misc]
    """Lets a `DivergenceGuard` stop the `Trainer`, or take its model back to the last good state.

    The loss is the one that the `Trainer` logs: pass ``logging_steps=1`` to have every step's, and
    ``logging_nan_inf_filter=False``, for otherwise it logs the mean of others in the place of a NaN. Once a
    loss that is not finite was logged, the Trainer logs no other (it sums them up): from then on the guard
    looks at the weights instead.

    Args:
        guard: the guard.
    """

    def __init__(self, guard: DivergenceGuard) -> None:
        self.guard = guard
        self._spoilt = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        self._spoilt = False
        optimizer = getattr(run["optimizer"], "optimizer", run["optimizer"])
        self.guard.begin(TorchState(unwrapped(run["model"]), [optimizer]), state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **run: Any) -> Any:
        if "loss" in logs:
            loss = float(logs["loss"])
            stop = self.guard.look(state.global_step, keep=False) if self._spoilt else False
            stop = self.guard.step(state.global_step, None if self._spoilt else loss) or stop
            self._spoilt = self._spoilt or not math.isfinite(loss)
            self._obey(control, stop)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **run: Any) -> Any:
        self._obey(control, self.guard.look(state.global_step))
        return control

    def _obey(self, control: Any, stop: bool) -> None:
        control.should_training_stop = control.should_training_stop or stop


def epoch_of(state: Any) -> int:
    """Epochs that are complete; the Trainer keeps them as a fraction."""
    return int((state.epoch or 0) + 1e-6)


def length_of(args: Any, state: Any, batches: Any) -> tuple[int | None, int | None]:
    """Epochs and steps per epoch of a run; None where the Trainer does not know."""
    try:
        per_epoch = max(1, -(-len(batches) // args.gradient_accumulation_steps))
    except TypeError:
        return None, None
    return -(-state.max_steps // per_epoch), per_epoch
