"""What tensors in memory offer, and the verbs that alter them: inject, replay, undo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip import __version__, record_files
from ckptflip.errors import LiveError, RecordError, SelectionError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.draw import Population
from ckptflip.faults.plan import Plan, draw
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import SCHEMA, Header, Record, counts_of, entries_of
from ckptflip.faults.stream import check_seed
from ckptflip.matching import neither, on_target, read_all

_LIBRARIES = ("numpy", "torch", "keras", "tensorflow", "jax")


class LiveTarget(Protocol):
    """Tensors in memory. Positions in `tensors` name them in `read` and `xor`.

    Attributes:
        format: where they live, such as ``pytorch live``; kept in records.
    """

    format: str

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The catalogue as of now: the same object again for as long as nothing has changed.

        Raises:
            LiveError: the model is no longer the one that the target was made for.
        """
        ...

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned; nothing else of the tensor is read."""
        ...

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor, in place. Positions are distinct."""
        ...


class Armed:
    """Policies ready to be fired at a target: what does not depend on the seed is worked out once.

    Args:
        target: the tensors in memory.
        policy: a policy, or several that act one after the other.

    Raises:
        SelectionError: nothing may be hit, or less than is asked for.

    Example:
        >>> import torch
        >>> from ckptflip.faults import Policy
        >>> from ckptflip.live.torch_tensors import TorchTarget
        >>> armed = Armed(TorchTarget(torch.nn.Linear(8, 2)), Policy(bits="sign", tensors=("weight",)))
        >>> [armed.fire(seed).bits_effective for seed in (1, 2)]
        [1, 1]
    """

    def __init__(self, target: LiveTarget, policy: Policy | Sequence[Policy]) -> None:
        self.target = target
        self.policies = combine(policy)
        self._catalogue: Sequence[Tensor] = ()
        self._population: Population | None = None
        self._size = 0
        self._refresh()

    def fire(
        self, seed: int, *, where: str = "", record: str | Path | None = None, overwrite: bool = False
    ) -> Record:
        """Draw faults and put them into the tensors.

        Args:
            seed: same seed, policies, catalogue and contents: same faults, here and in a checkpoint file.
            where: kept in the record's header, such as ``epoch 3, step 120``.
            record: write the record to this file, before the first word is altered.
            overwrite: whether `record` may exist.

        Returns:
            The record.

        Raises:
            SelectionError: nothing may be hit, or less than is asked for.
            GuardError: `forbid` leaves nothing to draw.
            LiveError: the model changed, or the tensors do not hold the faults after all.
            UsageError: the record exists. In every case but a `LiveError` nothing was altered.
        """
        plan = self._drawn(seed)
        made = _record(
            self.target, self._catalogue, plan, where, self._size, seed=seed, policies=self.policies
        )
        return carry_out(self.target, plan, made, record, overwrite)

    def _drawn(self, seed: int) -> Plan:
        check_seed(seed)
        catalogue = self._refresh()
        if self._population is not None:
            return self._population.draw(seed)
        return draw(self.policies, catalogue, self.target.read, seed)

    def _refresh(self) -> Sequence[Tensor]:
        """Take up the catalogue as it is now."""
        catalogue = self.target.tensors
        if catalogue is not self._catalogue:
            check(self.policies, catalogue)
            only = self.policies[0] if len(self.policies) == 1 else None
            # Several policies see each other's faults, and a choice of ranks depends on the seed.
            alone = only is not None and only.ranks is None
            self._population = Population(only, catalogue, self.target.read) if alone and only else None
            self._catalogue = catalogue
            self._size = sum(t.nbytes for t in catalogue)
        return catalogue


def inject(
    target: LiveTarget,
    policy: Policy | Sequence[Policy],
    *,
    seed: int,
    where: str = "",
    record: str | Path | None = None,
    overwrite: bool = False,
) -> Record:
    """Draw faults and put them into tensors in memory, in place. To fire more than once, use `Armed`.

    Args:
        target: the tensors.
        policy: a policy, or several that act one after the other.
        seed: same seed, policies, catalogue and contents: same faults, here and in a checkpoint file.
        where, record, overwrite: as for `Armed.fire`.

    Returns:
        The record; `undo` takes it back.

    Raises:
        SelectionError, GuardError, LiveError, UsageError: as for `Armed.fire`.

    Example:
        >>> import torch
        >>> from ckptflip.faults import Policy
        >>> from ckptflip.live.torch_tensors import TorchTarget
        >>> model = torch.nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> target = TorchTarget(model)
        >>> record = inject(target, Policy(tensors=("weight",), bits="critical", count=2), seed=7)
        >>> record.bits_effective, int((model.weight != before).sum())
        (2, 2)
        >>> undo(target, record), bool((model.weight == before).all())
        (2, True)
    """
    return Armed(target, policy).fire(seed, where=where, record=record, overwrite=overwrite)


