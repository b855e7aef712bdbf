"""skorch: faults while a net fits, a tracker of its convergence, a guard against divergence."""

from __future__ import annotations

import copy
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
    from skorch.callbacks import Callback
except ImportError as error:
    raise MissingExtraError("skorch", "callbacks", "Injecting into skorch") from error

from ckptflip.live.torch_tensors import TorchTarget


class SkorchInjector(Callback):  # type: ignore[misc]
    """Injects into the module that a skorch net fits.

    Steps are training batches. Faults hit at the end of a batch; with `gradients`, when they were computed
    and before the optimizer uses them. The net's history says which batches were hit (``flips``: bits that
    changed), and it is what a resumed run goes by: save and load it with the rest (``f_history``), and list
    this callback behind `LoadInitState` and before `Checkpoint`. The schedule itself is copied for each
    ``fit``, as scikit-learn clones estimators.

    Args:
        schedule: what hits, and when.
        gradients: whether gradients may be hit, as ``gradients/layer.weight``.
        records: a folder for records; each is written before the first word is altered.

    Attributes:
        records_: of every firing of the last fit, in order.
        schedule_: the schedule of the last fit, with what it fired.

    Raises:
        SelectionError, UsageError: before training starts: a policy that matches nothing, a schedule that
            cannot fire in this run.
    """

    def __init__(
        self, schedule: InjectionSchedule, gradients: bool = False, records: str | Path | None = None
    ) -> None:
        self.schedule, self.gradients, self.records = schedule, gradients, records

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **run: Any) -> None:  # noqa: N803
        self._firing_ = Firing(copy.deepcopy(self.schedule), self.records)
        self.schedule_, self.records_ = self._firing_.schedule, self._firing_.records
        target = TorchTarget(net.module_, net.optimizer_, self.gradients)
        tensors, certain = target.foreseen()
        epochs = len(net.history) + net.max_epochs
        self._firing_.prepare(tensors, target=target, certain=certain, epochs=epochs)
        self._step_ = self._past(net.history)

    def on_grad_computed(self, net: Any, named_parameters: Any, training: bool = False, **run: Any) -> None:
        if self.gradients and training:
            self._fire(net)

    def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **run: Any) -> None:
        if training:
            if not self.gradients:
                self._fire(net)
            self._step_ += 1

    def undo(self, record: Record | str | Path | None = None) -> int:
        """Give the words of a firing their value back; see `ckptflip.callbacks.Injector.undo`."""
        return self._firing_.undo(record)

    def _fire(self, net: Any) -> None:
        made = self._firing_.fire(len(net.history) - 1, self._step_)
        if made is not None:
            net.history.record_batch("flips", made.bits_effective)

    def _past(self, history: Any) -> int:
        """Take up what a loaded history says was fired, and how many steps it has."""
        step, fired = 0, []
        for epoch, row in enumerate(history):
            for batch in row["batches"]:
                if "flips" in batch:
                    fired.append({"epoch": epoch, "step": step, "record": f"step_{step:06d}.flips.jsonl"})
                step += "train_loss" in batch
        self.schedule_.load_state_dict({**self.schedule_.state_dict(), "fired": fired})
        return step


class SkorchTracker(Callback):  # type: ignore[misc]
    """Feeds a `ConvergenceTracker` the net's history, at the end of every epoch.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: ConvergenceTracker) -> None:
        self.tracker = tracker

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **run: Any) -> None:  # noqa: N803
        done = len(net.history)
        self.tracker.begin(done + net.max_epochs, start=done)

    def on_epoch_end(self, net: Any, **run: Any) -> None:
        row = {name: value for name, value in net.history[-1].items() if name not in ("batches", "epoch")}
        row.pop("dur", None)
        self.tracker.logged(len(net.history), row)

    def on_train_end(self, net: Any, **run: Any) -> None:
        self.tracker.end()


class SkorchGuard(Callback):  # type: ignore[misc]
    """Lets a `DivergenceGuard` stop a fit, or take its module back to the last good state.

    Stopping ends the fit as skorch's `EarlyStopping` does, by a KeyboardInterrupt that skorch catches.

    Args:
        guard: the guard.
    """

    def __init__(self, guard: DivergenceGuard) -> None:
        self.guard = guard

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **run: Any) -> None:  # noqa: N803
        self._step_ = 0
        self.guard.begin(TorchState(net.module_, [net.optimizer_]))

    def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **run: Any) -> None:
        if training:
            self._step_ += 1
            self._obey(self.guard.step(self._step_, float(run["loss"])))

    def on_epoch_end(self, net: Any, **run: Any) -> None:
        self._obey(self.guard.look(self._step_))

    def _obey(self, stop: bool) -> None:
        if stop:
            raise KeyboardInterrupt
