"""PyTorch workloads with distributed checkpoints: folders in which N ranks own rows of each tensor.

One process trains and writes what N ranks of a data-parallel run with sharded parameters (FSDP) would
write: through the planner and the file writer of `torch.distributed.checkpoint`, one file per rank.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip import torch_h5
from ckptflip.checkpoints import opened
from ckptflip.errors import CheckpointError, MissingExtraError, UsageError, WorkloadError
from ckptflip.training.workload import Workload, find

try:
    import torch
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import (
        SavePlan,
        SavePlanner,
        TensorWriteData,
        WriteItem,
        WriteItemType,
    )
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Distributed checkpoints") from error

from ckptflip.torch_h5 import plain

# Stands in the description of a state where a tensor was; no key of a state is called so.
_TENSOR = "\0tensor"
# The tensor that holds this description, as JSON.
_DESCRIPTION = "description"
# What ranks share out; everything else is the first rank's.
_SHARED = ("model", "optimizer")
_MOST_RANKS = 4096

# By the keys that lead to a tensor in the state.
Tensors = dict[tuple[str, ...], torch.Tensor]


def sharded(workload: str, ranks: int = 8, **options: Any) -> Sharded:
    """``sharded``: another PyTorch workload, trained as it is, with distributed checkpoints.

    Args:
        workload: its name, as in `find`.
        ranks: how many own parts of the checkpoint.
        options: of the workload.

    Raises:
        UsageError: not a number of ranks, or the workload's checkpoints are not PyTorch's.
        WorkloadError: there is no such workload.

    Example:
        >>> sharded("digits-cnn", ranks=4).name
        'digits-cnn[ranks=4]'
    """
    if type(ranks) is not int or not 1 <= ranks <= _MOST_RANKS:
        raise UsageError(f"ranks is a whole number from 1 to {_MOST_RANKS}, not {ranks!r}")
    inner = find(workload, **options)
    suffix = getattr(inner, "suffix", ".h5")
    if suffix != ".h5" or not hasattr(inner, "digest"):
        raise UsageError(
            f"workload {workload} keeps its state in {suffix} files; distributed checkpoints are made of "
            "PyTorch workloads only"
        )
    return Sharded(inner, ranks)


class Sharded:
    """A workload with distributed checkpoints; what it trains, and every bit of it, is the inner workload's.

    Rows of each tensor of the model and of the optimizer are shared out as FSDP does: rank r of N owns the
    r-th run of ⌈rows / N⌉ rows, and none where they do not suffice. Random states, and what is no tensor (as
    JSON in a tensor of bytes), are the first rank's. A checkpoint is read by `ckptflip.opened`: nothing in it
    is unpickled. PyTorch reads it too.

    Args:
        inner: a PyTorch workload whose checkpoints are those of `ckptflip.torch_h5`.
        ranks: how many own parts of a checkpoint.
    """

    suffix = ".dcp"

    def __init__(self, inner: Workload, ranks: int) -> None:
        self._inner, self._ranks = inner, ranks
        base, bracket, told = inner.name.partition("[")
        self.name = f"{base}[{told[:-1]},ranks={ranks}]" if bracket else f"{base}[ranks={ranks}]"

    @property
    def epoch(self) -> int:
        """Epochs trained so far; 0 before `start`."""
        return self._inner.epoch

    def start(self, seed: int) -> None:
        """Set up the initial state for a seed >= 0."""
        self._inner.start(seed)

    def train_epoch(self) -> dict[str, float]:
        """Train one epoch; returns what the inner workload does."""
        return self._inner.train_epoch()

    def evaluate(self) -> dict[str, float]:
        """Measure the present state; returns what the inner workload does."""
        return self._inner.evaluate()

    def digest(self) -> str:
        """A digest of everything that `save` would write: equal digests, equal states bit for bit."""
        found: str = self._inner.digest()  # type: ignore[attr-defined]
        return found

    def save(self, path: str | Path) -> None:
        """Write the whole state to a folder; one that is there already is replaced.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = Path(path)
        with tempfile.TemporaryDirectory(prefix="ckptflip-") as folder:
            self._inner.save(Path(folder) / "state.h5")
            state = torch_h5.load(Path(folder) / "state.h5")
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            write({**state, "workload": self.name}, draft, self._ranks)
            if path.exists():
                shutil.rmtree(path)
            draft.rename(path)
        except OSError as why:
            raise CheckpointError(f"{path} cannot be written: {why.strerror or why}") from why
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def load(self, path: str | Path) -> None:
        """Take up the state of a checkpoint; when that fails, the present state stays."""
        state = read(Path(path))
        found = state.get("workload") if isinstance(state, dict) else None
        if found != self.name:
            raise WorkloadError(f"{path} belongs to the workload {found!r}, not to {self.name!r}")
        with tempfile.TemporaryDirectory(prefix="ckptflip-") as folder:
            file = Path(folder) / f"{Path(path).stem}.h5"
            torch_h5.save({**state, "workload": self._inner.name}, file)
            self._inner.load(file)