def replay(
    target: LiveTarget, record: Record | str | Path, *, new_record: str | Path | None = None
) -> Record:
    """Invert the bits of a record, of a file or of a running model, in tensors in memory.

    Args:
        target: the tensors.
        record: a record, or its file.
        new_record: write the record of this replay to this file, before the first word is altered.

    Returns:
        The record of this replay; `header.replay_of` names the original.

    Raises:
        RecordError: the record is damaged, or its tensors are not in the target in that shape and dtype.
        LiveError, UsageError: as for `Armed.fire`.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    tensors = target.tensors
    plan = _located(original, target, tensors)
    current = read_all(cast(Any, target), plan)
    plan = replace(plan, before=current, after=current ^ plan.before ^ plan.after)
    name = original.path and Path(original.path).name
    made = _record(
        target, tensors, plan, "", sum(t.nbytes for t in tensors), replay_of=name or "a record in memory"
    )
    return carry_out(target, plan, made, new_record, overwrite=False)


def undo(target: LiveTarget, record: Record | str | Path) -> int:
    """Give every recorded word its value back.

    Args:
        target: the tensors.
        record: what was done to them, or the record's file.

    Returns:
        Words that were restored; those that had their value back already are not counted.

    Raises:
        RecordError: a word is neither what the record says it was, nor what it became: training has gone on
            since, or the record belongs to another model. Nothing is altered.
    """
    original = record if isinstance(record, Record) else record_files.read(record)
    tensors = target.tensors
    plan = _located(original, target, tensors)
    current = read_all(cast(Any, target), plan)
    foreign = neither(current, plan)
    if foreign.any():
        raise RecordError(_refusal(tensors, plan, current, foreign))
    return _xor(target, replace(plan, before=current, after=plan.before))


def check(policy: Policy | Sequence[Policy], tensors: Sequence[Tensor]) -> None:
    """Raise SelectionError unless each policy can be drawn from a catalogue; no word is read.

    Args:
        policy: one or several.
        tensors: the catalogue.
    """
    for position, one in enumerate(combine(policy)):
        units = Population(one, tensors, _unread, position).units
        if one.count is not None and one.count > units:
            raise SelectionError(
                f"count {one.count} is larger than the {units} units that may be hit; ask for fewer or widen "
                "the selection"
            )


def carry_out(
    target: LiveTarget, plan: Plan, record: Record, path: str | Path | None, overwrite: bool
) -> Record:
    """Write the record, if it has a path, then alter the words, then see that they are altered.

    Args:
        target: the tensors.
        plan: the faults, by positions in the target's catalogue.
        record: of these faults.
        path: where the record goes, or None.
        overwrite: whether that file may exist.

    Returns:
        The record, with its path.

    Raises:
        UsageError: the record's file exists. Nothing was altered.
        LiveError: a word is not what it should have become.
    """
    if path is not None:
        path = Path(path)
        if path.exists() and not overwrite:
            raise UsageError(f"the record {path} exists; name another file or folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        record_files.write(record, path, overwrite=True)
        record = replace(record, path=str(path))
    _xor(target, plan)
    current = read_all(cast(Any, target), plan)
    missed = np.flatnonzero(current != plan.after)
    if missed.size:
        raise LiveError(_missed(record, plan, current, missed))
    return record


def _xor(target: LiveTarget, plan: Plan) -> int:
    """Make the words of a plan what they are after it; how many had to change."""
    effective = plan.take(plan.before != plan.after)
    masks = effective.before ^ effective.after
    for tensor, rows in effective.by_tensor():
        target.xor(tensor, effective.word[rows], masks[rows])
    return len(effective)


def _record(
    target: LiveTarget,
    tensors: Sequence[Tensor],
    plan: Plan,
    where: str,
    size: int,
    *,
    seed: int | None = None,
    policies: tuple[Policy, ...] = (),
    replay_of: str | None = None,
) -> Record:
    entries, renumbered = entries_of(plan, tensors)
    header = Header(
        ckptflip=__version__,
        schema=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint="",
        output=where,
        format=target.format,
        checksum="leave",
        seed=seed,
        policies=policies,
        replay_of=replay_of,
        size=size,
        counts=counts_of(plan),
        tensors=entries,
        versions=_versions(),
    )
    return Record(header, renumbered)


def _versions() -> dict[str, str]:
    """Of Python and of the libraries that are loaded."""
    found = {"python": sys.version.split()[0]}
    for name in _LIBRARIES:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


class _Place(msgspec.Struct, frozen=True):
    """What `ckptflip.matching` asks of a checkpoint."""

    path: str
    tensors: Sequence[Tensor]


def _located(record: Record, target: LiveTarget, tensors: Sequence[Tensor]) -> Plan:
    """The record's plan with positions in the catalogue."""
    return on_target(record, cast(Any, _Place(f"the running model ({target.format})", tensors)))


def _unread(tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
    raise AssertionError("counting what may be hit reads no word")


def _named(tensors: Sequence[Tensor], plan: Plan, row: int) -> str:
    tensor = tensors[plan.tensor[row]]
    return f"{tensor.name}, element {int(plan.word[row]) // tensor.number.parts}"


def _refusal(
    tensors: Sequence[Tensor], plan: Plan, current: NDArray[np.uint64], foreign: NDArray[np.bool_]
) -> str:
    first = int(np.flatnonzero(foreign)[0])
    now, before, after = (int(words[first]) for words in (current, plan.before, plan.after))
    return (
        f"{int(foreign.sum())} of {len(plan)} words in the running model are neither what the record says "
        f"they were nor what they became; the first is {_named(tensors, plan, first)}: {now:#x}, recorded "
        f"{before:#x} → {after:#x}. Training has gone on since, or the record belongs to another model: go "
        "back to a checkpoint from before the injection. Nothing was altered"
    )


def _missed(record: Record, plan: Plan, current: NDArray[np.uint64], missed: NDArray[np.int64]) -> str:
    first = int(missed[0])
    entry = record.header.tensors[record.plan.tensor[first]]
    element = int(plan.word[first]) // entry.number.parts
    now, after = int(current[first]), int(plan.after[first])
    return (
        f"{missed.size} of {len(plan)} faults did not take effect; the first is {entry.name}, "
        f"element {element}: {now:#x} instead of {after:#x}. Something else writes to this memory, or the "
        "framework keeps the tensor elsewhere; leave it out with a '!name' in the policy's tensors"
    )
