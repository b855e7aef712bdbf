"""What a driver hands to a worker, and what comes back: plain data, as bytes, for any executor."""

from __future__ import annotations

from typing import Any

import msgspec

from ckptflip.faults.policy import Policy
from ckptflip.faults.record import Counts, TensorEntry

# What a task ended with. An outcome is told only of trials that are done.
STATES = ("done", "crashed", "hung", "out-of-memory")


class WorkloadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which recipe is trained.

    Attributes:
        name: a built-in workload, or ``package.module:object``.
        framework: ``pytorch`` or ``keras``: which twin of a built-in workload; by default as named.
        label: what it is called in tables and figures; by default its name.
        options: keyword arguments of the function that makes it, such as ``data`` and ``precision``.
    """

    name: str
    framework: str | None = None
    label: str | None = None
    options: dict[str, Any] = {}


class CleanTask(msgspec.Struct, frozen=True, kw_only=True, tag="clean"):
    """Train one clean run and keep its checkpoints.

    Attributes:
        workload: what to train.
        seed: of the run.
        until: epochs to train.
        keep: the epochs whose checkpoints trials start from, or are compared with.
        folder: where the checkpoints and what was measured are kept; an interrupted run goes on there.
        keras_backend: what ``KERAS_BACKEND`` must be, or None.
    """

    workload: WorkloadSpec
    seed: int
    until: int
    keep: tuple[int, ...]
    folder: str
    keras_backend: str | None = None


class TrialTask(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """Alter a copy of a clean checkpoint and resume it.

    Attributes:
        workload: what to resume.
        checkpoint: the clean checkpoint.
        epoch: its epoch.
        until: the epoch to stop after.
        policy: what may be hit; None: nothing is (a restart without change).
        seed: of the draw.
        reference: draw on this checkpoint of another workload instead, and put the equivalent faults here.
        clean: digests of the clean run's whole state, by epoch; empty where the workload gives none.
        collapsed: stop when weights or loss are NaN or infinite.
        identical: stop when the whole state equals the clean run's at the same epoch.
        propagation: the clean run's checkpoints by epoch, to compare the trial with, layer by layer.
        most_flips: words to hand back at most; beyond it the counts alone.
        keras_backend: what ``KERAS_BACKEND`` must be, or None.
    """

    workload: WorkloadSpec
    checkpoint: str
    epoch: int
    until: int
    policy: Policy | None
    seed: int
    reference: str | None = None
    clean: dict[int, str] = {}
    collapsed: bool = True
    identical: bool = True
    propagation: dict[int, str] = {}
    most_flips: int = 10_000
    keras_backend: str | None = None


class Flips(msgspec.Struct, frozen=True, kw_only=True):
    """The words that were hit: one row each, as little-endian columns.

    Attributes:
        tensors: those that were hit.
        tensor: int32[n], positions in `tensors`.
        word: int64[n], flat positions in the tensor.
        hit: uint64[n], the bits that were drawn.
        before: uint64[n], the words as they were.
        after: uint64[n], the words with the fault.
    """

    tensors: tuple[TensorEntry, ...]
    tensor: bytes
    word: bytes
    hit: bytes
    before: bytes
    after: bytes


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How far the faults had spread at one epoch: a row per layer, as `ckptflip.propagation` found them.

    Attributes:
        epoch: of both checkpoints.
        layers: fields of `LayerPropagation`.
    """

    epoch: int
    layers: tuple[dict[str, Any], ...]


class CleanResult(msgspec.Struct, frozen=True, kw_only=True, tag="clean"):
    """What a clean run gave.

    Attributes:
        state: one of `STATES`.
        message: what went wrong, else empty.
        epochs: epoch of each row, from 0.
        values: the rows' values by metric; None where one was not measured.
        digests: of the whole state after each row's epoch; empty where the workload gives none.
        checkpoints: file names in the task's folder of the checkpoints that were kept, by epoch.
        files: digests of the checkpoints in the folder, by file name.
        exact: whether a resume from the first kept checkpoint repeated the next epoch bit for bit; None
            where that was not tried.
        seconds: wall time.
        versions: of the libraries that took part.
        host: the machine's name.
    """

    state: str = "done"
    message: str = ""
    epochs: tuple[int, ...] = ()
    values: dict[str, tuple[float | None, ...]] = {}
    digests: tuple[str, ...] = ()
    checkpoints: dict[int, str] = {}
    files: dict[str, str] = {}
    exact: bool | None = None
    seconds: float = 0.0
    versions: dict[str, str] = {}
    host: str = ""


class TrialResult(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """What a trial gave.

    Attributes:
        state: one of `STATES`.
        message: what went wrong, else empty.
        epochs: epoch of each row; the first row is the altered checkpoint itself.
        values: the rows' values by metric; None where one was not measured.
        ended: ``horizon``, ``collapsed`` or ``identical``: why no further epoch was trained.
        digest: of the whole state at the end; empty where the workload gives none.
        counts: how much was hit; None of a restart without change, or when it failed before.
        flips: the words that were hit; None where they were too many.
        spread: how far the faults had spread, where that was asked.
        seconds: wall time of the phases ``load``, ``inject``, ``train`` and ``total``.
        versions: of the libraries that took part.
        host: the machine's name.
    """

    state: str = "done"
    message: str = ""
    epochs: tuple[int, ...] = ()
    values: dict[str, tuple[float | None, ...]] = {}
    ended: str = "horizon"
    digest: str = ""
    counts: Counts | None = None
    flips: Flips | None = None
    spread: tuple[Spread, ...] = ()
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    host: str = ""


Task = CleanTask | TrialTask
Result = CleanResult | TrialResult

# MessagePack, not JSON: it keeps NaN and infinities.
_encoder = msgspec.msgpack.Encoder()
_tasks = msgspec.msgpack.Decoder(Task)
_results = msgspec.msgpack.Decoder(Result)


def encode(item: Task | Result) -> bytes:
    """A task or a result as bytes.

    Example:
        >>> decode_result(encode(CleanResult(values={"loss": (float("nan"),)}))).values
        {'loss': (nan,)}
    """
    return _encoder.encode(item)


def decode_task(data: bytes) -> Task:
    """A task from its bytes; msgspec.DecodeError where they are none."""
    found: Task = _tasks.decode(data)
    return found


def decode_result(data: bytes) -> Result:
    """A result from its bytes; msgspec.DecodeError where they are none."""
    found: Result = _results.decode(data)
    return found
