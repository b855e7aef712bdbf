"""CIFAR-10 and CIFAR-100 from the official files: python or binary version, in a folder or as downloaded.

Layouts (https://www.cs.toronto.edu/~kriz/cifar.html): the binary version holds records of one label byte
(CIFAR-100: two, coarse and fine) and 3072 pixels, the red, the green and the blue 32x32 image; the python
version holds pickled dicts with the same pixels under ``data``. The pickles are read without being run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError, WorkloadError
from ckptflip.vision import cifar_pickles
from ckptflip.vision.cifar_files import Files, files

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]

PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Images:
    """Images with their labels.

    Attributes:
        pixels: uint8[n, 3, 32, 32], red, green, blue.
        labels: int64[n]; CIFAR-100's fine ones.
    """

    pixels: Bytes
    labels: Labels


@dataclass(frozen=True, slots=True)
class Cifar:
    """A data set: its name, how many classes it has, and its two parts."""

    name: str
    classes: int
    train: Images
    test: Images


@dataclass(frozen=True, slots=True)
class _Version:
    """The official files of one data set in one version.

    Attributes:
        data: name of the data set.
        folder: what the archive unpacks to.
        train: files of the training set, in order.
        test: the test set's file.
        label: key of the labels in the python version; "" in the binary one.
        skipped: label bytes before the one that counts, in the binary version.
    """

    data: str
    folder: str
    train: tuple[str, ...]
    test: str
    label: str = ""
    skipped: int = 0


_CLASSES = {"cifar10": 10, "cifar100": 100}
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = (
    _Version("cifar10", "cifar-10-batches-py", _BATCHES, "test_batch", label="labels"),
    _Version("cifar100", "cifar-100-python", ("train",), "test", label="fine_labels"),
    _Version("cifar10", "cifar-10-batches-bin", tuple(f"{b}.bin" for b in _BATCHES), "test_batch.bin"),
    _Version("cifar100", "cifar-100-binary", ("train.bin",), "test.bin", skipped=1),
)


def read(path: str | Path, data: str | None = None) -> Cifar:
    """Read a data set.

    Args:
        path: a folder with the official files, a folder that holds the official folder or archive
            (``cifar-10-python.tar.gz``), or the archive itself.
        data: ``cifar10`` or ``cifar100``; None for the one that is there.

    Raises:
        UsageError: no or both data sets are there, or files of one are missing.
        WorkloadError: a file is damaged or truncated.
    """
    if data is not None and data not in _CLASSES:
        raise UsageError(f"the data sets are {', '.join(_CLASSES)}, not {data!r}")
    path = Path(path)
    with _found(path, data) as (version, source):
        parts = [_part(source, name, version) for name in version.train]
        test = _part(source, version.test, version)
    train = Images(
        np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts])
    )
    _check_sizes(version, parts, train, test, path)
    return Cifar(version.data, _CLASSES[version.data], train, test)


def kind_of(path: str | Path) -> str:
    """Which data set lies at a path, ``cifar10`` or ``cifar100``; see `read`."""
    with _found(Path(path), None) as (version, _):
        return version.data


@contextmanager
def _found(path: Path, data: str | None) -> Iterator[tuple[_Version, Files]]:
    """The version that lies at a path, and its files, opened."""
    wanted = [version for version in _VERSIONS if data in (None, version.data)]
    with files(path, [version.folder for version in wanted]) as places:
        complete = [
            (version, place)
            for version in wanted
            for place in places
            if all(name in place.names for name in (*version.train, version.test))
        ]
        kinds = {version.data for version, _ in complete}
        if len(kinds) > 1:
            raise UsageError(
                f"{path} holds CIFAR-10 and CIFAR-100: say which, cifar10:{path} or cifar100:{path}"
            )
        if not complete:
            raise UsageError(_missing(path, wanted, places))
        yield complete[0]


def _missing(path: Path, wanted: list[_Version], places: list[Files]) -> str:
    """Which files are not there: the nearest version's, if any of its files are."""
    begun = [
        (sum(name in place.names for name in (*version.train, version.test)), place.where, version)
        for version in wanted
        for place in places
    ]
    most = max(begun, key=lambda one: one[0], default=None)
    if most and most[0]:
        names = next(place.names for place in places if place.where == most[1])
        lacking = [name for name in (*most[2].train, most[2].test) if name not in names]
        return f"{most[1]} lacks {', '.join(lacking)}: unpack the archive of {most[2].folder} again"
    folders = ", ".join(version.folder for version in wanted)
    return (
        f"{path} holds no official CIFAR files: expected the archive (.tar.gz) or the unpacked folder of one "
        f"of {folders}"
    )


def _part(source: Files, name: str, version: _Version) -> Images:
    where = f"{source.where}/{name}"
    with source.open(name) as (file, size):
        if version.label:
            pixels, labels = cifar_pickles.read(file, size, where, version.label)
        else:
            pixels, labels = _records(file.read(), where, version.skipped)
    classes = _CLASSES[version.data]
    if labels.min() < 0 or labels.max() >= classes:
        bad = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise WorkloadError(
            f"{where}: the label of image {bad} is {labels[bad]}; {version.data} has 0 to {classes - 1}. "
            "Is it the other data set's file, or damaged?"
        )
    return Images(pixels.reshape(-1, 3, 32, 32), labels)


def _records(content: bytes, where: str, skipped: int) -> tuple[Bytes, Labels]:
    record = skipped + 1 + PIXELS
    whole, rest = divmod(len(content), record)
    if rest or not whole:
        raise WorkloadError(
            f"{where} is truncated or damaged: {len(content)} bytes are no whole number of records of "
            f"{record} bytes. Download and unpack it again"
        )
    table = np.frombuffer(content, np.uint8).reshape(whole, record)
    return np.ascontiguousarray(table[:, skipped + 1 :]), table[:, skipped].astype(np.int64)


def _check_sizes(version: _Version, parts: list[Images], train: Images, test: Images, path: Path) -> None:
    """A file cut off between two records is sound in itself; its number of images gives it away."""
    counts = dict(zip(version.train, (len(part.labels) for part in parts), strict=True))
    counts[version.test] = len(test.labels)
    if len({counts[name] for name in version.train}) > 1 or len(train.labels) != 5 * len(test.labels):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise WorkloadError(
            f"{path}: the numbers of images do not fit together ({told}); the training set is five times the "
            "test set. A file is truncated: download and unpack it again"
        )


def normalised(pixels: Bytes, data: str) -> NDArray[np.float32]:
    """Pixels as a model takes them: 0 to 1, less the training set's mean, over its deviation, by channel.

    Args:
        pixels: uint8[n, 3, 32, 32].
        data: of which data set.

    Returns:
        float32[n, 3, 32, 32].
    """
    mean, deviation = (np.array(row, np.float32).reshape(3, 1, 1) for row in _STATISTICS[data])
    scaled: Any = pixels.astype(np.float32)
    scaled /= 255
    scaled -= mean
    scaled /= deviation
    found: NDArray[np.float32] = scaled
    return found


# Mean and standard deviation of the official training sets by channel, of pixels from 0 to 1.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
