"""What a store holds, as plain data: rows as structs named as the tables' columns, large tables as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ckptflip.campaign.task import Flips, Spread
    from ckptflip.faults.record import Counts

# The rows of a run or a trial: epochs, and by metric one value for each; None: not measured.
Measured: TypeAlias = tuple[tuple[int, ...], dict[str, tuple[float | None, ...]]]

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
Floats: TypeAlias = NDArray[np.float64]
Texts: TypeAlias = NDArray[np.object_]


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """The spec as it was when it was new, or edited. The last revision holds.

    Attributes:
        number: from 1.
        fingerprint: digest of what defines the campaign's results.
        spec: the whole spec.
        created: UTC, ISO 8601.
        command: the command line that began it.
        versions: of the libraries.
        machine: processor, cores, memory, system.
    """

    number: int
    fingerprint: str
    spec: dict[str, Any]
    created: str
    command: str
    versions: dict[str, str]
    machine: dict[str, Any]


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One condition: workload x checkpoint epoch x policy.

    Attributes:
        id: in this store; 0 of a cell that is not in one yet.
        key: digest of what defines the cell: the same in all stores of a campaign.
        position: in the spec, from 0.
        current: whether the spec still has it.
        workload: label of the workload.
        epoch: of the checkpoint that is altered.
        until: epoch of the last row.
        label: the condition, in words.
        policy: what is hit; None: a restart without change.
        swept: the swept fields, with their values here.
        wanted: trials wanted; with a stop rule, at most.
        stopped: why no more trials are run; None: more are.
    """

    key: str
    position: int
    workload: str
    epoch: int
    until: int
    label: str
    wanted: int
    policy: dict[str, Any] | None = None
    swept: dict[str, Any] = {}
    current: bool = True
    stopped: str | None = None
    id: int = 0


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a cell's eligible bits that is drawn from on its own.

    Attributes:
        id: in this store; 0 of a stratum that is not in one yet.
        cell: id of its cell; 0 likewise.
        layer: '' where layers are not told apart.
        field: ``sign``, ``critical``, ``exponent`` (without the critical bit), ``mantissa``; '' likewise.
        bits: eligible bits in it.
        weight: their share of the cell's.
    """

    layer: str
    field: str
    bits: int
    weight: float
    id: int = 0
    cell: int = 0


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A clean run.

    Attributes:
        id: in this store.
        workload: label of the workload.
        seed: of the run.
        until: epochs trained.
        exact: whether a resume repeated the run bit for bit; None: not tried.
        checkpoints: file names in the folder of clean runs, by epoch.
    """

    id: int
    workload: str
    seed: int
    until: int
    exact: bool | None
    checkpoints: dict[int, str]


