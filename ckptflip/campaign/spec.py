"""The spec of a campaign: what is trained, what is altered, how often, and where it runs. From TOML."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ckptflip.campaign.task import WorkloadSpec
from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy

OUTCOMES = ("identical", "masked", "slowed", "degraded", "collapsed")
BAD = ("degraded", "collapsed")
# What a cell is made of besides the fields of its policy: cells that differ in these alone may be paired.
AXES = ("workload", "epoch")
STRATA = ("layer", "field")

_Epoch = Annotated[int, Meta(ge=0, le=1_000_000)]
_Positive = Annotated[int, Meta(ge=1, le=10_000_000)]
_Share = Annotated[float, Meta(ge=0.5, le=0.99999)]
# Lists of names may be given as one name.
_LISTS = ("tensors", "layers", "roles", "fields", "forbid")


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all tables of a spec have in common."""


class Clean(_Strict, frozen=True):
    """The clean runs.

    Attributes:
        seeds: one run each; every trial starts from one of them, drawn by its own seed. Several give the
            noise floor.
    """

    seeds: tuple[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)], ...] = (0,)


class Restart(_Strict, frozen=True):
    """Where trials start and how long they are followed; one of `until` and `horizon` is needed.

    Attributes:
        epochs: of the checkpoints that are altered.
        until: the epoch to stop after, the same for all.
        horizon: epochs to train after the restart; 0: the altered checkpoint is measured and not trained,
            as a model is used.
    """

    epochs: tuple[_Epoch, ...]
    until: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    horizon: _Epoch | None = None

    def end(self, epoch: int) -> int:
        """The last epoch of a trial that starts at `epoch`."""
        return self.until if self.until is not None else epoch + (self.horizon or 0)


class StopRule(_Strict, frozen=True):
    """When a cell has enough trials: its confidence sequence is narrow, at any time that one looks.

    Attributes:
        half_width: half the width of the interval of the rate that is enough.
        outcomes: the rate of these together is estimated.
        confidence: of the sequence.
        at_least: trials before the first look.
        at_most: trials at which the cell ends in any case.
        batch: trials between two looks.
    """

    half_width: Annotated[float, Meta(gt=0, lt=0.5)]
    outcomes: tuple[str, ...] = BAD
    confidence: _Share = 0.95
    at_least: _Positive = 20
    at_most: _Positive = 1000
    batch: _Positive = 20


class Trials(_Strict, frozen=True):
    """How many trials.

    Attributes:
        per_cell: in every cell; not together with `stop`.
        stop: a rule that ends each cell by itself.
        control: restarts without change, per workload and epoch.
        paired: cells that differ in these alone get the same draws: ``epoch``, ``workload`` or a field of
            the policy.
        strata: ``layer``, ``field`` or both: single flips are drawn by stratum, where they tell most.
        equivalent: label of a workload. Faults are drawn on its checkpoint; the other workloads get the
            equivalent faults in theirs.
    """

    per_cell: _Positive | None = None
    stop: StopRule | None = None
    control: Annotated[int, Meta(ge=0, le=10_000)] = 1
    paired: tuple[str, ...] = ()
    strata: tuple[str, ...] = ()
    equivalent: str | None = None

    @property
    def most(self) -> int:
        """Trials of a cell at most."""
        return self.stop.at_most if self.stop is not None else self.per_cell or 100


class Metric(_Strict, frozen=True):
    """What outcomes are judged by.

    Attributes:
        name: ``accuracy``, ``loss``, ``auc`` or another value that the workload returns.
        better: ``higher`` or ``lower``.
        tolerance: this far from the clean run's value, at the same epoch, counts as the same.
        chance: what a useless model has, where higher is better: a trial that ends below halfway between
            it and the clean run's value has collapsed.
    """

    name: str = "accuracy"
    better: str = "higher"
    tolerance: Annotated[float, Meta(ge=0)] = 0.01
    chance: float = 0.0


class Measure(_Strict, frozen=True):
    """What is kept of each trial beside its values by epoch.

    Attributes:
        propagation: epochs after the restart at which every layer is compared with the clean run.
        flips: altered words to keep one by one, at most; beyond that a trial keeps their counts.
    """

    propagation: tuple[Annotated[int, Meta(ge=0, le=1_000_000)], ...] = ()
    flips: Annotated[int, Meta(ge=0, le=1 << 30)] = 10_000


