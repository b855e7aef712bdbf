"""Reading and altering the words of Keras' variables and gradients, on each of Keras' backends.

Positions are flat C-order word positions, int64, ascending; words and masks are unsigned, of the number's
word dtype. No element ever becomes a floating-point value on the way.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat, as_words, from_words

Positions = NDArray[np.int64]


class Backend(Protocol):
    """How one backend hands out words and takes them back."""

    def holds(self, dtype: str) -> bool:
        """Whether words of this dtype can be reached here."""
        ...

    def read(self, value: Any, number: NumberFormat, words: Positions) -> NDArray[Any]:
        """Words of an array of the backend."""
        ...

    def altered(self, value: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> Any:
        """XOR masks into an array: in place where the backend can, and then this same array is given back."""
        ...

    def alter(self, variable: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> None:
        """XOR masks into a variable."""
        ...


class Torch:
    """Words of a tensor, altered in place: nothing is copied, and the cost grows with the flips alone."""

    def holds(self, dtype: str) -> bool:
        return True

    def read(self, value: Any, number: NumberFormat, words: Positions) -> NDArray[Any]:
        from ckptflip.live import torch_words

        return torch_words.read(value, number, words)

    def altered(self, value: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> Any:
        from ckptflip.live import torch_words

        torch_words.xor(value, number, words, masks)
        return value

    def alter(self, variable: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> None:
        self.altered(variable.value, number, words, masks)


class TensorFlow:
    """Words of a tensor seen through `tf.bitcast`; a variable is altered element by element, in place.

    What reads the variable later sees the new words; a tensor that was read from it before does not change.
    """

    def holds(self, dtype: str) -> bool:
        # The others have no bitcast.
        return dtype != "bool" and not dtype.startswith(("float8", "int4", "uint4", "complex"))

    def read(self, value: Any, number: NumberFormat, words: Positions) -> NDArray[Any]:
        import tensorflow as tf

        integers = self._integers(value, number)
        if "CPU" not in integers.device:
            gathered: NDArray[Any] = tf.gather(tf.reshape(integers, [-1]), words).numpy()
            return gathered
        # A view of the tensor's memory, without a copy, unlike Tensor.numpy().
        found: NDArray[Any] = np.asarray(memoryview(integers)).reshape(-1)[words]
        return found

    def altered(self, value: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> Any:
        import tensorflow as tf

        flat = tf.reshape(self._integers(value, number), [-1])
        new = tf.tensor_scatter_nd_update(flat, words[:, None], self.read(value, number, words) ^ masks)
        return tf.reshape(tf.bitcast(new, value.dtype), value.shape)

    def alter(self, variable: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> None:
        import tensorflow as tf

        held = variable.value
        if not tuple(variable.shape):
            variable.assign(self.altered(held, number, words, masks))
            return
        new = tf.bitcast(tf.constant(self.read(held, number, words) ^ masks), held.dtype)
        at = np.stack(np.unravel_index(words, tuple(variable.shape)), axis=-1)
        tf.raw_ops.ResourceScatterNdUpdate(ref=held.handle, indices=at, updates=new)
        # The update makes TensorFlow copy the variable at each reading from now on, unless told otherwise.
        tf.raw_ops.DisableCopyOnRead(resource=held.handle)

    def _integers(self, value: Any, number: NumberFormat) -> Any:
        """A tensor, or what a variable holds, seen as words; nothing is copied."""
        import tensorflow as tf

        if hasattr(value, "handle"):
            value = tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
        return tf.bitcast(value, tf.as_dtype(number.word_dtype))


class Jax:
    """Words of an array, read without a copy on a CPU. Arrays never change in JAX: a variable gets a new one.

    So altering one element copies the tensor it is in, once per injection and never the rest of the model.
    """

    def holds(self, dtype: str) -> bool:
        return True

    def read(self, value: Any, number: NumberFormat, words: Positions) -> NDArray[Any]:
        return as_words(np.ascontiguousarray(value))[words]

    def altered(self, value: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> Any:
        import jax

        copy = as_words(np.array(value, order="C", ndmin=1))
        copy[words] ^= masks
        return jax.device_put(from_words(copy, value.dtype, value.shape), value.sharding)

    def alter(self, variable: Any, number: NumberFormat, words: Positions, masks: NDArray[Any]) -> None:
        variable.assign(self.altered(variable.value, number, words, masks))


BACKENDS: dict[str, type[Backend]] = {"torch": Torch, "tensorflow": TensorFlow, "jax": Jax}
