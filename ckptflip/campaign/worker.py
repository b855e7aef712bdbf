"""What a worker does with a task: decode it, carry it out, encode the result; never raise."""

from __future__ import annotations

import os
import platform
from collections import OrderedDict

import msgspec

from ckptflip.campaign import loading, task
from ckptflip.campaign.task import CleanResult, CleanTask, Result, TrialResult, TrialTask, WorkloadSpec
from ckptflip.errors import CkptflipError, WorkloadError
from ckptflip.training.workload import Workload, find

# Workloads with their data and, of Keras, their traced graphs.
_MOST_KEPT = 16
_kept: OrderedDict[tuple[bytes, int | None], Workload] = OrderedDict()


def perform(payload: bytes) -> bytes:
    """Carry out an encoded task in this process.

    Args:
        payload: what `ckptflip.campaign.task.encode` made.

    Returns:
        The encoded result. Whatever goes wrong, short of the end of the process, is in its state and message.
    """
    asked = task.decode_task(payload)
    try:
        return task.encode(_carried_out(asked))
    except MemoryError as error:
        return task.encode(_failed(asked, "out-of-memory", f"MemoryError: {error}".rstrip(": ")))
    except CkptflipError as error:
        state = "out-of-memory" if _is_memory(error) else "crashed"
        return task.encode(_failed(asked, state, str(error)))
    except Exception as error:  # a user's recipe, or an altered state, may fail in any way
        state = "out-of-memory" if _is_memory(error) else "crashed"
        return task.encode(_failed(asked, state, f"{type(error).__name__}: {error}"))


def made(spec: WorkloadSpec, keras_backend: str | None) -> Workload:
    """A workload in this process, not kept.

    Args:
        spec: which.
        keras_backend: what the spec asks for.

    Raises:
        WorkloadError: there is no such workload, or Keras runs on another backend in this process.
        CkptflipError: it cannot be made with these options.
    """
    _settle_backend(keras_backend)
    return find(loading.registered(spec), **spec.options)


def workload_of(spec: WorkloadSpec, seed: int, keras_backend: str | None) -> Workload:
    """A workload for a task, kept from task to task with its data.

    Args:
        spec: which.
        seed: of the clean run; a Keras model is kept for each, since its graph is made once.
        keras_backend: what the spec asks for.

    Raises:
        WorkloadError: there is no such workload, or Keras runs on another backend in this process.
    """
    _settle_backend(keras_backend)
    encoded = msgspec.json.encode([loading.registered(spec), spec.options], order="deterministic")
    for key in ((encoded, None), (encoded, seed)):
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    found = made(spec, keras_backend)
    _kept[encoded, seed if hasattr(found, "reload") else None] = found
    while len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return found


def host() -> str:
    """The machine's name."""
    return platform.node()


def _settle_backend(keras_backend: str | None) -> None:
    if keras_backend is not None and os.environ.setdefault("KERAS_BACKEND", keras_backend) != keras_backend:
        raise WorkloadError(
            f"the spec asks for Keras on {keras_backend}, and this worker runs it on "
            f"{os.environ['KERAS_BACKEND']}"
        )


def _carried_out(asked: task.Task) -> Result:
    # Imported when the kind of task is known: a driver decodes results without them.
    if isinstance(asked, CleanTask):
        from ckptflip.campaign import clean

        return clean.run(asked)
    from ckptflip.campaign import trial

    return trial.run(asked)


def _failed(asked: task.Task, state: str, message: str) -> Result:
    if isinstance(asked, TrialTask):
        return TrialResult(state=state, message=message, host=host())
    return CleanResult(state=state, message=message, host=host())


def _is_memory(error: BaseException | None) -> bool:
    """Whether memory was refused somewhere down the chain of causes; frameworks say it in their own ways."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
            return True
        if "resourceexhausted" in type(error).__name__.lower():
            return True
        error = error.__cause__ or error.__context__
    return False
