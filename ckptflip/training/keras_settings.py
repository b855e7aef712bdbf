"""Keras' process-wide settings: chosen at import, held for the length of a block and put back after it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.errors import MissingExtraError, WorkloadError
from ckptflip.frameworks import before_tensorflow

BACKENDS = ("tensorflow", "torch", "jax")


def _imported() -> Any:
    """Keras, on the backend that KERAS_BACKEND or its settings file names, else the first one installed."""
    if not find_spec("keras"):
        raise MissingExtraError("keras", "keras", "Training with Keras")
    chosen = not os.environ.get("KERAS_BACKEND") and "keras" not in sys.modules
    kept = os.environ.get("KERAS_BACKEND")
    if chosen:
        os.environ["KERAS_BACKEND"] = _first_installed()
    before_tensorflow()
    try:
        import keras
    except ImportError as error:
        raise MissingExtraError(f"{error.name or error}", "keras", "This backend of Keras") from error
    finally:
        if chosen:
            os.environ.pop("KERAS_BACKEND") if kept is None else os.environ.update(KERAS_BACKEND=kept)
    return keras


def _first_installed() -> str:
    settings = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    wanted: list[str] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        wanted.append(json.loads(settings.read_text()).get("backend"))
    for name in (*wanted, *BACKENDS):
        if name in BACKENDS and find_spec(name):
            return name
    raise MissingExtraError("a backend (tensorflow, torch or jax)", "keras", "Training with Keras")


keras = _imported()

# What Keras keeps for the whole process: names given, the generator of draws without a seed, the policy.
_STATE = ("object_name_uids", "global_seed_generator", "global_random_seed", "dtype_policy")
Ambient = MutableMapping[str, Any]
_jax_threads = 0


def backend() -> str:
    """The backend that Keras runs on in this process.

    Raises:
        WorkloadError: one that cannot train, such as numpy.
    """
    name: str = keras.backend.backend()
    if name not in BACKENDS:
        raise WorkloadError(
            f"Keras runs on {name}, on which no workload trains; set KERAS_BACKEND to {', '.join(BACKENDS)}"
        )
    return name


def fresh_ambient() -> dict[str, Any]:
    """What a new run finds: nothing named yet, no generator; the policy and floatx of the process.

    With names that count from the start, the same function makes a model of the same names every time.
    """
    kept = _ambient()
    return kept | {
        "object_name_uids": defaultdict(int), "global_seed_generator": None, "global_random_seed": None
    }  # fmt: skip


@contextmanager
def settled(ambient: Ambient, threads: int, *, x64: bool = False) -> Iterator[None]:
    """Compute reproducibly inside the block, with a run's own global state of Keras.

    Python's, NumPy's and Keras' random states, Keras' counters of names, its policy and floatx, and the
    backend's switches are as before after it.

    Args:
        ambient: the run's global state; brought up to date when the block ends.
        threads: what `fix_threads` gave.
        x64: on JAX, whether 64-bit numbers are allowed.
    """
    before = _ambient()
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with _deterministic(threads, x64), warnings.catch_warnings():
        # Of the way in which Keras hands its arrays to NumPy.
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
        _set_ambient(ambient)
        try:
            yield
        finally:
            ambient.update(_ambient())
            _set_ambient(before)
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def seed_all(seed: int) -> Any:
    """Seed every generator that initial weights may come from; call it in a `settled` block.

    Returns:
        The generator for draws without a seed, whose state belongs to the run.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    if backend() == "torch":
        from ckptflip.training import settings

        settings.seed_all(seed, torch_device())
    generator = keras.random.SeedGenerator(int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1), "run")
    _global_state().set_global_attribute("global_seed_generator", generator)
    return generator


def fix_threads(wanted: int) -> int:
    """Fix the number of threads as far as the backend lets us, and tell the number that is in effect.

    PyTorch takes it anew in every block; TensorFlow and JAX take it once in a process, before they compute
    for the first time.
    """
    if backend() == "torch":
        return wanted
    return _fix_jax(wanted) if backend() == "jax" else _fix_tensorflow(wanted)


def _fix_tensorflow(wanted: int) -> int:
    import tensorflow as tf

    threading = tf.config.threading
    with contextlib.suppress(RuntimeError):  # it has computed already: what it runs with is final
        threading.set_intra_op_parallelism_threads(wanted)
        threading.set_inter_op_parallelism_threads(wanted)
    found: int = threading.get_intra_op_parallelism_threads()
    return found or _told("TF_NUM_INTRAOP_THREADS")


def _fix_jax(wanted: int) -> int:
    import jax
    from jax._src import xla_bridge  # nothing public tells whether its threads have started

    global _jax_threads
    if not xla_bridge.backends_are_initialized():
        # The one place where XLA's thread pool on a CPU looks for its size.
        kept = os.environ.get("NPROC")
        os.environ["NPROC"] = str(wanted)
        try:
            jax.devices()
        finally:
            os.environ.pop("NPROC") if kept is None else os.environ.update(NPROC=kept)
        _jax_threads = wanted
    return _jax_threads or _told("NPROC")


def _told(variable: str) -> int:
    """The number of threads that the environment names, else the cores that this process may use."""
    told = os.environ.get(variable, "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(told) if told.isdigit() and int(told) else cores


def torch_device() -> Any:
    """Where Keras' torch backend puts its tensors."""
    import torch

    return torch.device(keras.ops.zeros(()).device)


@contextmanager
def _deterministic(threads: int, x64: bool) -> Iterator[None]:
    if backend() == "torch":
        from ckptflip.training import settings

        with settings.settled(threads, torch_device()):
            yield
    elif backend() == "jax":
        import jax

        enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
        with enable(x64), warnings.catch_warnings():
            # Said of a model in float64 before it is known that it needs 64 bits.
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            yield
    else:
        with _op_determinism():
            yield


@contextmanager
def _op_determinism() -> Iterator[None]:
    """TensorFlow's switch. Only its own modules can tell its position and turn it off again."""
    import tensorflow as tf
    from tensorflow.python.framework import config

    was_on = getattr(config, "is_op_determinism_enabled", lambda: True)()
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        if not was_on:
            config.disable_op_determinism()


def _ambient() -> dict[str, Any]:
    state = _global_state()
    kept = {name: state.get_global_attribute(name) for name in _STATE}
    kept["floatx"] = keras.config.floatx()
    kept["image_data_format"] = keras.config.image_data_format()
    return kept


def _set_ambient(ambient: Ambient) -> None:
    for name in _STATE:
        _global_state().set_global_attribute(name, ambient[name])
    keras.config.set_floatx(ambient["floatx"])
    keras.config.set_image_data_format(ambient["image_data_format"])


def _global_state() -> Any:
    # Keras has no public way to read what `keras.utils.clear_session` clears.
    from keras.src.backend.common import global_state

    return global_state
