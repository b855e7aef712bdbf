"""Faults in tensors that stay where they are: parameters, buffers, optimizer state, gradients."""

from __future__ import annotations

from collections.abc import Callable

from ckptflip.errors import LiveError, RecordError
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import Record
from ckptflip.live.carrying import carry_out, restore
from ckptflip.live.keeping import Kept
from ckptflip.live.part import Count
from ckptflip.live.protocol import LiveTarget
from ckptflip.live.target import Armed


class Held:
    """Faults that are put in, and given back before the next ones or at the end.

    Args:
        name: for counts: ``state`` or ``gradients``.
        target: the tensors.
        policies: what is drawn.
        kept: the records.
        changed: called when words have been altered.

    Raises:
        SelectionError: nothing may be hit, or less than is asked for.
    """

    def __init__(
        self,
        name: str,
        target: LiveTarget,
        policies: tuple[Policy, ...],
        kept: Kept,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._target, self._kept, self._changed = target, kept, changed
        self._armed = Armed(target, policies)
        self._in_force: Record | None = None
        self._lost = 0
        self._drawn = self._fired = self._hit = self._effective = 0

    def fire(self, seed: int, where: str) -> None:
        """Restore what was hit before, then draw and hit.

        Args:
            seed: of the draw.
            where: kept in the record.

        Raises:
            CkptflipError: as for `ckptflip.live.Armed.fire`.
        """
        self._give_back()
        self._drawn += 1
        plan, record = self._armed.prepare(seed, where)
        if not len(plan):
            return
        # Known before the first word is altered, so that whatever happens next, it can be given back.
        self._in_force = record
        done = carry_out(self._target, self._armed.catalogue, plan, record, self._kept.path(where), False)
        self._in_force = done
        self._kept.add(done)
        self._fired += 1
        self._hit += done.bits_hit
        self._effective += done.bits_effective
        self._changed()

    def restore(self) -> list[str]:
        """Give every word its value back; what to warn of."""
        try:
            self._give_back()
        except (RecordError, LiveError) as why:
            return [f"the faults in the {self.name} could not be undone: {why}"]
        if not self._lost:
            return []
        return [
            f"{self._lost} words of the {self.name} that were hit have been changed by something else since, "
            "such as training, and stay as they are; all others have their value back"
        ]

    def count(self) -> Count:
        """What happened so far."""
        return Count(self.name, self._drawn, self._fired, self._hit, self._effective)

    def _give_back(self) -> None:
        record, self._in_force = self._in_force, None
        if record is not None:
            self._lost += restore(self._target, record)[1]
            self._changed()
