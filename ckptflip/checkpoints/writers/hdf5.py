"""HDF5: one contiguous dataset per storage, hard links for its other names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from ckptflip.bits import NumberFormat
from ckptflip.bits.formats import ML_FLOATS, ML_INTEGERS
from ckptflip.checkpoints.writers import Entry, raw
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor

_OPAQUE = frozenset((*ML_FLOATS, *ML_INTEGERS, "complex32", "bcomplex32"))


def unfit(tensor: Tensor) -> str | None:
    """Why HDF5 cannot hold a tensor; None if it can."""
    if any(not _is_path(name) for name in (tensor.name, *tensor.aliases)):
        return "its name cannot be a path in HDF5"
    return None


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file. See `ckptflip.checkpoints.writers.Writer`."""
    places: list[int | None] = []
    try:
        with h5py.File(path, "w", locking=False) as file:
            for entry in entries:
                places.append(_create(file, entry.tensor))
    except (OSError, RuntimeError, ValueError, KeyError) as why:
        raise CheckpointError(f"HDF5 cannot write {path.name}: {why}") from None
    fd = os.open(path, os.O_WRONLY)
    try:
        for entry, place in zip(entries, places, strict=True):
            at = place or 0
            for block in entry.blocks():
                view = raw(block)
                while view:
                    written = os.pwrite(fd, view, at)
                    view, at = view[written:], at + written
    finally:
        os.close(fd)


def _create(file: h5py.File, tensor: Tensor) -> int | None:
    """Make a dataset with its space set aside.

    Returns:
        Where its data begin; None for an empty one.
    """
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    # No time of day in the file: the same conversion gives the same bytes.
    creation.set_obj_track_times(False)
    links = h5p.create(h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5s.create_simple(tensor.shape) if tensor.shape else h5s.create(h5s.SCALAR)
    name = tensor.name.encode("utf-8")
    dataset = h5d.create(file.id, None, _type_of(tensor.number), space, creation)
    h5py.h5o.link(dataset, file.id, name, links)
    for alias in tensor.aliases:
        h5py.h5o.link(dataset, file.id, alias.encode("utf-8"), links)
    if tensor.number.name in _OPAQUE:
        h5py.Dataset(dataset).attrs["dtype"] = tensor.number.name
    offset: int | None = dataset.get_offset() if tensor.size else None
    return offset


def _type_of(number: NumberFormat) -> h5t.TypeID:
    """HDF5's own type, or opaque bytes with the dtype's name beside them, as Keras keeps bfloat16."""
    if number.name in _OPAQUE:
        return h5t.py_create(np.dtype(f"V{number.parts * number.word_size}"))
    return h5t.py_create(np.dtype(number.name).newbyteorder("<"), logical=True)


def _is_path(name: str) -> bool:
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))
