"""A workload made of a compiled Keras model and data held in memory, on TensorFlow, torch and JAX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import CkptflipError, UsageError, WorkloadError
from ckptflip.training import keras_state
from ckptflip.training.checks import check_samples, check_sizes, no_state
from ckptflip.training.digests import state_digest
from ckptflip.training.keras_settings import (
    backend,
    fix_threads,
    fresh_ambient,
    keras,
    seed_all,
    settled,
)
from ckptflip.training.keras_state import Run, random_state, set_random_state
from ckptflip.training.keras_steps import steps_of

Pair = tuple[Any, Any]
Data = tuple[Pair, Pair]
Augment = Callable[[NDArray[Any], int, int, NDArray[np.int64]], NDArray[Any]]


class KerasWorkload:
    """A resumable recipe: the same seed gives the same bits, straight through or resumed at any epoch.

    The order of the samples in epoch e is drawn from (seed, e) and nothing else. Weights, the optimizer's
    state, statistics of normalisations and the random generators of the layers travel in the checkpoint: a
    ``.keras`` file that ``keras.saving.load_model`` reads too. The loss, the optimizer (with its schedule and
    loss scale) and the metrics are those the model was compiled with. What `fit` adds to them is left out:
    callbacks, sample and class weights, and a ``train_step`` of your own, which is refused.

    A resume runs on the backend that the checkpoint was trained on. Your process's random generators and
    settings are as before after every call, but for TensorFlow's number of threads, which is fixed when it
    computes for the first time.

    Args:
        name: kept in each checkpoint; one of another name is refused.
        model: makes the compiled model, with one input and one output. Called after seeding, so the initial
            weights follow from the seed.
        data: ``((inputs, targets), (test inputs, test targets))``, arrays with the sample as first axis, or a
            function that returns them, called when they are first needed.
        batch_size: samples per step; the last batch of an epoch may be smaller.
        augment: ``augment(inputs, seed, epoch, indices)`` gives the inputs of a training step: `inputs`
            changed in a way that depends on (seed, epoch, indices) alone; these are int64[n], places in the
            training set.
        test_batch: samples per step of the evaluation.
        threads: the backend's threads while it trains. Another number may give other last bits of a sum, so
            a resume takes the number that its checkpoint began with.
        extreme: weights whose magnitude exceeds this are counted as extreme.

    Example:
        >>> x = np.linspace(-1, 1, 40, dtype="float32").reshape(20, 2)
        >>> y = (x[:, 0] > 0).astype("int32")
        >>> def model():
        ...     made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        ...     loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        ...     made.compile(keras.optimizers.SGD(0.5, momentum=0.9), loss)
        ...     return made
        >>> workload = KerasWorkload("sign", model=model, data=((x, y), (x, y)), batch_size=5)
        >>> workload.start(seed=1)
        >>> sorted(workload.train_epoch()), workload.epoch
        (['grad_norm', 'loss'], 1)
        >>> 0.5 < workload.evaluate()["accuracy"] <= 1
        True
    """

    suffix = ".keras"

    def __init__(
        self,
        name: str,
        *,
        model: Callable[[], Any],
        data: Data | Callable[[], Data],
        batch_size: int,
        augment: Augment | None = None,
        test_batch: int = 1024,
        threads: int = 1,
        extreme: float = 1e10,
    ) -> None:
        check_sizes(batch_size, test_batch, threads)
        self.name = name
        self._model, self._source = model, data
        self._augment, self._batch_size, self._test_batch = augment, batch_size, test_batch
        self._threads, self._extreme = threads, extreme
        self._loaded: tuple[tuple[NDArray[Any], NDArray[Any]], ...] | None = None
        self._run: Run | None = None

    @property
    def epoch(self) -> int:
        """Epochs trained so far; 0 before `start`."""
        return self._run.epoch if self._run else 0

    @property
    def model(self) -> Any:
        """The model as it is now, for measurements on it."""
        return self._current().model

    def start(self, seed: int) -> None:
        """Set up the initial state for a seed >= 0."""
        if seed < 0:
            raise UsageError(f"a seed is 0 or more, not {seed}")
        self._run = self._built(seed, fix_threads(self._threads))

    def train_epoch(self) -> dict[str, float]:
        """Train one epoch; returns the mean ``loss`` and the mean ``grad_norm`` (L2, float64)."""
        run = self._current()
        inputs, targets = self._data()[0]
        order = np.random.default_rng(np.random.SeedSequence((run.seed, run.epoch))).permutation(len(inputs))
        losses, norms = 0.0, []
        with self._random_of(run):
            try:
                for at in range(0, len(order), self._batch_size):
                    batch = order[at : at + self._batch_size]
                    chosen = inputs[batch]
                    if self._augment is not None:
                        chosen = self._augment(chosen, run.seed, run.epoch, batch)
                    loss, norm = run.steps.train(chosen, targets[batch])
                    losses += loss * len(batch)
                    norms.append(norm)
            finally:
                run.steps.finish()
            run.rng = random_state()
        run.epoch += 1
        return {"loss": losses / len(order), "grad_norm": sum(norms) / len(norms)}

    def evaluate(self) -> dict[str, float]:
        """Measure ``loss``, ``accuracy``, compiled metrics, and how many weights are not finite or extreme.

        ``accuracy`` is the compiled metric of this name; without one it is the share of samples whose largest
        output is the target's class, for models with an output per class, and left out for others.
        """
        run = self._current()
        inputs, targets = self._data()[1]
        loss, parts = 0.0, []
        with self._random_of(run):
            before = keras_state.snapshot(run)
            run.model.reset_metrics()
            for at in range(0, len(inputs), self._test_batch):
                x, y = (array[at : at + self._test_batch] for array in (inputs, targets))
                one, outputs = run.steps.test(x, y)
                loss += one * len(x)
                parts.append(outputs)
                metrics = run.model.compute_metrics(
                    *(keras.ops.convert_to_tensor(array) for array in (x, y, outputs))
                )
            measured = {name: float(value) for name, value in metrics.items() if name != "loss"}
            run.model.reset_metrics()
            keras_state.restore(run, before, self.name)
            measured |= _count_nev(run.model, self._extreme)
        measured = _accuracy(np.concatenate(parts), targets) | measured
        return measured | {"loss": loss / len(inputs)}

    def save(self, path: str | Path) -> None:
        """Write the whole state to a ``.keras`` file."""
        run = self._current()
        with settled(run.ambient, run.threads, x64=run.x64):
            keras_state.write(run, self.name, Path(path))

    def digest(self) -> str:
        """A digest of everything that `save` would write: equal digests, equal states bit for bit."""
        run = self._current()
        with settled(run.ambient, run.threads, x64=run.x64):
            return state_digest(keras_state.capture(run, self.name))

    def load(self, path: str | Path) -> None:
        """Take up the state of a checkpoint; when that fails, the present state stays."""
        self._run = self._taken_up(Path(path), None)

    def reload(self, path: str | Path) -> None:
        """As `load`, into the model at hand if it has the same seed: without making and tracing a new one.

        When it fails, no state is left.
        """
        run, self._run = self._run, None
        self._run = self._taken_up(Path(path), run)

    def _taken_up(self, path: Path, run: Run | None) -> Run:
        held = keras_state.read(path)
        keras_state.identify(held, self.name, path)
        threads = fix_threads(held.threads)
        if threads != held.threads:
            raise WorkloadError(
                f"{path} was trained on threads: {held.threads}, and {backend()} runs {threads} in this "
                "process, which can no longer be changed: the resume would not be exact. Load it in a new one"
            )
        if run is None or (run.seed, run.threads) != (held.seed, threads):
            run = self._built(held.seed, threads)
        with settled(run.ambient, run.threads, x64=run.x64):
            keras_state.take_up(run, held, path)
        return run

    def _built(self, seed: int, threads: int) -> Run:
        run = self._built_with(seed, threads, x64=False)
        if backend() == "jax" and any("64" in str(v.dtype) for v in run.model.weights):
            # What JAX made of it is in 32 bits; only now is it known that it should not be.
            run = self._built_with(seed, threads, x64=True)
        return run

    def _built_with(self, seed: int, threads: int, *, x64: bool) -> Run:
        ambient = fresh_ambient()
        with settled(ambient, threads, x64=x64):
            generator = seed_all(seed)
            try:
                model = self._model()
                _check_compiled(model, self.name)
                _build(model, self._data()[0][0], self.name)
            except CkptflipError:
                raise
            except Exception as error:  # the user's function may fail in any way
                raise WorkloadError(
                    f"workload {self.name}: making the model failed: {type(error).__name__}: {error}"
                ) from error
            return Run(model, steps_of(model), ambient, generator, random_state(), seed, threads, x64)

    @contextmanager
    def _random_of(self, run: Run) -> Iterator[None]:
        with settled(run.ambient, run.threads, x64=run.x64):
            set_random_state(run.rng)
            yield

    def _current(self) -> Run:
        if self._run is None:
            raise no_state(self.name)
        return self._run

    def _data(self) -> tuple[tuple[NDArray[Any], NDArray[Any]], ...]:
        if self._loaded is None:
            pairs = self._source() if callable(self._source) else self._source
            loaded = tuple(
                (_array(inputs, self.name), _array(targets, self.name)) for inputs, targets in pairs
            )
            check_samples(self.name, loaded)
            self._loaded = loaded
        return self._loaded


def _array(values: Any, name: str) -> NDArray[Any]:
    if isinstance(values, dict | tuple) or (isinstance(values, list) and hasattr(values[0], "shape")):
        raise WorkloadError(
            f"workload {name}: inputs and targets are one array each; models with several are not supported"
        )
    array = np.asarray(values)
    if array.dtype == object or array.ndim == 0:
        raise WorkloadError(f"workload {name}: data must be arrays of numbers with the sample as first axis")
    return array


def _check_compiled(model: Any, name: str) -> None:
    if not isinstance(model, keras.Model):
        raise WorkloadError(f"workload {name}: model() made a {type(model).__name__}, not a keras.Model")
    if not model.compiled or model.optimizer is None:
        raise WorkloadError(
            f"workload {name}: model() made a model that is not compiled; call "
            "model.compile(optimizer=…, loss=…) in it"
        )
    if type(model).train_step is not keras.Model.train_step:
        raise WorkloadError(
            f"workload {name}: {type(model).__name__} has a train_step of its own, which would be left "
            "out. Put its loss into compute_loss, or write a workload of your own (training.Workload)"
        )


def _build(model: Any, inputs: NDArray[Any], name: str) -> None:
    """Create all variables of the model and of its optimizer."""
    outputs = None
    if not model.built:
        shape = (None, *inputs.shape[1:])
        outputs = model(keras.KerasTensor(shape, dtype=keras.backend.standardize_dtype(inputs.dtype)))
    ends = {"inputs": getattr(model, "inputs", None), "outputs": getattr(model, "outputs", outputs)}
    for what, found in ends.items():
        count = len(keras.tree.flatten(found))
        if found is not None and count != 1:
            raise WorkloadError(f"workload {name}: the model has {count} {what}; only one is supported")
    if model.loss is None and type(model).compute_loss is keras.Model.compute_loss and not model.losses:
        raise WorkloadError(
            f"workload {name}: the model is compiled without a loss; name one: model.compile(…, loss=…)"
        )
    if not model.trainable_variables:
        raise WorkloadError(f"workload {name}: the model has no weights to train; is every layer frozen?")
    model.optimizer.build(model.trainable_variables)


def _accuracy(outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return {}
    if targets.shape == outputs.shape:
        targets = targets.argmax(axis=1)
    if targets.size != len(outputs) or targets.dtype.kind not in "iub":
        return {}
    return {"accuracy": float((outputs.argmax(axis=1) == targets.reshape(-1)).mean())}


def _count_nev(model: Any, extreme: float) -> dict[str, int]:
    counts = {"nan": 0, "inf": 0, "extreme": 0}
    for variable in model.weights:
        values = np.asarray(keras.ops.convert_to_numpy(variable.value))
        if values.dtype.kind in "iub":
            continue
        with np.errstate(invalid="ignore"):
            wide = values.astype(np.float64)
        counts["nan"] += int(np.isnan(wide).sum())
        inf = int(np.isinf(wide).sum())
        counts["inf"] += inf
        counts["extreme"] += int((np.abs(wide) > extreme).sum()) - inf
    return counts
