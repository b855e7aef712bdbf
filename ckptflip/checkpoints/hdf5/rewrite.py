"""Altering words that only the HDF5 library can write: in a copy of the file, opened for writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5l, h5o, h5p, h5s
from numpy.typing import NDArray

from ckptflip.checkpoints.hdf5.chunks import ChunkCodec, write_chunk
from ckptflip.checkpoints.hdf5.places import Chunks, element_space, split, word_bytes
from ckptflip.checkpoints.hdf5.times import kept_times
from ckptflip.checkpoints.hdf5.types import Field
from ckptflip.checkpoints.hdf5.walker import FLETCHER32, Dataset
from ckptflip.checkpoints.target import Changes
from ckptflip.errors import CheckpointError
from ckptflip.faults.catalogue import Tensor


def rewrite(
    path: Path,
    changes: Changes,
    rows: Mapping[int, slice],
    tensors: Sequence[Tensor],
    datasets: Sequence[Dataset],
    fields: Sequence[Field],
    checksum: str,
    gathered: Mapping[int, NDArray[np.uint8]],
) -> None:
    """Alter words of some tensors in a copy. Only chunks that are hit are encoded again.

    No time of day gets into the copy: a replay gives the identical file.

    Args:
        path: the copy.
        changes: all masks.
        rows: the rows of `changes` for each tensor to be altered here.
        tensors: the catalogue.
        datasets: where each tensor lies.
        fields: how its words lie in a record.
        checksum: ``repair`` or ``leave``.
        gathered: for tensors whose data lie in other files, the records of the dataset, shape (records,
            bytes). The copy then holds them itself, so that those files stay as they are.

    Raises:
        CheckpointError: the library refuses.
    """
    touched = {datasets[tensor].key for tensor in rows}
    touched |= {_encoded(a.removesuffix(fields[t].suffix)) for t in gathered for a in tensors[t].aliases}
    try:
        with kept_times(path, touched), h5py.File(path, "r+", locking=False) as file:
            own: dict[bytes, Any] = {}
            for tensor, part in rows.items():
                place, field = datasets[tensor], fields[tensor]
                words, masks = changes.word[part], changes.mask[part]
                if place.key not in own:
                    dataset = h5d.open(file.id, place.key)
                    if tensor in gathered:
                        names = [a.removesuffix(field.suffix) for a in tensors[tensor].aliases]
                        dataset = _hold(file, place, gathered[tensor], names)
                    own[place.key] = dataset
                if place.kind == "chunked":
                    _alter_chunks(own[place.key], place, field, words, masks, checksum)
                else:
                    if checksum == "leave" and FLETCHER32 in place.filters:
                        raise CheckpointError(
                            f"{tensors[tensor].name}: only the library reaches its chunks, and it repairs "
                            "their checksums; use --checksum repair"
                        )
                    _alter_records(own[place.key], place, field, words, masks)
    except (OSError, RuntimeError, ValueError, KeyError) as why:
        raise CheckpointError(f"HDF5 cannot write the altered copy: {why}") from None


def _xor_records(
    records: NDArray[np.uint8],
    inner: NDArray[np.int64],
    field: Field,
    masks: NDArray[np.uint64],
    rows: NDArray[np.int64],
) -> None:
    """XOR masks into words of records, shape (records, bytes); `rows` says which record each mask is for."""
    at = word_bytes(inner, field)
    np.bitwise_xor.at(
        records, (rows[:, None], at), masks.astype(field.stored).view(np.uint8).reshape(at.shape)
    )


def _alter_chunks(
    dataset: Any,
    place: Dataset,
    field: Field,
    words: NDArray[np.int64],
    masks: NDArray[np.uint64],
    checksum: str,
) -> None:
    codec = ChunkCodec(dataset, place.key.decode("utf-8", "backslashreplace"))
    records, inner = split(words, field)
    for part in Chunks(dataset, place).locate(records):
        old = b""
        if part.offset is None:
            chunk = np.repeat(codec.fill(), prod(place.chunk), axis=0)
        else:
            # Not the mask that is read with the chunk: HDF5 2.0 gives 0 for a chunk that was just written.
            old = bytes(dataset.read_direct_chunk(part.coordinates)[1])
            chunk = codec.decode(old, part.filter_mask).copy()
        _xor_records(chunk, inner[part.rows], field, masks[part.rows], part.within)
        stored, mask = codec.encode(chunk)
        if old:
            stored = codec.settle_checksum(old, stored, part.filter_mask, mask, checksum)
        write_chunk(dataset, part.coordinates, stored, mask)


def _alter_records(
    dataset: Any, place: Dataset, field: Field, words: NDArray[np.int64], masks: NDArray[np.uint64]
) -> None:
    records, inner = split(words, field)
    wanted, rows = np.unique(records, return_inverse=True)
    kind = dataset.get_type()
    if place.shape:
        space = element_space(dataset, place, wanted)
        memory, data = h5s.create_simple(wanted.shape), np.empty(wanted.size, f"V{place.record}")
    else:
        space = memory = h5s.ALL
        data = np.empty((), f"V{place.record}")
    dataset.read(memory, space, data, kind)
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).reshape(-1, place.record)
    _xor_records(raw, inner, field, masks, rows)
    dataset.write(memory, space, raw.view(f"V{place.record}").reshape(data.shape), kind)


def _hold(file: h5py.File, place: Dataset, records: NDArray[np.uint8], aliases: Sequence[str]) -> Any:
    """Replace a dataset whose data lie in other files by a contiguous one under the same names."""
    old = h5d.open(file.id, place.key)
    kind = old.get_type()
    space = h5s.create_simple(place.shape) if place.shape else h5s.create(h5s.SCALAR)
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)  # nor here
    new = h5d.create(file.id, None, kind, space, creation)
    new.write(
        h5s.ALL, h5s.ALL, np.ascontiguousarray(records).view(f"V{place.record}").reshape(place.shape), kind
    )
    kept, moved = h5py.Dataset(old), h5py.Dataset(new)
    for name in kept.attrs:
        moved.attrs[name] = kept.attrs[name]
    address = h5o.get_info(old).addr
    for name in [place.key, *map(_encoded, aliases)]:
        parent, _, leaf = name.rpartition(b"/")
        group = file[parent or "/"].id
        hard = leaf in group and group.links.get_info(leaf).type == h5l.TYPE_HARD
        if hard and h5o.get_info(h5o.open(group, leaf)).addr == address:
            group.unlink(leaf)
            h5o.link(new, group, leaf)
    return new


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
