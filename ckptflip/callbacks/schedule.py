"""When a training run is hit: epochs, steps, every N steps, with a probability, once. Knows no framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from ckptflip import record_files
from ckptflip.callbacks.spans import NEVER, When, holds_multiple, spans, within
from ckptflip.errors import RecordError, SelectionError, UsageError
from ckptflip.faults import policy as policies_module
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.policy import Policy, combine
from ckptflip.faults.record import Record
from ckptflip.faults.stream import check_seed, philox
from ckptflip.live.target import Armed, LiveTarget, check

STATE = 1
# The last word of the counter: a `Stream` has 0 there, so no draw of a policy shares its numbers.
_DOMAIN = 0x5C4ED01E
_BLOCK = 4096


class Fired(Struct, frozen=True):
    """One firing of a schedule.

    Attributes:
        epoch: epochs that were complete then; None where the loop has no epochs.
        step: optimizer steps that were complete before the one that was hit.
        record: the name of its record.
    """

    epoch: int | None
    step: int
    record: str


class InjectionSchedule:
    """What hits a training run, and when. The same for every framework.

    Steps are optimizer steps, counted from 0 over the whole run; epochs are counted from 0. All conditions
    that are given must hold. Without `steps`, `every` and `probability`, each of the `epochs` is hit once, at
    its first step. Whether a step is hit, and what is hit there, follows from `seed` and the step alone: not
    from what fired before, nor from any other source of random numbers.

    Args:
        policy: what is hit, how much and how: a policy, several that act one after the other, or a TOML file.
        seed: 0 … 2^64-1.
        epochs: such as ``3``, ``[3, 5]``, ``"3-5"``, ``"3,7-9"`` or ``"10-"`` (from 10 on).
        steps: likewise.
        every: the N-th, 2N-th, … step, counted from 1.
        probability: of each step that the other conditions allow, drawn independently.
        once: only the first time.
        ranks: of a distributed run, such as ``1`` or ``"0,2-3"``; None: all of them, with the same faults.

    Raises:
        UsageError: a schedule that can never fire, or that does not say when; arguments that make no sense.

    Example:
        >>> schedule = InjectionSchedule(Policy(bits="exponent"), seed=1, steps="100-", every=50)
        >>> [step for step in range(300) if schedule.fires(0, step)]
        [149, 199, 249, 299]
        >>> InjectionSchedule(Policy(), seed=1, steps="0-48", probability=0)
        Traceback (most recent call last):
        ckptflip.errors.UsageError: the schedule can never fire: its probability is 0
    """

    def __init__(
        self,
        policy: Policy | Sequence[Policy] | str | Path,
        *,
        seed: int,
        epochs: When | None = None,
        steps: When | None = None,
        every: int | None = None,
        probability: float | None = None,
        once: bool = False,
        ranks: When | None = None,
    ) -> None:
        if isinstance(seed, np.integer):
            seed = int(seed)
        check_seed(seed)
        self.policies = policies_module.load(policy)[0] if isinstance(policy, str | Path) else combine(policy)
        self.seed, self.every, self.probability, self.once = seed, every, probability, bool(once)
        self._epochs = None if epochs is None else spans(epochs, "epochs")
        self._steps = None if steps is None else spans(steps, "steps")
        self._ranks = None if ranks is None else spans(ranks, "ranks")
        self._check(steps)
        self.fired: list[Fired] = []
        self._times: set[int] = set()
        self._drawn: dict[int, list[bool]] = {}
        self._armed: Armed | None = None

    @property
    def by_epoch(self) -> bool:
        """Whether the loop has to say which epoch it is in."""
        return self._epochs is not None

    def fires(self, epoch: int | None, step: int) -> bool:
        """Whether the conditions hold at a step; what has fired before does not matter here.

        Args:
            epoch: the epoch, from 0; may be None unless `by_epoch`.
            step: the step, from 0 over the whole run.
        """
        if self._steps is not None and not within(self._steps, step):
            return False
        if self.every is not None and (step + 1) % self.every:
            return False
        if self._epochs is not None and not within(self._epochs, _told(epoch)):
            return False
        return self.probability is None or self._drawn_at(step)

    def due(self, epoch: int | None, step: int) -> bool:
        """Whether a step is to be hit now: the conditions hold, and it has not been hit before.

        Args:
            epoch, step: as for `fires`.
        """
        if not self.fires(epoch, step):
            return False
        if not self.fired:
            return True
        if self.once or step in self._times:
            return False
        # Epochs alone: one firing in each.
        each = self._steps is not None or self.every is not None or self.probability is not None
        return each or all(one.epoch != epoch for one in self.fired)

    def fire(
        self,
        target: LiveTarget,
        *,
        epoch: int | None = None,
        step: int,
        records: str | Path | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> Record | None:
        """Hit the target, if this step is due. Call it once in every step, on every rank.

        Args:
            target: the tensors in memory.
            epoch: the epoch, from 0.
            step: the step, from 0 over the whole run.
            records: a folder; the record is written there before the first word is altered.
            rank: of this process in a distributed run.
            world: how many processes there are.

        Returns:
            The record; None where nothing is due, or this rank is not one of those to be hit.

        Raises:
            CkptflipError: what `ckptflip.live.Armed.fire` raises.

        Example:
            >>> import torch
            >>> from ckptflip.live.torch_tensors import TorchTarget
            >>> target = TorchTarget(torch.nn.Linear(4, 2))
            >>> schedule = InjectionSchedule(Policy(count=3), seed=1, steps=[1])
            >>> [made and len(made) for made in (schedule.fire(target, step=s) for s in range(3))]
            [None, 3, None]
            >>> schedule.fired
            [Fired(epoch=None, step=1, record='step_000001.flips.jsonl')]
        """
        if not self.due(epoch, step):
            return None
        name = f"step_{step:06d}{f'_rank{rank}' if world > 1 else ''}.flips.jsonl"
        made = None
        if self.hits(rank):
            if self._armed is None or self._armed.target is not target:
                self._armed = Armed(target, self.policies)
            where = f"epoch {epoch}, step {step}" if epoch is not None else f"step {step}"
            path = None if records is None else Path(records) / name
            made = self._armed.fire(
                self.seed_at(step), where=where, record=path, overwrite=self._is_same(path, step)
            )
        # Noted on every rank, for any of them may write the checkpoint that all resume from.
        self.fired.append(Fired(epoch, step, f"step_{step:06d}.flips.jsonl"))
        self._times.add(step)
        return made

    def hits(self, rank: int) -> bool:
        """Whether a rank of a distributed run is one of those to be hit."""
        return self._ranks is None or within(self._ranks, rank)

    def seed_at(self, step: int) -> int:
        """The seed of the faults at a step; `ckptflip.inject` with it hits the same words of a checkpoint."""
        words = self._words(np.array([step], np.uint64))
        return int(words[0][0]) | int(words[1][0]) << 32

    def check(self, tensors: Sequence[Tensor], *, certain: bool = True, world: int | None = None) -> None:
        """Refuse, before training starts, what could not be drawn when the time comes.

        Args:
            tensors: the catalogue as it will be.
            certain: whether it is complete; where it is not, policies on optimizer state are let pass.
            world: how many ranks there are, where that is known.

        Raises:
            SelectionError: a policy matches nothing, or asks for more than there is.
            UsageError: none of the ranks to be hit exists.
        """
        ends = [end for span in self._ranks or () for end in span]
        absent = [end for end in ends if world is not None and world <= end < NEVER]
        if absent:
            raise UsageError(
                f"the schedule hits rank {absent[0]}, and there is none: the run has {world} "
                f"process{'es' * (world != 1)}, numbered from 0"
            )
        for policy in self.policies:
            try:
                check(policy, tensors)
            except SelectionError:
                if certain or not _on_state(policy):
                    raise

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that a resumed run does not inject twice: plain values."""
        return {
            "ckptflip": STATE,
            "seed": self.seed,
            "schedule": self._text(),
            "fired": [msgspec.structs.asdict(one) for one in self.fired],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            UsageError: the state is that of another schedule, or none at all.
        """
        if not isinstance(state, Mapping) or state.get("ckptflip") != STATE:
            raise UsageError("this is no state of an injection schedule: pass what state_dict() returned")
        for part, ours in (("seed", self.seed), ("schedule", self._text())):
            if state.get(part) != ours:
                raise UsageError(
                    f"the injection schedule differs in its {part} from the checkpoint's: {ours!r} here, "
                    f"{state.get(part)!r} there. Resume with the schedule that the run was started with"
                )
        try:
            self.fired = msgspec.convert(state.get("fired"), list[Fired])
        except msgspec.ValidationError as why:
            raise UsageError(f"the checkpoint's injection schedule is damaged: fired {why}") from None
        self._times = {one.step for one in self.fired}

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a schedule that is sent to another process, must not take the model along.
        return {**self.__dict__, "_armed": None}

    def _text(self) -> str:
        """Everything that decides what fires when, in a line of JSON."""
        parts = {
            "policies": self.policies,
            "epochs": self._epochs,
            "steps": self._steps,
            "every": self.every,
            "probability": self.probability,
            "once": self.once,
            "ranks": self._ranks,
        }
        return msgspec.json.encode({k: v for k, v in parts.items() if v not in (None, False)}).decode()

    def _check(self, steps: When | None) -> None:
        every, probability = self.every, self.probability
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise UsageError(f"every must be a whole number of steps, 1 or more, not {every!r}")
        if probability is not None:
            number = isinstance(probability, int | float) and not isinstance(probability, bool)
            if not number or not 0 <= probability <= 1:
                raise UsageError(f"probability must be above 0 and at most 1, not {probability!r}")
            if probability == 0:
                raise UsageError("the schedule can never fire: its probability is 0")
        if self._steps is None and self._epochs is None and not (every or probability or self.once):
            raise UsageError(
                "the schedule does not say when: give epochs, steps, every or probability (once=True alone "
                "hits the first step; every=1 hits each)"
            )
        if every is not None and not any(holds_multiple(r, every) for r in self._steps or [(0, NEVER)]):
            raise UsageError(
                f"the schedule can never fire: no step of {steps!r} is the last of {every}; every={every} "
                f"means the steps {every - 1}, {2 * every - 1}, …, counted from 0"
            )

    def _drawn_at(self, step: int) -> bool:
        block, inside = divmod(step, _BLOCK)
        drawn = self._drawn.get(block)
        if drawn is None:
            assert self.probability is not None
            _, _, low, high = self._words(np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64))
            uniform = (low | high << np.uint64(32)).astype(np.float64) * 2.0**-64
            # A probability of 1 hits every step, also one whose number is rounded to 1.
            hit = (uniform < self.probability) | (self.probability >= 1)
            drawn = hit.tolist()
            self._drawn = {block: drawn}
        return drawn[inside]

    def _words(self, steps: Any) -> Any:
        """Four random 32-bit words for each step, from the seed."""
        low, high = steps & np.uint64(0xFFFFFFFF), steps >> np.uint64(32)
        zero = np.zeros_like(steps)
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        return philox((low, high, zero, zero + np.uint64(_DOMAIN)), key)

    def _is_same(self, path: Path | None, step: int) -> bool:
        """Whether a record that stands at this path is of this very firing, before the run was resumed."""
        if path is None or not path.exists():
            return False
        try:
            header = record_files.read(path).header
        except RecordError:
            return False
        return header.seed == self.seed_at(step) and header.policies == self.policies


def _told(epoch: int | None) -> int:
    if epoch is None:
        raise UsageError(
            "the schedule names epochs, and the loop does not say which one it is in: pass epoch"
        )
    return epoch


def _on_state(policy: Policy) -> bool:
    """Whether a policy may mean tensors that an optimizer makes only later."""
    named = any(glob.startswith(("optimizer", "*")) for glob in policy.tensors)
    return named or bool({"optimizer", "counter", "state"}.intersection(policy.roles))
