"""What a vision workload is made of, apart from the framework: options, data and the name that tells them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.vision import augment as augmentation
from ckptflip.vision import cifar, digits

Sets = tuple[tuple[NDArray[np.float32], NDArray[np.int64]], tuple[NDArray[np.float32], NDArray[np.int64]]]

PRECISIONS = ("fp32", "fp64", "fp16", "bf16", "mixed-fp16", "mixed-bf16")
CHANNELS = 3
MOMENTUM = 0.9
# The learning rate is divided by ten after these epochs: those of a run of 100.
MILESTONES = (60, 80)
# AlexNet has no normalisation and diverges at the others' rate.
RATES = {"alexnet": 0.01}
RATE = 0.05


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen about a vision workload.

    Attributes:
        data: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, or DIR for the one that lies there.
        precision: one of `PRECISIONS`.
        width: what the channels of all hidden layers are multiplied with, for small machines.
        augment: random crops, and flips where mirrored images keep their class.
        subset: so many training and test samples, from the first; None for all.
        batch_size: samples per step.
        rate: learning rate of the first epochs; None for the architecture's.
    """

    data: str = "digits"
    precision: str = "fp32"
    width: float = 1.0
    augment: bool = True
    subset: int | None = None
    batch_size: int = 128
    rate: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked choice of options for an architecture; the data is read when it is first needed.

    Attributes:
        architecture: one of `architectures.ARCHITECTURES`.
        options: the choice.
        suffix: what the workload's name has behind the architecture's, such as ``-keras``.
        data: name of the data set.
    """

    architecture: str
    options: Options
    suffix: str = ""
    data: str = field(init=False)

    def __post_init__(self) -> None:
        _check(self.options)
        object.__setattr__(self, "data", _data_name(self.options.data))

    @property
    def name(self) -> str:
        """What a checkpoint keeps: with other data, precision, width, … it is another workload."""
        told = [f"data={self.data}", f"precision={self.options.precision}"]
        if self.options.width != 1:
            told.append(f"width={self.options.width:g}")
        if not self.options.augment:
            told.append("augment=no")
        if self.options.subset is not None:
            told.append(f"subset={self.options.subset}")
        if self.options.batch_size != Options.__dataclass_fields__["batch_size"].default:
            told.append(f"batch_size={self.options.batch_size}")
        if self.options.rate is not None:
            told.append(f"rate={self.options.rate:g}")
        return f"{self.architecture}{self.suffix}[{','.join(told)}]"

    @property
    def rate(self) -> float:
        """Learning rate of the first epochs."""
        return RATES.get(self.architecture, RATE) if self.options.rate is None else self.options.rate

    @property
    def classes(self) -> int:
        """How many there are in the data."""
        return 100 if self.data == "cifar100" else 10

    @property
    def flips(self) -> bool:
        """Whether augmentation mirrors images: a mirrored 3 is no digit."""
        return self.data != "digits"

    @cached_property
    def images(self) -> Sets:
        """Training and test set: float32[n, 3, 32, 32] and int64[n].

        Raises:
            UsageError, WorkloadError: the files are missing or damaged.
        """
        return _images(self.options.data, self.options.subset)

    def draws(self, seed: int, epoch: int, indices: Any) -> augmentation.Draws:
        """How the samples of a step are cropped and flipped."""
        return augmentation.draw(seed, epoch, indices, flip=self.flips)


def _check(options: Options) -> None:
    if options.precision not in PRECISIONS:
        raise UsageError(f"a precision is one of {', '.join(PRECISIONS)}, not {options.precision!r}")
    if not 0 < options.width <= 16:
        raise UsageError(f"width is more than 0 and at most 16, 1 for the full model; not {options.width}")
    if (options.subset is not None and options.subset < 1) or options.batch_size < 1:
        raise UsageError(f"subset ({options.subset}) and batch_size ({options.batch_size}) must be 1 or more")
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise UsageError(f"a learning rate is more than 0 and finite, not {options.rate}")


def _data_name(data: str) -> str:
    """Which data set is meant; a folder's own is found by looking at its files."""
    kind, _, folder = data.partition(":")
    if data == "digits" or (kind in ("cifar10", "cifar100") and folder):
        return kind
    if data in ("cifar10", "cifar100"):
        raise UsageError(f"say where the files of {data} lie: {data}:DIR")
    if not data:
        raise UsageError("data is digits, cifar10:DIR, cifar100:DIR or DIR, not nothing")
    return cifar.kind_of(data)


def _images(data: str, end: int | None) -> Sets:
    if data == "digits":
        (x, y), (x_test, y_test) = digits.images(CHANNELS)
        return (x[:end], y[:end]), (x_test[:end], y_test[:end])
    kind, _, folder = data.partition(":")
    named = kind in ("cifar10", "cifar100") and folder
    found = cifar.read(folder, kind) if named else cifar.read(data)
    train, test = (
        (cifar.normalised(part.pixels[:end], found.name), part.labels[:end])
        for part in (found.train, found.test)
    )
    return train, test