class Shortcuts(_Strict, frozen=True):
    """When a trial may end early, its outcome being settled.

    Attributes:
        collapsed: when weights or loss turned NaN or infinite.
        identical: when the whole training state equals the clean run's at the same epoch.
    """

    collapsed: bool = True
    identical: bool = True


class ExecutorSpec(_Strict, frozen=True):
    """Where trials run. No part of a campaign's results, so it may change at any time.

    Attributes:
        name: ``local``, ``ray``, ``slurm``, or one of another package.
        workers: trials at a time; by default one per core, or what the cluster gives.
        time_limit: of one trial, such as ``90s``, ``10m`` or ``2h``.
        memory_limit: resident memory of one worker, such as ``4G``.
        retries: further attempts when a worker dies.
        options: of the executor.
    """

    name: str = "local"
    workers: _Positive | None = None
    time_limit: str | None = None
    memory_limit: str | None = None
    retries: Annotated[int, Meta(ge=0, le=100)] = 2
    options: dict[str, Any] = {}

    @property
    def seconds(self) -> float | None:
        """The time limit in seconds."""
        return None if self.time_limit is None else parse_duration(self.time_limit)

    @property
    def memory(self) -> int | None:
        """The memory limit in bytes."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)


def _condition() -> type[msgspec.Struct]:
    """The fields of a policy, each of which may be swept; made from `Policy`, so that they stay the same."""
    fields: list[tuple[str, Any, Any]] = []
    swept: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(Policy):
        kind: Any = field.type
        if field.name in _LISTS:
            kind = str | tuple[str, ...]
        fields.append((field.name, kind | None, None))
        swept.append((field.name, tuple[kind, ...], ()))
    options: dict[str, Any] = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
    sweep = msgspec.defstruct("Sweep", swept, module=__name__, omit_defaults=True, **options)
    fields += [("label", str | None, None), ("sweep", sweep, msgspec.field(default_factory=sweep))]
    return msgspec.defstruct("Condition", fields, module=__name__, omit_defaults=True, **options)


Condition: Any = _condition()


class Campaign(_Strict, frozen=True):
    """A whole spec.

    Attributes:
        name: what the campaign is called.
        title: over its report.
        about: what is asked, in words, for the report.
        seed: every draw of the campaign follows from it.
        keras_backend: what Keras' workloads run on: ``tensorflow``, ``torch`` or ``jax``.
        workload: what is trained.
        clean: the clean runs.
        restart: where trials start and end.
        policy: what is hit; each is a condition, or several where fields are swept.
        trials: how many.
        metric: what outcomes are judged by.
        measure: what else is kept.
        shortcuts: when a trial may end early.
        executor: where trials run.
    """

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    workload: Annotated[tuple[WorkloadSpec, ...], Meta(min_length=1)]
    restart: Restart
    policy: tuple[Condition, ...] = ()
    title: str = ""
    about: str = ""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    keras_backend: str | None = None
    clean: Clean = Clean()
    trials: Trials = Trials()
    metric: Metric = Metric()
    measure: Measure = Measure()
    shortcuts: Shortcuts = Shortcuts()
    executor: ExecutorSpec = ExecutorSpec()


_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_duration(text: str) -> float:
    """A duration in seconds.

    Raises:
        UsageError: it is none, or not above 0.

    Example:
        >>> parse_duration("10m"), parse_duration("1.5 h")
        (600.0, 5400.0)
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is no duration: write 90s, 10m, 2h or 1d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def parse_size(text: str) -> int:
    """A size in bytes; K, M, G and T are powers of 1024.

    Raises:
        UsageError: it is none, or not above 0.

    Example:
        >>> parse_size("4G"), parse_size("512 MiB")
        (4294967296, 536870912)
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0 if match is None else int(float(match[1]) * 1024 ** _POWERS[match[2].upper()])
    if size <= 0:
        raise UsageError(f"{text!r} is no size: write 512M, 4G or 1T")
    return size
