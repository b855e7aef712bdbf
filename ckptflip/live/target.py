"""The verbs that alter tensors in memory: fire, inject, replay; `carrying` has undo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip import record_files
from ckptflip.errors import SelectionError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.draw import Population
from ckptflip.faults.plan import Plan, draw
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import Record
from ckptflip.faults.stream import check_seed
from ckptflip.live.carrying import carry_out, located, record_of, undo
from ckptflip.live.protocol import LiveTarget
from ckptflip.matching import read_all

__all__ = ["Armed", "LiveTarget", "check", "inject", "replay", "undo"]


class Armed:
    """Policies ready to be fired at a target: what does not depend on the seed is worked out once.

    Args:
        target: the tensors in memory.
        policy: a policy, or several that act one after the other.

    Attributes:
        catalogue: the tensors as of the last draw.

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
        self.catalogue: Sequence[Tensor] = ()
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
        plan, made = self.prepare(seed, where)
        return carry_out(self.target, self.catalogue, plan, made, record, overwrite)

    def prepare(self, seed: int, where: str = "") -> tuple[Plan, Record]:
        """The faults that `fire` would put in, and their record; the tensors are left alone.

        Args:
            seed, where: as for `fire`.

        Raises:
            SelectionError, GuardError, LiveError, UsageError: as for `fire`.
        """
        plan = self.draw(seed)
        made = record_of(
            self.target.format, self.catalogue, plan, where, self._size, seed=seed, policies=self.policies
        )
        return plan, made

    def draw(self, seed: int) -> Plan:
        """Draw faults and leave the tensors alone: what `fire` would put into them.

        Args:
            seed: as for `fire`.

        Raises:
            SelectionError, GuardError: as for `fire`.
        """
        check_seed(seed)
        catalogue = self._refresh()
        if self._population is not None:
            return self._population.draw(seed)
        return draw(self.policies, catalogue, self.target.read, seed)

    @property
    def lone(self) -> bool:
        """Whether every draw is one flip; see `ckptflip.faults.draw.Population.lone`."""
        return self._population is not None and self._population.lone

    def one(self, seed: int) -> tuple[int, int, int]:
        """The flip that `draw` gives where a draw is a `lone` one: tensor, word, mask. Nothing is read."""
        assert self._population is not None
        return self._population.one(seed)

    def _refresh(self) -> Sequence[Tensor]:
        """Take up the catalogue as it is now."""
        catalogue = self.target.tensors
        if catalogue is not self.catalogue:
            try:
                check(self.policies, catalogue)
            except SelectionError as why:
                raise SelectionError(f"{why}{_left_out(self.target)}") from None
            only = self.policies[0] if len(self.policies) == 1 else None
            # Several policies see each other's faults, and a choice of ranks depends on the seed.
            alone = only is not None and only.ranks is None
            self._population = Population(only, catalogue, self.target.read) if alone and only else None
            self.catalogue = catalogue
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
    plan = located(original, target, tensors)
    current = read_all(cast(Any, target), plan)
    plan = replace(plan, before=current, after=current ^ plan.before ^ plan.after)
    name = original.path and Path(original.path).name
    made = record_of(
        target.format,
        tensors,
        plan,
        "",
        sum(t.nbytes for t in tensors),
        replay_of=name or "a record in memory",
    )
    return carry_out(target, tensors, plan, made, new_record, overwrite=False)


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


def _left_out(target: LiveTarget) -> str:
    """What of a target cannot be hit, and why, for a selection that found nothing."""
    skipped = getattr(target, "skipped", ())
    named = "; ".join(f"{one.name} is {one.reason}" for one in skipped[:3])
    return f". Cannot be hit: {named}{' …' if len(skipped) > 3 else ''}" if skipped else ""


def _unread(tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
    raise AssertionError("counting what may be hit reads no word")
