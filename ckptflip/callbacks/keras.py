"""Keras: faults while ``fit`` trains, a tracker of its convergence, a guard against divergence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptflip.callbacks.firing import Firing, passed_over
from ckptflip.callbacks.guard import DivergenceGuard
from ckptflip.callbacks.recovery import KerasState
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.callbacks.tracker import ConvergenceTracker
from ckptflip.errors import MissingExtraError, UsageError
from ckptflip.faults.record import Record
from ckptflip.frameworks import before_tensorflow
from ckptflip.live.keras_variables import KerasGradients, KerasTarget

before_tensorflow()
try:
    import keras
except ImportError as error:
    raise MissingExtraError("keras", "keras", "Injecting into Keras") from error


class KerasInjector(keras.callbacks.Callback):  # type: ignore[misc]
    """Injects into a Keras model while ``fit`` trains it, on the TensorFlow, torch and JAX backends.

    Steps are training batches, counted on from the optimizer's ``iterations``, which Keras' checkpoints hold:
    a run resumed from one knows by them what has fired already. Faults hit when a step is complete; list this
    callback before `ModelCheckpoint` and `BackupAndRestore` behind it. Weights, statistics and optimizer
    state are hit in compiled models too (``jit_compile``).

    Gradients are hit before the optimizer uses them, scaled if the optimizer scales losses, where Keras runs
    step by step: on torch without ``jit_compile``, on TensorFlow with ``run_eagerly=True``, never on JAX.

    Args:
        schedule: what hits, and when.
        gradients: hit gradients, as ``gradients/dense/kernel``, and nothing else.
        optimizer: whether the optimizer's state may be hit.
        records: a folder for records; each is written before the first word is altered.

    Attributes:
        records: of every firing so far, in order.

    Raises:
        SelectionError, UsageError: before training starts: a policy that matches nothing, a schedule that
            cannot fire in this run, a compiled model that would swallow faults in gradients.
    """

    def __init__(
        self,
        schedule: InjectionSchedule,
        *,
        gradients: bool = False,
        optimizer: bool = True,
        records: str | Path | None = None,
    ) -> None:
        super().__init__()
        self._firing = Firing(schedule, records)
        self._gradients, self._with_optimizer = gradients, optimizer
        self._epoch, self._step = 0, 0
        self._loaded: int | None = None

    @property
    def records(self) -> list[Record]:
        return self._firing.records

    def on_train_begin(self, logs: Any = None) -> None:
        model, per_epoch = self.model, self.params.get("steps")
        _check_steps(model)
        tensors, target = self._tensors(model)
        self._firing.prepare(tensors, target=target, epochs=self.params.get("epochs"), per_epoch=per_epoch)
        self._step = self._loaded if self._loaded is not None else _trained(model)
        if self._loaded is None:
            passed_over(self._firing.schedule, self._step, lambda step: _epoch(step, per_epoch))
        self._loaded = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._gradients and self._firing.schedule.due(self._epoch, self._step):
            self._intercept(self.model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Looking at self.model makes JAX hand the variables back: only when they are needed.
        if not self._gradients and self._firing.schedule.due(self._epoch, self._step):
            assert self.model is not None
            self._firing.fire(self._epoch, self._step)
        self._step += 1

    def undo(self, record: Record | str | Path | None = None) -> int:
        """Give the words of a firing their value back; see `ckptflip.callbacks.Injector.undo`."""
        return self._firing.undo(record)

    def state_dict(self) -> dict[str, Any]:
        """What has fired, for checkpoints of your own: plain values."""
        return {"schedule": self._firing.schedule.state_dict(), "steps": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, before ``fit``; it counts instead of the optimizer's iterations."""
        steps = state.get("steps") if isinstance(state, Mapping) else None
        if not isinstance(steps, int):
            raise UsageError("this is no state of an injector: pass what its state_dict() returned")
        self._firing.schedule.load_state_dict(state["schedule"])
        self._loaded = steps

    def _tensors(self, model: Any) -> tuple[Any, KerasTarget | None]:
        if not self._gradients:
            target = KerasTarget(model, self._with_optimizer)
            return target.tensors, target
        _check_gradients(model)
        values = [v.value for v in model.trainable_variables]
        return KerasGradients(model, values, model.trainable_variables).tensors, None

    def _intercept(self, model: Any) -> None:
        """Stand before the optimizer's next step, and only that one."""
        optimizer = model.optimizer

        def apply(grads: Any, trainable_variables: Any = None) -> Any:
            del optimizer.apply
            variables = list(trainable_variables or model.trainable_variables)
            target = KerasGradients(model, list(grads), variables)
            self._firing.fire(self._epoch, self._step, target)
            return optimizer.apply(target.gradients, trainable_variables)

        optimizer.apply = apply


class KerasTracker(keras.callbacks.Callback):  # type: ignore[misc]
    """Feeds a `ConvergenceTracker` the logs of ``fit``, at the end of every epoch.

    Args:
        tracker: the tracker.
    """

    def __init__(self, tracker: ConvergenceTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self._begun = False

    def on_train_begin(self, logs: Any = None) -> None:
        self._begun = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # Only here does Keras tell which epoch it resumes from.
        if not self._begun:
            self.tracker.begin(self.params.get("epochs"), start=epoch)
            self._begun = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.tracker.logged(epoch + 1, logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        self.tracker.end()


class KerasGuard(keras.callbacks.Callback):  # type: ignore[misc]
    """Lets a `DivergenceGuard` stop ``fit``, or take its model back to the last good state.

    Keras logs the mean loss of the epoch so far; the guard sees what each batch added to it.

    Args:
        guard: the guard.
    """

    def __init__(self, guard: DivergenceGuard) -> None:
        super().__init__()
        self.guard = guard
        self._step, self._batches, self._sum = 0, 0, 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._step = _trained(self.model)
        self.guard.begin(KerasState(self.model), self._step)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._batches, self._sum = 0, 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._step += 1
        self._batches += 1
        total = float((logs or {}).get("loss", "nan")) * self._batches
        seen = len(self.guard.events)
        if self.guard.step(self._step, total - self._sum):
            self.model.stop_training = True
        self._sum = total
        if len(self.guard.events) > seen:
            # A rollback lets the metrics start anew.
            self._batches, self._sum = 0, 0.0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.guard.look(self._step):
            self.model.stop_training = True


def _trained(model: Any) -> int:
    """Batches that a model's optimizer has seen."""
    optimizer = model.optimizer
    gathered = getattr(getattr(optimizer, "inner_optimizer", optimizer), "gradient_accumulation_steps", None)
    return int(optimizer.iterations) * (gathered or 1)


def _epoch(step: int, per_epoch: int | None) -> int | None:
    return step // per_epoch if per_epoch else None


def _check_steps(model: Any) -> None:
    if model.steps_per_execution not in (None, 1):
        raise UsageError(
            f"steps_per_execution={model.steps_per_execution} runs so many steps without a stop, and faults "
            "can only hit between them: compile the model with steps_per_execution=1"
        )


def _check_gradients(model: Any) -> None:
    """Refuse where a compiled step would never ask for the altered gradients."""
    backend = keras.backend.backend()
    if backend == "torch" and not model.jit_compile:
        return
    if backend == "tensorflow" and model.run_eagerly:
        return
    remedy = {
        "torch": "compile the model with jit_compile=False",
        "tensorflow": "compile the model with run_eagerly=True",
    }.get(backend, "use Keras' torch backend")
    raise UsageError(
        f"the training step is compiled as a whole on {backend}, so that faults in gradients would never be "
        f"seen: {remedy}, or hit weights or optimizer state instead"
    )
