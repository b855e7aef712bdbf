"""One training step and one test step of a compiled Keras model, on each backend.

Every backend computes the loss that the model was compiled with, the whole gradient and the compiled
optimizer's update, as Keras' own training does; what Keras does not tell is the gradient's norm. It is that
of the gradient itself: after a scaled loss (mixed precision) divided by the scale, and before any clipping.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.training.keras_settings import backend, keras


class Steps(Protocol):
    """What a backend must offer. Inputs and targets are NumPy arrays with the sample as first axis."""

    def __init__(self, model: Any) -> None: ...

    def train(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, float]:
        """Take one step; the loss before it and the L2 norm of the gradient."""
        ...

    def test(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        """The loss and the outputs, without training."""
        ...

    def finish(self) -> None:
        """Put what was trained into the model's variables, where it is not there already."""
        ...


def steps_of(model: Any) -> Steps:
    """The steps of a built and compiled model on the backend in use."""
    kinds: dict[str, type[Steps]] = {"tensorflow": TensorFlowSteps, "torch": TorchSteps, "jax": JaxSteps}
    return kinds[backend()](model)


class TorchSteps:
    """Steps by PyTorch's autograd."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def train(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, float]:
        import torch

        model, trained = self._model, self._model.trainable_variables
        x, y = keras.ops.convert_to_tensor(inputs), keras.ops.convert_to_tensor(targets)
        loss = model.compute_loss(x=x, y=y, y_pred=_called(model, x, training=True))
        values = [variable.value for variable in trained]
        scaled = model.optimizer.scale_loss(loss)
        gradients = list(torch.autograd.grad(scaled, values, allow_unused=True))
        with torch.no_grad():
            norm = _torch_norm(gradients) / float(model.optimizer.scale_loss(torch.ones_like(loss)))
            model.optimizer.apply(gradients, trained)
        return loss.item(), norm

    def test(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        import torch

        model = self._model
        with torch.no_grad():
            x, y = keras.ops.convert_to_tensor(inputs), keras.ops.convert_to_tensor(targets)
            outputs = _called(model, x, training=False)
            loss = _tested(model, x, y, outputs)
        return loss.item(), keras.ops.convert_to_numpy(outputs)

    def finish(self) -> None:
        """Nothing: variables are altered as the steps go."""


class TensorFlowSteps:
    """Steps as graphs, one for each shape of a batch.

    A graph of its own for each shape, and no XLA: a run and its resume then compute with the same graphs,
    whatever batches came before.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graphs: dict[Any, Any] = {}

    def train(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, float]:
        loss, norm = self._graph(self._train_step, inputs, targets)
        return float(loss), float(norm)

    def test(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        loss, outputs = self._graph(self._test_step, inputs, targets)
        return float(loss), outputs.numpy()

    def finish(self) -> None:
        """Nothing: variables are altered as the steps go."""

    def _graph(self, step: Any, inputs: NDArray[Any], targets: NDArray[Any]) -> Any:
        import tensorflow as tf

        tensors = tf.convert_to_tensor(inputs), tf.convert_to_tensor(targets)
        if self._model.run_eagerly:
            return step(*tensors)
        key = (step, *((tensor.dtype, *tensor.shape) for tensor in tensors))
        if key not in self._graphs:
            function = tf.function(step, autograph=False)
            self._graphs[key] = function, function.get_concrete_function(*tensors)
        return self._graphs[key][1](*tensors)

    def _train_step(self, x: Any, y: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        model, trained = self._model, self._model.trainable_variables
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x=x, y=y, y_pred=_called(model, x, training=True))
            scaled = model.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, [variable.value for variable in trained])
        wide = [tf.cast(tf.convert_to_tensor(one), tf.float64) for one in gradients if one is not None]
        scale = tf.cast(model.optimizer.scale_loss(tf.ones_like(loss)), tf.float64)
        norm = tf.sqrt(tf.add_n([tf.reduce_sum(one * one) for one in wide])) / scale
        model.optimizer.apply(gradients, trained)
        return loss, norm

    def _test_step(self, x: Any, y: Any) -> tuple[Any, Any]:
        outputs = _called(self._model, x, training=False)
        return _tested(self._model, x, y, outputs), outputs


class JaxSteps:
    """Steps as compiled functions from state to state; the state returns to the variables in `finish`."""

    def __init__(self, model: Any) -> None:
        import jax

        self._model = model
        self._state: Any = None
        self._train, self._test = jax.jit(self._train_step), jax.jit(self._test_step)

    def train(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, float]:
        if self._state is None:
            self._state = tuple([v.value for v in group] for group in self._groups())
        self._state, loss, gradients, scale = self._train(self._state, inputs, targets)
        # JAX has no float64 unless the whole process asks for it; NumPy does.
        squares = [np.square(np.asarray(g).astype(np.float64)).sum() for g in gradients if g is not None]
        return float(loss), float(np.sqrt(np.sum(squares)) / np.float64(scale))

    def test(self, inputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        self.finish()
        state = tuple([v.value for v in group] for group in self._groups())
        loss, outputs = self._test(state, inputs, targets)
        return float(loss), np.asarray(outputs)

    def finish(self) -> None:
        if self._state is not None:
            for group, values in zip(self._groups(), self._state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
        self._state = None

    def _groups(self) -> tuple[list[Any], list[Any], list[Any]]:
        model = self._model
        return model.trainable_variables, model.non_trainable_variables, model.optimizer.variables

    def _loss(self, trained: Any, others: Any, slots: Any, x: Any, y: Any, training: bool) -> Any:
        metrics = [variable.value for variable in self._model.metrics_variables]
        return self._model.compute_loss_and_updates(
            trained, others, metrics, x, y, None, training=training, optimizer_variables=slots
        )

    def _train_step(self, state: Any, x: Any, y: Any) -> Any:
        import jax

        trained, others, slots = state
        optimizer = self._model.optimizer
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        (_, (loss, _, others, _)), gradients = gradient(trained, others, slots, x, y, True)
        mapping = list(zip(optimizer.variables, slots, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            scale = optimizer.scale_loss(keras.ops.ones_like(loss))
        trained, slots = optimizer.stateless_apply(slots, gradients, trained)
        return (trained, others, slots), loss, gradients, scale

    def _test_step(self, state: Any, x: Any, y: Any) -> Any:
        trained, others, slots = state
        loss, (_, outputs, _, _) = self._loss(trained, others, slots, x, y, False)
        return loss, outputs


def _called(model: Any, x: Any, *, training: bool) -> Any:
    takes = inspect.signature(model.call).parameters
    return model(x, training=training) if "training" in takes or "kwargs" in takes else model(x)


def _tested(model: Any, x: Any, y: Any, outputs: Any) -> Any:
    takes = inspect.signature(model.compute_loss).parameters
    told = {"training": False} if "training" in takes else {}
    return model.compute_loss(x=x, y=y, y_pred=outputs, **told)


def _torch_norm(gradients: list[Any]) -> float:
    import torch

    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)).item())
