"""A workload made of a PyTorch model, an optimizer and data held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip import torch_h5
from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Training with PyTorch") from error

from ckptflip.training import torch_state
from ckptflip.training.checks import check_samples, check_sizes, no_state
from ckptflip.training.digests import state_digest
from ckptflip.training.measures import accuracy, count_nev, gradient_norm
from ckptflip.training.settings import random_state, seed_all, set_random_state, settled
from ckptflip.training.torch_state import Run

Pair = tuple[Any, Any]
Data = tuple[Pair, Pair]
Augment = Callable[[torch.Tensor, int, int, "np.ndarray[Any, np.dtype[np.int64]]"], torch.Tensor]
Metric = Callable[[torch.Tensor, torch.Tensor], "float | dict[str, float]"]
# What the model is given: a tensor with the sample as first axis, or a tuple of them.
Inputs = Any


class TorchWorkload:
    """A resumable recipe: the same seed gives the same bits, straight through or resumed at any epoch.

    The order of the samples in epoch e is drawn from (seed, e) and nothing else. Dropout and other draws
    of the model come from PyTorch's generators, whose state is kept in the checkpoint; your process's own
    generators and settings are as before after every call. The checkpoint (`ckptflip.torch_h5`) holds
    ``model``, ``optimizer``, ``scheduler`` and ``scaler`` where there are any, ``rng``, ``epoch``, ``seed``.

    Args:
        name: kept in each checkpoint; one of another name is refused.
        model: makes the model. Called after seeding, so the initial weights follow from the seed.
        optimizer: makes the optimizer from the model's named parameters (name, parameter), so that the
            checkpoint can say which state belongs to which parameter.
        loss: ``loss(outputs, targets)``, a scalar tensor, the mean over the batch.
        data: ``((inputs, targets), (test inputs, test targets))``, arrays or tensors with the sample as first
            axis, or a function that returns them, called when they are first needed. A tuple of inputs is
            given to the model as so many arguments.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        per_epoch: samples of an epoch, where that is not the whole training set: the first epoch takes the
            first so many, the next one those that follow, round and round. For logs that are gone through
            once, so that checkpoints lie between.
        scheduler: makes a learning-rate scheduler from the optimizer; stepped after every epoch.
        scaler: makes a ``torch.amp.GradScaler``, for models that autocast.
        augment: ``augment(inputs, seed, epoch, indices)`` gives the inputs of a training step: `inputs`
            changed in a way that depends on (seed, epoch, indices) alone; these are int64[n], places in the
            training set. Of several inputs the first is changed.
        autocast: precision of the model's steps under ``torch.autocast``, such as ``torch.bfloat16``; weights
            and optimizer keep theirs.
        test_batch: samples per step of the evaluation.
        metric: ``metric(outputs, targets)`` over the whole test set: a number, recorded as ``accuracy``, or
            a dict, recorded under its names; a ``loss`` in it takes the place of that of the loss function.
        device: where the model and the batches live.
        threads: PyTorch's threads while it trains. Another number gives other last bits of a sum, so a run
            and its resume need the same.
        extreme: weights whose magnitude exceeds this are counted as extreme.

    Example:
        >>> x = torch.linspace(-1, 1, 40).reshape(20, 2)
        >>> workload = TorchWorkload(
        ...     "sign",
        ...     model=lambda: torch.nn.Linear(2, 2),
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        ...     loss=torch.nn.CrossEntropyLoss(),
        ...     data=((x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long())),
        ...     batch_size=5,
        ... )
        >>> workload.start(seed=1)
        >>> sorted(workload.train_epoch()), workload.epoch
        (['grad_norm', 'loss'], 1)
        >>> 0.5 < workload.evaluate()["accuracy"] <= 1
        True
    """

    def __init__(
        self,
        name: str,
        *,
        model: Callable[[], torch.nn.Module],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        data: Data | Callable[[], Data],
        batch_size: int,
        per_epoch: int | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        scaler: Callable[[], Any] | None = None,
        augment: Augment | None = None,
        autocast: torch.dtype | None = None,
        metric: Metric = accuracy,
        device: str | torch.device = "cpu",
        threads: int = 1,
        extreme: float = 1e10,
        test_batch: int = 1024,
    ) -> None:
        check_sizes(batch_size, test_batch, threads)
        if per_epoch is not None and per_epoch < 1:
            raise UsageError(f"an epoch has 1 sample or more, not {per_epoch}")
        self.name, self._per_epoch = name, per_epoch
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._scheduler, self._scaler, self._metric = scheduler, scaler, metric
        self._augment, self._autocast = augment, autocast
        self._source, self._batch_size, self._test_batch = data, batch_size, test_batch
        self._device, self._threads, self._extreme = _device(device), threads, extreme
        self._loaded: tuple[tuple[Inputs, torch.Tensor], ...] | None = None
        self._run: Run | None = None

    @property
    def epoch(self) -> int:
        """Epochs trained so far; 0 before `start`."""
        return self._run.epoch if self._run else 0

    @property
    def seed(self) -> int:
        """What the present run was started with."""
        return self._current().seed

    @property
    def model(self) -> torch.nn.Module:
        """The model as it is now, for measurements on it."""
        return self._current().model

    def start(self, seed: int) -> None:
        """Set up the initial state for a seed >= 0."""
        if seed < 0:
            raise UsageError(f"a seed is 0 or more, not {seed}")
        with settled(self._threads, self._device):
            self._run = self._built(seed)

    def train_epoch(self) -> dict[str, float]:
        """Train one epoch; returns the mean ``loss`` and the mean ``grad_norm`` (L2, float64)."""
        run = self._current()
        inputs, targets = self._data()[0]
        samples = len(targets)
        order = _order(run.seed, run.epoch, samples, min(self._per_epoch or samples, samples))
        losses, norms = 0.0, []
        with self._random_of(run):
            run.model.train()
            parameters = list(run.model.parameters())
            for batch in torch.from_numpy(order).to(targets.device).split(self._batch_size):
                chosen = tuple(part[batch] for part in _several(inputs))
                if self._augment is not None:
                    first = self._augment(chosen[0], run.seed, run.epoch, batch.cpu().numpy())
                    chosen = (first, *chosen[1:])
                loss, norm = self._step(run, parameters, chosen, targets[batch])
                losses += loss * len(batch)
                norms.append(norm)
            if isinstance(run.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                run.scheduler.step(losses / len(order))
            elif run.scheduler is not None:
                run.scheduler.step()
            run.rng = random_state(self._device)
        run.epoch += 1
        return {"loss": losses / len(order), "grad_norm": sum(norms) / len(norms)}

    def evaluate(self) -> dict[str, float]:
        """Measure ``loss``, the metric, and the weights' ``nan``, ``inf`` and ``extreme`` counts."""
        return self.measure(self.outputs()[0]) | count_nev(self._current().model, self._extreme)

    def measure(self, outputs: torch.Tensor) -> dict[str, float]:
        """The ``loss`` and the metric of outputs for the test set, such as `outputs` gives.

        Args:
            outputs: one for each test sample, in their order.
        """
        targets = self._data()[1][1]
        with self._random_of(self._current()), torch.no_grad():
            with self._casting():
                loss = self._loss(outputs, targets).item()
            metric = self._metric(outputs, targets)
        named = metric if isinstance(metric, dict) else {"accuracy": float(metric)}
        return {"loss": loss} | named

    def outputs(self, model: torch.nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs for the test set, and the targets: what measures of pairs of runs need.

        Args:
            model: another one that takes the same inputs, such as a quantised copy.
        """
        run = self._current()
        with self._random_of(run), torch.no_grad(), self._casting():
            return self._outputs(run.model if model is None else model)

    def inputs(self, *, train: bool = True) -> tuple[torch.Tensor, ...]:
        """What the model is given, as a tensor for each argument: of the training set, or of the test set."""
        return tuple(_several(self._data()[0 if train else 1][0]))

    def save(self, path: str | Path) -> None:
        """Write the whole state to an HDF5 file."""
        torch_h5.save(torch_state.capture(self._current(), self.name), path)

    def digest(self) -> str:
        """A digest of everything that `save` would write: equal digests, equal states bit for bit."""
        return state_digest(torch_state.capture(self._current(), self.name))

    def load(self, path: str | Path) -> None:
        """Take up the state of a checkpoint; when that fails, the present state stays."""
        state = torch_h5.load(path)
        seed, epoch = torch_state.identify(state, self.name, str(path))
        with settled(self._threads, self._device):
            run = self._built(seed)
            torch_state.take_up(run, state, str(path), self._device)
            run.rng, run.epoch = random_state(self._device), epoch
        self._run = run

    def _built(self, seed: int) -> Run:
        seed_all(seed, self._device)
        model = self._model().to(self._device)
        optimizer = self._optimizer(_parameters(model))
        scheduler = self._scheduler(optimizer) if self._scheduler else None
        scaler = self._scaler() if self._scaler else None
        return Run(model, optimizer, scheduler, scaler, random_state(self._device), seed)

    def _outputs(self, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self._data()[1]
        model.eval()
        batches = zip(*(part.split(self._test_batch) for part in _several(inputs)), strict=True)
        return torch.cat([model(*batch) for batch in batches]), targets

    def _step(
        self,
        run: Run,
        parameters: list[torch.nn.Parameter],
        inputs: tuple[torch.Tensor, ...],
        targets: torch.Tensor,
    ) -> tuple[float, float]:
        run.optimizer.zero_grad()
        with self._casting():
            loss = self._loss(run.model(*inputs), targets)
        if run.scaler is None:
            loss.backward()
            norm = gradient_norm(parameters)
            run.optimizer.step()
        else:
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizer)
            norm = gradient_norm(parameters)
            run.scaler.step(run.optimizer)
            run.scaler.update()
        return loss.item(), norm

    def _casting(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        casting: AbstractContextManager[Any] = torch.autocast(self._device.type, self._autocast)
        return casting

    @contextmanager
    def _random_of(self, run: Run) -> Iterator[None]:
        with settled(self._threads, self._device):
            set_random_state(run.rng, self._device)
            yield

    def _current(self) -> Run:
        if self._run is None:
            raise no_state(self.name)
        return self._run

    def _data(self) -> tuple[tuple[Inputs, torch.Tensor], ...]:
        if self._loaded is None:
            pairs = self._source() if callable(self._source) else self._source
            loaded = tuple((self._placed(inputs), self._placed(targets)) for inputs, targets in pairs)
            check_samples(
                self.name, ((one, targets) for inputs, targets in loaded for one in _several(inputs))
            )
            self._loaded = loaded
        return self._loaded

    def _placed(self, values: Any) -> Any:
        if isinstance(values, tuple):
            return tuple(torch.as_tensor(one, device=self._device) for one in values)
        return torch.as_tensor(values, device=self._device)


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device is cpu, cuda, cuda:1 or another of PyTorch's, not {device!r}") from None


def _order(seed: int, epoch: int, samples: int, per_epoch: int) -> Any:
    """int64[per_epoch]: the samples of an epoch, shuffled."""
    shuffled = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(per_epoch)
    return (shuffled + epoch * per_epoch) % samples


def _several(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _parameters(model: torch.nn.Module) -> Any:
    # PyTorch takes named parameters, and keeps the names in the optimizer's state, from 2.6 on.
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return list(model.named_parameters()) if release >= (2, 6) else list(model.parameters())
