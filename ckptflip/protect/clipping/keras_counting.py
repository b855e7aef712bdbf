"""Counts of what a Keras layer clipped, kept from inside compiled functions on each backend."""

from __future__ import annotations

from typing import Any, Protocol

import keras


class Counter(Protocol):
    """Counts calls, calls with a value beyond the bounds, and such values."""

    def add(self, found: Any) -> None:
        """One call, with so many values beyond: a scalar of the backend, which may be symbolic."""
        ...

    def counts(self) -> tuple[int, int, int]:
        """Calls, calls with such values, such values."""
        ...


def counter() -> Counter:
    """A counter for Keras' present backend."""
    match keras.backend.backend():
        case "tensorflow":
            return OnTensorFlow()
        case "jax":
            return OnJax()
        case _:
            return Plain()


class Plain:
    """Where code runs as it is written."""

    def __init__(self) -> None:
        self._counts = [0, 0, 0]

    def add(self, found: Any) -> None:
        number = int(found)
        for place, more in enumerate((1, number > 0, number)):
            self._counts[place] += more

    def counts(self) -> tuple[int, int, int]:
        calls, fired, values = self._counts
        return calls, fired, values


class OnTensorFlow:
    """A variable that graphs add to."""

    def __init__(self) -> None:
        import tensorflow as tf

        with tf.init_scope():
            self._counts = tf.Variable([0, 0, 0], dtype=tf.int64, trainable=False)

    def add(self, found: Any) -> None:
        import tensorflow as tf

        number = tf.cast(found, tf.int64)
        self._counts.assign_add(tf.stack([tf.ones_like(number), tf.cast(number > 0, tf.int64), number]))

    def counts(self) -> tuple[int, int, int]:
        calls, fired, values = self._counts.numpy().tolist()
        return calls, fired, values


class OnJax(Plain):
    """A call back from compiled functions."""

    def add(self, found: Any) -> None:
        import jax

        jax.debug.callback(super().add, found)

    def counts(self) -> tuple[int, int, int]:
        import jax

        jax.effects_barrier()
        return super().counts()