def write(state: dict[str, Any], folder: Path, ranks: int) -> None:
    """Write a state as so many ranks would, to a folder that is not there yet.

    Args:
        state: dicts, lists and tuples of tensors and plain values.
        folder: of the checkpoint.
        ranks: how many there are.

    Raises:
        CheckpointError: something in the state cannot be stored.
        OSError: the folder cannot be written.
    """
    tensors: Tensors = {}
    text = plain.dumps(_described(state, (), _parameters(state), tensors), "the state")
    tensors[(_DESCRIPTION,)] = torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)
    writer, planner = FileSystemWriter(folder), _Planner(tensors, ranks)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan(
        [writer.prepare_local_plan(planner.plan_of(rank)) for rank in range(ranks)]
    )
    writing = [writer.write_data(plan, planner) for plan in writer.prepare_global_plan(plans) if plan.items]
    writer.finish(metadata, [each.wait() for each in writing])


def read(folder: Path) -> Any:
    """Read back what `write` wrote, altered tensors included; nothing is unpickled.

    Raises:
        CheckpointError: it is no such checkpoint, or it is damaged.
    """
    tensors = dict(_stored(folder))
    if _DESCRIPTION not in tensors:
        raise CheckpointError(f"{folder} is no checkpoint of a sharded workload: it has no {_DESCRIPTION}")
    try:
        return _assembled(plain.loads(tensors[_DESCRIPTION].numpy().tobytes().decode("ascii")), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as why:
        raise CheckpointError(
            f"{folder} is damaged: what it says of its tensors makes no sense ({type(why).__name__}: {why})"
        ) from None


class _Planner(SavePlanner):  # type: ignore[misc]
    """Shares out tensors among ranks, all in this process."""

    def __init__(self, tensors: Tensors, ranks: int) -> None:
        self._paths = {".".join(path): path for path in tensors}
        self._tensors, self._ranks = tensors, ranks

    def plan_of(self, rank: int) -> SavePlan:
        """What a rank writes."""
        found = []
        for name, path in self._paths.items():
            whole = self._tensors[path]
            box = _box(path, whole.shape, rank, self._ranks)
            if box is not None:
                data = TensorWriteData(box, TensorProperties(dtype=whole.dtype), whole.shape)
                index = MetadataIndex(name, box.offsets)
                found.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(found)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """All ranks' plans, and the index of the checkpoint."""
        plans, metadata = create_default_global_save_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data=self._paths)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The part of a tensor that is written."""
        assert write_item.tensor_data is not None
        box, whole = write_item.tensor_data.chunk, self._tensors[self._paths[write_item.index.fqn]]
        return whole[box.offsets[0] : box.offsets[0] + box.sizes[0]].clone() if box.sizes else whole

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing to do: what is written is known."""

    def create_local_plan(self) -> SavePlan:
        """The first rank's plan; those of all ranks are asked for by `plan_of`."""
        return self.plan_of(0)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Every rank does as the coordinator says."""
        return new_plan


def _box(path: tuple[str, ...], shape: torch.Size, rank: int, ranks: int) -> ChunkStorageMetadata | None:
    """The part of a tensor that a rank owns; None: it owns none."""
    if 0 in shape:
        return None
    if not shape:
        return ChunkStorageMetadata(shape, shape) if rank == 0 else None
    rows = -(-shape[0] // ranks) if path[0] in _SHARED else shape[0]
    count = min(rows, shape[0] - rank * rows)
    if count < 1:
        return None
    start = torch.Size((rank * rows, *(0 for _ in shape[1:])))
    return ChunkStorageMetadata(start, torch.Size((count, *shape[1:])))


def _parameters(state: Mapping[str, Any]) -> dict[Any, str]:
    """What the keys of the optimizer's state are called: by their parameters, as in FSDP's checkpoints."""
    optimizer = state.get("optimizer")
    groups = optimizer.get("param_groups", []) if isinstance(optimizer, dict) else []
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    return dict(zip(keys, names, strict=True)) if len(keys) == len(names) else {}


def _described(value: Any, path: tuple[str, ...], parameters: Mapping[Any, str], tensors: Tensors) -> Any:
    """A state with descriptions in the places of its tensors, which are collected."""
    if isinstance(value, dict):
        called = parameters if path == ("optimizer", "state") else {}
        return type(value)(
            (key, _described(item, (*path, called.get(key, str(key))), parameters, tensors))
            for key, item in value.items()
        )
    if type(value) in (list, tuple):
        return type(value)(
            _described(item, (*path, str(i)), parameters, tensors) for i, item in enumerate(value)
        )
    if not isinstance(value, torch.Tensor):
        return value
    tensors[path] = value.detach()
    return {_TENSOR: ["/".join(path), str(value.dtype).removeprefix("torch."), list(value.shape)]}


def _assembled(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that `_described` was given; ValueError and its kin where tensors do not fit."""
    if isinstance(value, dict) and _TENSOR in value:
        name, dtype, shape = value[_TENSOR]
        found = tensors.get(name)
        if found is None and 0 in shape:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        if found is None or (str(found.dtype), list(found.shape)) != (f"torch.{dtype}", shape):
            raise ValueError(f"{name} is missing, or of another dtype or shape")
        return found
    if isinstance(value, dict):
        return type(value)((key, _assembled(item, tensors)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_assembled(item, tensors) for item in value)
    return value


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint, as stored: no bit is carried through a number."""
    with opened(folder) as target:
        for position, tensor in enumerate(target.tensors):
            dtype = getattr(torch, tensor.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"{folder}: PyTorch has no {tensor.dtype}, the dtype of {tensor.name}")
            words = np.concatenate(list(target.blocks(position)))
            yield tensor.name, torch.from_numpy(words.view(np.uint8)).view(dtype).reshape(tensor.shape)
