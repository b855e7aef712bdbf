"""Watches a running training for divergence: stops it, or takes it back to the last good state."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from ckptflip.bits.values import EXTREME
from ckptflip.errors import UsageError

ACTIONS = ("stop", "rollback")
_LOG = logging.getLogger("ckptflip")


class Recoverable(Protocol):
    """A training state that can be looked over, kept and taken up again.

    Attributes:
        suffix: of the file it is kept in.
    """

    suffix: str

    def nev(self, extreme: float) -> Mapping[str, int]:
        """How many weights are ``nan``, ``inf`` or ``extreme`` (``|x| > extreme``)."""
        ...

    def save(self, path: Path) -> None:
        """Write weights and optimizer state, bit for bit."""
        ...

    def load(self, path: Path) -> None:
        """Take them up again, in place."""
        ...


class Event(msgspec.Struct, frozen=True):
    """Something the guard saw, and what it did.

    Attributes:
        step: steps trained when it was seen.
        reason: what was seen, in words.
        action: ``stop`` or ``rollback``.
        value: the loss, where that was the reason and is a number.
        median: the running median of the losses before it, likewise.
        nan, inf, extreme: weights that are, where they were looked over.
        restored: the step of the state that was taken up again; None when training was stopped.
    """

    step: int
    reason: str
    action: str
    value: float | None = None
    median: float | None = None
    nan: int = 0
    inf: int = 0
    extreme: int = 0
    restored: int | None = None


class DivergenceGuard:
    """Stops a training, or takes it back to the last good state, when loss or weights go wrong.

    Wrong is: a loss that is NaN or infinite; a loss above `spike` times the running median; a weight that is
    NaN, infinite or beyond `extreme` (N-EV). The loss is looked at after every step, the weights at the end
    of every epoch and, with `every`, every so many steps.

    A rollback restores weights and optimizer state, in place and bit for bit; steps, data order and random
    generators go on, so that what follows is not the same batch again. The good state is one file in
    `folder`, written where training begins and renewed where the weights were looked over and found good.

    The adapters `KerasGuard`, `LightningGuard`, `TrainerGuard` and `SkorchGuard` call it. A loop of your own
    calls `begin`, then `step` after every step and `look` after every epoch; both say whether to stop.

    Args:
        action: ``stop`` or ``rollback``.
        folder: where the good state is kept; needed to roll back.
        spike: how many times the running median is too much; None: only losses that are not finite are.
        window: losses that the median is taken of.
        warmup: losses that are needed before a spike can be told.
        extreme: weights whose magnitude exceeds this are wrong; None: only NaN and infinities are.
        every: steps from one look at the weights to the next, besides the ends of epochs. None: only these.
        most: rollbacks before the training is stopped after all.
        log: a file that gets one JSON line for each event.

    Attributes:
        events: what was seen and done so far.
        stopped: whether the guard has stopped the training.

    Raises:
        UsageError: settings that make no sense, alone or together.

    Example:
        >>> guard = DivergenceGuard(spike=5, warmup=3)
        >>> [guard.step(step, loss) for step, loss in enumerate([1.0, 0.9, 1.1, 30.0], start=1)]
        [False, False, False, True]
        >>> guard.events[0].reason
        'loss 30 is 30 times the running median 1'
    """

    def __init__(
        self,
        action: str = "stop",
        *,
        folder: str | Path | None = None,
        spike: float | None = 10.0,
        window: int = 50,
        warmup: int = 10,
        extreme: float | None = EXTREME,
        every: int | None = None,
        most: int = 3,
        log: str | Path | None = None,
    ) -> None:
        if action not in ACTIONS:
            raise UsageError(f"action {action!r} is not one of {', '.join(ACTIONS)}")
        if action == "rollback" and folder is None:
            raise UsageError("a rollback needs a good state to return to: pass folder= to keep it in")
        if spike is not None and not spike > 1:
            raise UsageError(f"spike must be above 1, or None, not {spike}")
        if not 1 <= warmup <= window or most < 1 or (every is not None and every < 1):
            raise UsageError(
                f"warmup must be 1 to window, most and every at least 1; these are {warmup}, {window}, "
                f"{most} and {every}"
            )
        self._action, self._spike, self._warmup = action, spike, warmup
        self._folder = Path(folder) if folder is not None else None
        self._log = Path(log) if log is not None else None
        self._extreme = math.inf if extreme is None else extreme
        self._every, self._most = every, most
        self._losses: deque[float] = deque(maxlen=window)
        self._state: Recoverable | None = None
        self._good: int | None = None
        self.events: list[Event] = []
        self.stopped = False

    def begin(self, state: Recoverable, step: int = 0) -> None:
        """Take charge of a training's state, and keep it as the first good one.

        Args:
            state: such as `ckptflip.callbacks.recovery.TorchState`.
            step: steps trained already.

        Raises:
            UsageError: the weights are not good to begin with.
        """
        self._state, self.stopped, self._good = state, False, None
        self._losses.clear()
        self.events.clear()
        if wrong := _nonzero(state.nev(self._extreme)):
            raise UsageError(
                f"the weights hold {wrong} before training begins: load a good checkpoint, or raise extreme="
            )
        self._keep(step)

    def step(self, step: int, loss: float | None) -> bool:
        """Look at the loss of a step; every so many steps, at the weights too.

        Args:
            step: steps trained.
            loss: of this step; None where there is none.

        Returns:
            Whether training must stop.
        """
        if self.stopped:
            return True
        if loss is not None:
            median = statistics.median(self._losses) if self._losses else None
            if reason := self._suspicion(loss, median):
                value = loss if math.isfinite(loss) else None
                return self._act(Event(step, reason, self._action, value=value, median=median))
            self._losses.append(loss)
        return self.look(step) if self._every is not None and step % self._every == 0 else False

    def look(self, step: int, *, keep: bool = True) -> bool:
        """Look at the weights.

        Args:
            step: steps trained.
            keep: whether good ones become the state to return to.

        Returns:
            Whether training must stop.
        """
        if self.stopped or self._state is None:
            return self.stopped
        counts = dict(self._state.nev(self._extreme))
        if wrong := _nonzero(counts):
            return self._act(Event(step, f"the weights hold {wrong}", self._action, **counts))
        if keep:
            self._keep(step)
        return False

    def _suspicion(self, loss: float, median: float | None) -> str:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if self._spike is None or median is None or len(self._losses) < self._warmup or median <= 0:
            return ""
        times = loss / median
        return (
            f"loss {loss:.4g} is {times:.4g} times the running median {median:.4g}"
            if times > self._spike
            else ""
        )

    def _act(self, event: Event) -> bool:
        done = sum(e.action == "rollback" for e in self.events)
        if event.action == "rollback" and (self._state is None or self._good is None):
            event = msgspec.structs.replace(
                event, action="stop", reason=f"{event.reason}; no good state is kept"
            )
        elif event.action == "rollback" and done >= self._most:
            reason = f"{event.reason}; {done} rollbacks did not help"
            event = msgspec.structs.replace(event, action="stop", reason=reason)
        if event.action == "rollback":
            assert self._state is not None
            self._state.load(self._path(self._state))
            event = msgspec.structs.replace(event, restored=self._good)
        self.stopped = event.action == "stop"
        self.events.append(event)
        self._write(event)
        return self.stopped

    def _keep(self, step: int) -> None:
        """Write the present state, which is good, over the one before; a kill leaves one of the two."""
        if self._action != "rollback" or self._state is None:
            return
        path = self._path(self._state)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"new-{path.name}")
        new.unlink(missing_ok=True)
        self._state.save(new)
        new.replace(path)
        self._good = step

    def _path(self, state: Recoverable) -> Path:
        assert self._folder is not None
        return self._folder / f"good{state.suffix}"

    def _write(self, event: Event) -> None:
        did = "training stopped" if event.restored is None else f"back to the state of step {event.restored}"
        _LOG.warning("step %d: %s; %s", event.step, event.reason, did)
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as file:
                file.write(msgspec.json.encode(event) + b"\n")


def _nonzero(counts: Mapping[str, int]) -> str:
    said = {"nan": "NaN", "inf": "infinite", "extreme": "extreme"}
    return ", ".join(f"{counts[kind]} {word} values" for kind, word in said.items() if counts.get(kind))