class TensorRow(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that some trial hit. Fields as in `ckptflip.faults.Tensor`, and its workload's label."""

    id: int
    workload: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: str
    role: str


class NewAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt at a task that just ended.

    Attributes:
        task: key of the job.
        state: one of `ckptflip.campaign.task.STATES`, or what the executor calls it.
        executor: which one ran it.
        signal: that ended the process; None: none did.
        message: what went wrong, else empty.
        seconds: wall time.
        phases: wall time of its phases, in seconds.
        host: the machine's name.
        pid: of the process; 0: not known.
        versions: of the libraries that took part.
    """

    task: str
    state: str
    executor: str
    signal: int | None = None
    message: str = ""
    seconds: float = 0.0
    phases: dict[str, float] = {}
    host: str = ""
    pid: int = 0
    versions: dict[str, str] = {}


class Attempt(NewAttempt, frozen=True, kw_only=True):
    """An attempt as the store keeps it.

    Attributes:
        id: in this store; in the order they ended.
        trial: id of the trial it gave; None: none, or one that gave way to a later one.
        ended: UTC, ISO 8601.
    """

    id: int
    trial: int | None
    ended: str


class SpreadRow(msgspec.Struct, frozen=True):
    """How one layer of one trial differs from the clean run at one epoch.

    Fields as in `ckptflip.propagation.LayerPropagation`, after the trial's id, the epoch and the layer's
    position in the network.
    """

    trial: int
    epoch: int
    position: int
    layer: str
    elements: int
    changed: int
    from_zero: int
    nev: int
    minimum: float
    lower: float
    median: float
    upper: float
    maximum: float
    mean: float
    changes: tuple[float, ...] = ()


class CellCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many trials of a cell ended how.

    Attributes:
        states: trials by state; those that did not occur have no entry.
        outcomes: trials by outcome, likewise; of trials that are done alone.
        strata: the outcomes by stratum id, of cells that draw by stratum.
    """

    states: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    strata: dict[int, dict[str, int]] = {}

    @property
    def trials(self) -> int:
        """All finished trials."""
        return sum(self.states.values())

    @property
    def done(self) -> int:
        """Trials that have an outcome."""
        return self.states.get("done", 0)

    @property
    def failed(self) -> int:
        """Trials that crashed, hung or ran out of memory."""
        return self.trials - self.done


class NewTrial(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that just ended.

    Attributes:
        cell: key of its cell.
        stratum: layer and field of its stratum; None: its cell has none.
        number: in its cell and stratum, from 0.
        workload: label of the clean run's workload; None: the cell's.
        run_seed: seed of the clean run it starts from and is compared with.
        seed: of its draw, 0 to 2^64-1.
        state: one of `ckptflip.campaign.task.STATES`.
        outcome: what became of it; None unless it is done.
        message: what went wrong, else empty.
        signal: that ended its process; None: none did.
        ended: ``horizon``, ``collapsed`` or ``identical``: why no further epoch was trained.
        ended_epoch: the last epoch that was trained and measured.
        recovered: epochs after the restart until the metric is within tolerance to the end; None: never.
        right_after: the metric of the altered checkpoint, before any training; None: not measured.
        final: the metric at the last epoch; None of a collapsed trial.
        clean_final: the clean run's.
        counts: how much was hit; None: nothing was to be.
        digest: of the whole training state at the end, else empty.
        values: what was measured, epoch by epoch.
        flips: the words that were hit; None: none, or too many to keep.
        flips_kept: False: too many to keep one by one.
        spread: how far the faults had spread.
    """

    cell: str
    number: int
    run_seed: int
    seed: int
    state: str = "done"
    stratum: tuple[str, str] | None = None
    workload: str | None = None
    outcome: str | None = None
    message: str = ""
    signal: int | None = None
    ended: str | None = None
    ended_epoch: int | None = None
    recovered: int | None = None
    right_after: float | None = None
    final: float | None = None
    clean_final: float | None = None
    counts: Counts | None = None
    digest: str = ""
    values: Measured = ((), {})
    flips: Flips | None = None
    flips_kept: bool = True
    spread: tuple[Spread, ...] = ()


class Trials(NamedTuple):
    """All trials, as columns of the same length n.

    Attributes:
        id: int64[n], in this store.
        cell: int64[n], ids of their cells.
        stratum: int64[n], ids of their strata; -1: none.
        number: int64[n], in their cell and stratum.
        run: int64[n], ids of their clean runs.
        seed: uint64[n], of their draws.
        state: str[n].
        outcome: str[n], '' where the state is not ``done``.
        message: str[n].
        ended: str[n], '' where not known.
        signal: int64[n]; 0: none.
        ended_epoch: int64[n]; -1: none.
        recovered: int64[n], in epochs after the restart; -1: not by the last epoch.
        right_after: float64[n]; NaN where NaN or not measured, here and below.
        final: float64[n].
        clean_final: float64[n].
        bits_hit: int64[n]; 0 where nothing was to be hit, here and below.
        bits_effective: int64[n].
        words_hit: int64[n].
        words_effective: int64[n].
        flips_kept: bool[n]; False: the words were too many to keep one by one.
    """

    id: Ints
    cell: Ints
    stratum: Ints
    number: Ints
    run: Ints
    seed: Words
    state: Texts
    outcome: Texts
    message: Texts
    ended: Texts
    signal: Ints
    ended_epoch: Ints
    recovered: Ints
    right_after: Floats
    final: Floats
    clean_final: Floats
    bits_hit: Ints
    bits_effective: Ints
    words_hit: Ints
    words_effective: Ints
    flips_kept: NDArray[np.bool_]


class Curves(NamedTuple):
    """One metric of many trials or runs, sorted by owner, then epoch.

    Attributes:
        owner: int64[n], ids of trials or runs.
        epoch: int64[n].
        value: float64[n].
    """

    owner: Ints
    epoch: Ints
    value: Floats


class FlipColumns(NamedTuple):
    """Words that were hit, sorted by trial, tensor, word.

    Attributes:
        trial: int64[n], ids.
        tensor: int64[n], ids.
        word: int64[n], flat positions in the tensor, in C order.
        hit: uint64[n], the bits that were drawn, as a set.
        before: uint64[n], the words as they were.
        after: uint64[n], the words with the fault.
    """

    trial: Ints
    tensor: Ints
    word: Ints
    hit: Words
    before: Words
    after: Words
