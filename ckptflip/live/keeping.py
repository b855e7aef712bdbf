"""The records of a ``with`` block: in memory, or each in a file of its own as soon as it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec.structs import replace

from ckptflip import record_files
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import COLUMNS, KINDS, Plan
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import Record
from ckptflip.live.carrying import record_of


class Passed(Protocol):
    """Faults in tensors that passed.

    Attributes:
        plan: the faults, by positions in `named`.
    """

    @property
    def plan(self) -> Plan: ...

    def named(self) -> Sequence[Tensor]:
        """The catalogue of what passed, with names that no other of the call has."""
        ...


class Kept:
    """Records, in the order in which things were done.

    Args:
        policies: what is drawn.
        seed: of all draws.
        folder: for record files; None: they are kept in memory alone.

    Raises:
        UsageError: the folder is a file, or holds records already.
    """

    def __init__(self, policies: tuple[Policy, ...], seed: int, folder: str | Path | None) -> None:
        self.policies, self.seed = policies, seed
        self._folder = None if folder is None else Path(folder)
        self._kept: list[Record | tuple[str, Sequence[Passed]]] = []
        if self._folder is not None:
            _check(self._folder)

    @property
    def records(self) -> list[Record]:
        """All records so far. Those of calls are made when they are first asked for."""
        for i, one in enumerate(self._kept):
            if not isinstance(one, Record):
                self._kept[i] = self._recorded(*one)
        return [one for one in self._kept if isinstance(one, Record)]

    def path(self, where: str) -> Path | None:
        """The file of a record, by what was hit: ``start``, ``call 000003``."""
        return None if self._folder is None else self._folder / f"{where.replace(' ', '_')}.flips.jsonl"

    def add(self, record: Record) -> None:
        """Keep a record, which is in its file already if it has one."""
        self._kept.append(record)

    def add_call(self, where: str, passed: Sequence[Passed]) -> None:
        """Keep what was done in a call of the model; where there is a folder, its record is written now.

        Args:
            where: ``call 000003``.
            passed: what was hit, in order.
        """
        path = self.path(where)
        if path is None:
            self._kept.append((where, passed))
            return
        made = self._recorded(where, passed)
        record_files.make_folder(path.parent)
        record_files.write(made, path, overwrite=False)
        self._kept.append(replace(made, path=str(path)))

    def _recorded(self, where: str, passed: Sequence[Passed]) -> Record:
        """One record of all that was hit in a call."""
        tensors: list[Tensor] = []
        rows = []
        for one in passed:
            rows.append(replace(one.plan, tensor=one.plan.tensor + np.int32(len(tensors))))
            tensors += one.named()
        columns: list[Any] = [
            np.concatenate([getattr(plan, name) for plan in rows]).astype(kind)
            for name, kind in zip(COLUMNS, KINDS, strict=True)
        ]
        size = sum(tensor.nbytes for tensor in tensors)
        return record_of(
            "pytorch calls", tensors, Plan(*columns), where, size, seed=self.seed, policies=self.policies
        )


def _check(folder: Path) -> None:
    if "\0" in str(folder):
        raise UsageError(f"{str(folder)!r} cannot be the name of a folder for records")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for records")
    there = next(folder.glob("*.flips.jsonl"), None)
    if there is not None:
        raise UsageError(f"{folder} holds records already, such as {there.name}: name another folder")
