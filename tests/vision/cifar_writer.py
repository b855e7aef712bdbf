"""Writes small data sets in the layouts of the official CIFAR files, byte for byte but for their size."""

from __future__ import annotations

import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np

BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "binary"): "cifar-100-binary",
}
ARCHIVES = {
    ("cifar10", "python"): "cifar-10-python.tar.gz",
    ("cifar100", "python"): "cifar-100-python.tar.gz",
    ("cifar10", "binary"): "cifar-10-binary.tar.gz",
    ("cifar100", "binary"): "cifar-100-binary.tar.gz",
}


def images(data: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8[count, 3072] and int64[count], with the first and the last class among them."""
    rng = np.random.default_rng(seed)
    classes = 10 if data == "cifar10" else 100
    labels = rng.integers(0, classes, count)
    labels[0], labels[-1] = 0, classes - 1
    return rng.integers(0, 256, (count, 3072), np.uint8), labels


def sets(data: str, per_batch: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pixels and labels by the files' names in the python version."""
    if data == "cifar10":
        return {name: images(data, per_batch, i) for i, name in enumerate([*BATCHES, "test_batch"])}
    return {"train": images(data, 5 * per_batch, 0), "test": images(data, per_batch, 1)}


def write(folder: Path, data: str, version: str, dump: str = "python2") -> Path:
    """The official folder, inside `folder`."""
    place = folder / FOLDERS[data, version]
    place.mkdir(parents=True)
    for name, (pixels, labels) in sets(data).items():
        if version == "binary":
            coarse = [] if data == "cifar10" else [labels[:, None] // 5]
            table = np.concatenate([*coarse, labels[:, None], pixels], axis=1).astype(np.uint8)
            (place / f"{name}.bin").write_bytes(table.tobytes())
        else:
            (place / name).write_bytes(DUMPS[dump](pixels, labels, data))
    return place


def archive(folder: Path, data: str, version: str) -> Path:
    """The official archive, inside `folder`."""
    path = folder / ARCHIVES[data, version]
    place = write(folder / "unpacked", data, version)
    with tarfile.open(path, "w:gz") as made:
        made.add(place, place.name)
    return path


def python2(pixels: np.ndarray, labels: np.ndarray, data: str) -> bytes:
    """What Python 2's cPickle wrote with protocol 2: the official files' opcodes."""
    integers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"".join(b"M" + struct.pack("<H", n) if n > 255 else b"K" + bytes([n]) for n in pixels.shape)
    return b"".join([
        b"\x80\x02}q\x01(", short(b"batch_label"), b"q\x02", short(b"testing batch 1 of 1"), b"q\x03",
        short(b"labels" if data == "cifar10" else b"fine_labels"), b"q\x04]q\x05(", integers, b"e",
        short(b"data"), b"q\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85",
        b"U\x01b\x87Rq\x09(K\x01", shape, b"\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|",
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<I", pixels.size),
        pixels.tobytes(), b"tb", short(b"filenames"), b"q\x0c]q\x0d(",
        *(short(b"x.png") for _ in labels), b"eu.",
    ])  # fmt: skip


def short(text: bytes) -> bytes:
    """A byte string of Python 2's."""
    return b"U" + bytes([len(text)]) + text


def dumped(protocol: int, *, keys: type = bytes, order: str = "C") -> object:
    """A writer that uses Python 3's own pickle, under numpy's legacy names."""

    def dump(pixels: np.ndarray, labels: np.ndarray, data: str) -> bytes:
        label = "labels" if data == "cifar10" else "fine_labels"
        entries = {"data": np.asarray(pixels, order=order), label: labels.tolist(), "batch_label": "x"}
        named = {key if keys is str else key.encode(): value for key, value in entries.items()}
        made = pickle.dumps(named, protocol=protocol)
        return made.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol < 4 else made

    return dump


DUMPS = {
    "python2": python2,
    "protocol2": dumped(2),
    "protocol2 text keys": dumped(2, keys=str),
    "protocol2 fortran": dumped(2, order="F"),
    "protocol3": dumped(3),
    "protocol4": dumped(4),
}
