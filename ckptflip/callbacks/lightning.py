"""Lightning: faults while a `Trainer` fits, a tracker of its convergence, a guard against divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptflip.callbacks.firing import Firing
from ckptflip.callbacks.guard import DivergenceGuard
from ckptflip.callbacks.recovery import TorchState
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.callbacks.tracker import ConvergenceTracker
from ckptflip.errors import MissingExtraError, UsageError
from ckptflip.faults.record import Record

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingExtraError("lightning", "callbacks", "Injecting into Lightning") from error

from ckptflip.live.torch_tensors import TorchTarget, unwrapped


class LightningInjector(Callback):  # type: ignore[misc]
    """Injects into the module that a Lightning `Trainer` fits.

    Steps are optimizer steps (``trainer.global_step``). Faults hit at the end of the batch that completes a
    step; with `gradients`, before the optimizer uses the gradients, unscaled and not yet clipped. A scaler
    (``16-mixed``) has looked for infinities by then: a gradient that a fault made infinite is used. What has
    fired travels in Lightning's checkpoints. Of a distributed run, the schedule's `ranks` are
    ``trainer.global_rank``. Compiled modules (``torch.compile``) are hit too.

    Args:
        schedule: what hits, and when.
        gradients: whether gradients may be hit, as ``gradients/layer.weight``.
        records: a folder for records; each is written before the first word is altered.
        optimizer: which of several optimizers' state may be hit.

    Attributes:
        records: of every firing so far, in order.

    Raises:
        SelectionError, UsageError: before training starts: a policy that matches nothing, a schedule that
            cannot fire in this run, a strategy that keeps parameters in pieces.
    """

    def __init__(
        self,
        schedule: InjectionSchedule,
        *,
        gradients: bool = False,
        records: str | Path | None = None,
        optimizer: int = 0,
    ) -> None:
        self._firing = Firing(schedule, records)
        self._gradients, self._optimizer = gradients, optimizer
        self._seen = 0

    @property
    def records(self) -> list[Record]:
        return self._firing.records

    @property
    def state_key(self) -> str:
        key: str = self._generate_state_key(seed=self._firing.schedule.seed)
        return key

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        unwrapped(trainer.strategy.model or pl_module)
        optimizers = trainer.optimizers
        if optimizers and not 0 <= self._optimizer < len(optimizers):
            raise UsageError(
                f"optimizer {self._optimizer} was asked for; the run has {len(optimizers)}, from 0"
            )
        chosen = optimizers[self._optimizer] if optimizers else None
        target = TorchTarget(pl_module, chosen, self._gradients)
        tensors, certain = target.foreseen()
        epochs, per_epoch = length_of(trainer)
        self._firing.prepare(
            tensors,
            target=target,
            certain=certain,
            epochs=epochs,
            per_epoch=per_epoch,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        self._seen = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._gradients:
            self._firing.fire(trainer.current_epoch, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients are accumulated in batches that complete no step; several optimizers complete several.
        for step in range(self._seen, trainer.global_step) if not self._gradients else ():
            self._firing.fire(trainer.current_epoch, step)
        self._seen = trainer.global_step

    def undo(self, record: Record | str | Path | None = None) -> int:
        """Give the words of a firing their value back; see `ckptflip.callbacks.Injector.undo`."""
        return self._firing.undo(record)

    def state_dict(self) -> dict[str, Any]:
        return self._firing.schedule.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._firing.schedule.load_state_dict(state_dict)


class LightningTracker(Callback):  # type: ignore[misc]
    """Feeds a `ConvergenceTracker` what the module logs, at the end of every epoch.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: ConvergenceTracker) -> None:
        self.tracker = tracker

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.tracker.begin(length_of(trainer)[0], start=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.tracker.logged(trainer.current_epoch + 1, trainer.callback_metrics)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.tracker.end()


class LightningGuard(Callback):  # type: ignore[misc]
    """Lets a `DivergenceGuard` stop the `Trainer`, or take its module back to the last good state.

    Args:
        guard: the guard.
    """

    def __init__(self, guard: DivergenceGuard) -> None:
        self.guard = guard

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.guard.begin(TorchState(pl_module, trainer.optimizers), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        seen = None if loss is None else float(loss.detach())
        trainer.should_stop = self.guard.step(trainer.global_step, seen) or trainer.should_stop

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = self.guard.look(trainer.global_step) or trainer.should_stop


def length_of(trainer: Any) -> tuple[int | None, int | None]:
    """Epochs and steps per epoch of a run; None where Lightning does not know."""
    per_epoch = trainer.num_training_batches
    known = isinstance(per_epoch, int) and per_epoch > 0
    steps = max(1, -(-per_epoch // trainer.accumulate_grad_batches)) if known else None
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
    if epochs is None and steps is not None and trainer.max_steps > 0:
        epochs = -(-trainer.max_steps // steps)
    return epochs, steps
