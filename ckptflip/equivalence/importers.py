"""Faults that other injectors drew, as a record for a checkpoint: `ckptflip replay` carries it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_, xor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptflip import record_files
from ckptflip.application import Destination, record_of
from ckptflip.checkpoints import Checkpoint, files, opened
from ckptflip.checkpoints.target import positions_by_name
from ckptflip.equivalence import foreign
from ckptflip.equivalence.names import logicals, normal_layer
from ckptflip.errors import RecordError, UsageError
from ckptflip.faults.catalogue import Tensor, listed
from ckptflip.faults.plan import Plan
from ckptflip.faults.record import Record
from ckptflip.matching import read_all

# The layers that PyTorchALFI counts, and how many axes their weights have.
LAYER_TYPES = {"conv2d": 4, "conv3d": 5, "fcc": 2}

# (tensor, element) → masks of the injections, in their order.
_Faults = dict[tuple[int, int], list[int]]


def import_faults(
    faults: str | Path,
    checkpoint: str | Path,
    *,
    record: str | Path,
    layer_types: str | Iterable[str] = (),
    modules: str | Iterable[str] = (),
    overwrite: bool = False,
) -> Record:
    """Write the faults of another injector's file as a record for a checkpoint, which stays as it is.

    Args:
        faults: the sequence that hdf5_corrupter saved (JSON), or the faults that PyTorchALFI drew for weights
            (a pickled array, which is read without unpickling).
        checkpoint: what they are for.
        record: the record's file.
        layer_types: for PyTorchALFI, the layers of its scenario: of conv2d, conv3d, fcc. They are counted in
            the order of the checkpoint, which must be PyTorch's own file.
        modules: for PyTorchALFI, instead: the names of the layers that it counted, in order.
        overwrite: whether the record may replace another file.

    Returns:
        The record, as written. Its words before and after are those of the checkpoint.

    Raises:
        RecordError: the file cannot be read, does not say which bits were hit, or does not fit.
        UsageError: arguments that make no sense; a file that exists.
        CheckpointError: the checkpoint cannot be read.
    """
    path, out = Path(faults), Path(record)
    types, names = listed(layer_types), listed(modules)
    files.check_new(out, overwrite=overwrite)
    if len({p.resolve() for p in (path, out, Path(checkpoint))}) < 3:
        raise UsageError("faults, checkpoint and record must be different files")
    is_sequence = foreign.is_json(path)
    if is_sequence and (types or names):
        raise UsageError(f"{path} names its tensors; layer types and modules are for PyTorchALFI's files")
    with opened(checkpoint) as target:
        if is_sequence:
            found = _of_sequence(foreign.read_sequence(path), target, path)
        else:
            found = _of_alfi(foreign.read_alfi(path), _counted(target, types, names), target, path)
        if not found:
            raise RecordError(f"{path} lists no fault that took place")
        destination = Destination(Path(checkpoint), None, out, overwrite)
        plan = _plan(found, target)
        made = record_of(target, plan, destination, "repair", replay_of=path.name)
    record_files.write(made, out, overwrite=overwrite)
    return Record(made.header, made.plan, str(out))


def _of_sequence(injections: Sequence[foreign.Sequence], target: Checkpoint, path: Path) -> _Faults:
    found: _Faults = defaultdict(list)
    known: dict[str, int] = {}
    for each in injections:
        if each.location not in known:
            known[each.location] = _at(each.location, target, path)
        position = known[each.location]
        tensor = target.tensors[position]
        if tensor.number.kind != "float":
            raise RecordError(
                f"{path}: {tensor.name} is {tensor.dtype}; only floats' bits are told by the file"
            )
        width = tensor.number.part_width
        if each.bits and max(each.bits) >= width:
            raise RecordError(
                f"{path}: bit {max(each.bits)} of {tensor.name}, which is {tensor.dtype}: the sequence was "
                "made with another precision"
            )
        element = _element(each.index if tensor.shape else (), tensor, path)
        found[position, element] += [1 << (width - 1 - bit) for bit in each.bits]
    return found


def _at(location: str, target: Checkpoint, path: Path) -> int:
    """The tensor of a location: a dataset, or a prefix of the names of one alone."""
    names = positions_by_name(target.tensors)
    name = location.strip("/")
    if name in names:
        return names[name]
    below = sorted({at for each, at in names.items() if each.startswith(name)})
    if len(below) == 1:
        return below[0]
    if not below:
        raise RecordError(f"{path}: the checkpoint has no {location}")
    several = ", ".join(target.tensors[i].name for i in below[:4])
    raise RecordError(
        f"{path}: {location} stands for {several}{' …' if len(below) > 4 else ''}, and which of them was hit "
        "is not in the file"
    )


def _of_alfi(columns: NDArray[np.int64], layers: Sequence[int], target: Checkpoint, path: Path) -> _Faults:
    found: _Faults = defaultdict(list)
    for layer, *index, bit in columns.T.tolist():
        if not 0 <= layer < len(layers):
            raise RecordError(
                f"{path}: a fault in layer {layer}, and {len(layers)} are counted: are these faults of "
                "neurons, or of a network of other layer types?"
            )
        tensor = target.tensors[layers[layer]]
        if tensor.number.name != "float32" or not 0 <= bit < 32:
            raise RecordError(f"{path}: bit {bit} of {tensor.name}, which is {tensor.dtype}, not float32")
        # Filter, channel, depth, height, width; those that the layer does not have are not looked at.
        used = {2: index[3:], 4: [index[0], index[1], *index[3:]]}.get(len(tensor.shape), index)
        found[layers[layer], _element(tuple(used), tensor, path)].append(1 << (31 - bit))
    return found


def _counted(target: Checkpoint, types: Sequence[str], modules: Sequence[str]) -> list[int]:
    """The weights of the layers that PyTorchALFI counts, in its order."""
    if bool(types) == bool(modules):
        raise UsageError(
            "PyTorchALFI numbers layers: say which of conv2d, conv3d, fcc its scenario counts (layer types), "
            "or name them in order (modules)"
        )
    found = logicals(target.tensors)
    weights = {
        k.layer: i for i, k in enumerate(found) if k is not None and (k.variable, k.slot) == ("weight", "")
    }
    if modules:
        lost = [m for m in modules if normal_layer(m) not in weights]
        if lost:
            raise UsageError(f"{target.path} has no weight of a layer {lost[0]!r}")
        return [weights[normal_layer(m)] for m in modules]
    unknown = [t for t in types if t not in LAYER_TYPES]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no layer type; use {', '.join(LAYER_TYPES)}")
    if target.format != "pytorch":
        raise UsageError(
            f"{target.path} does not list its layers in the network's order: name them as modules"
        )
    axes = {LAYER_TYPES[t] for t in types}
    return [
        i
        for i in sorted(weights.values())
        if len(target.tensors[i].shape) in axes and target.tensors[i].role != "embedding"
    ]


def _element(index: tuple[int, ...], tensor: Tensor, path: Path) -> int:
    if len(index) != len(tensor.shape) or any(
        not 0 <= i < n for i, n in zip(index, tensor.shape, strict=True)
    ):
        raise RecordError(f"{path}: {tensor.name} {tensor.shape} has no element {index}")
    return int(np.ravel_multi_index(index, tensor.shape)) if index else 0


def _plan(found: _Faults, target: Checkpoint) -> Plan:
    rows = sorted(found)
    hit = np.array([reduce(or_, found[row], 0) for row in rows], np.uint64)
    # A bit that was inverted twice is as it was.
    changed = np.array([reduce(xor, found[row], 0) for row in rows], np.uint64)
    tensor = np.array([position for position, _ in rows], np.int32)
    word = np.array([element for _, element in rows], np.int64)
    nothing = np.zeros(len(rows), np.uint64)
    plan = Plan(tensor, word, hit, nothing, nothing, np.ones(len(rows), np.uint16))
    before = read_all(target, plan)
    return Plan(tensor, word, hit, before, before ^ changed, plan.policies)
