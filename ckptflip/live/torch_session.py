"""What `ckptflip.live.faults` hooks onto a PyTorch model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.live.calls import Due, seed_of
from ckptflip.live.held import Held
from ckptflip.live.keeping import Kept
from ckptflip.live.part import Count
from ckptflip.live.session import globs, narrowed
from ckptflip.live.target import check
from ckptflip.live.torch_calls import TorchCalls, is_meant
from ckptflip.live.torch_gradients import BackwardPasses
from ckptflip.live.torch_modules import blinders, choose, shares, whole
from ckptflip.live.torch_tensors import TorchTarget, unwrapped


class Calls:
    """Faults in calls of the model; a `ckptflip.live.part.Part`.

    Args:
        model: as the user has it, wrapped or not.
        asked: ``activations``, ``module_inputs``, ``inputs``, of which those that are to be hit.
        due: which calls are hit.
        kept: the records.
        held: the state, where it is hit in calls.
        clamp: what becomes of ids beyond a table.

    Raises:
        UsageError, SelectionError: as for `ckptflip.live.faults`.
    """

    def __init__(
        self, model: Any, asked: dict[str, Any], due: Due, kept: Kept, held: Held | None, *, clamp: bool
    ) -> None:
        if shares(model):
            raise UsageError(
                "torch.nn.DataParallel calls copies of the model in several threads at once, so that no run "
                "would equal another: pass model.module and call that, or use DistributedDataParallel"
            )
        plain = unwrapped(model)
        self._model, self._held, self._seed = model, held, kept.seed
        self._hooks = TorchCalls(
            plain,
            kept.policies,
            kept.seed,
            due,
            outputs=choose(plain, asked["activations"], "activations") if "activations" in asked else (),
            entries=choose(plain, asked["module_inputs"], "module_inputs")
            if "module_inputs" in asked
            else (),
            inputs=globs(asked.get("inputs"), "inputs"),
            clamp=clamp,
            state=None if held is None else self._hit_state,
            done=lambda call, passed: kept.add_call(f"call {call:06d}", passed),
        )

    @property
    def calls(self) -> int:
        return self._hooks.calls

    @property
    def clamped(self) -> int:
        return self._hooks.clamped

    def counts(self) -> Iterator[Count]:
        if self._held is not None:
            yield self._held.count()
        for site in self._hooks.sites:
            yield Count(site.name, site.called, site.fired, site.hit, site.effective)

    def begin(self) -> None:
        self._hooks.attach()

    def end(self) -> list[str]:
        try:
            self._hooks.detach()
        finally:
            said = [] if self._held is None else self._held.restore()
        return said

    def doubts(self) -> list[str]:
        """What may keep faults from firing."""
        return [
            f"{one}, and such code skips hooks: faults in its calls may never fire. Call the plain model "
            "(model._orig_mod, if it is compiled), or run the block under "
            "torch.compiler.set_stance('force_eager')"
            for one in blinders(self._model)
        ]

    def silences(self) -> list[str]:
        """What did not fire, and why."""
        hooks = self._hooks
        if not hooks.calls:
            return [
                "no fault fired: the model was never called in the block. Call it as model(x), not by "
                "model.forward(x) or by its parts; compiled and scripted code skips the hooks"
            ]
        if not hooks.due_calls:
            return [f"no fault fired: none of the {hooks.calls} calls of the model was due (calls=, every=)"]
        said = []
        missed = [site.name for site in hooks.sites if not site.called]
        if missed:
            said.append(
                f"{len(missed)} of {len(hooks.sites)} places were never passed, so nothing fired there: "
                f"{whole(missed)}. The model does not call these modules, or calls their forward past the "
                "hooks, or they are compiled"
            )
        bare = [site.name for site in hooks.sites if site.called and site.idle == site.called]
        if bare:
            said.append(f"nothing that passed {whole(bare)} holds an element that could be hit")
        return said

    def _hit_state(self, call: int) -> None:
        assert self._held is not None
        self._held.fire(seed_of(self._seed, call, "state"), f"call {call:06d} state")


class Gradients:
    """Faults in gradients at the end of backward passes; a `ckptflip.live.part.Part`.

    Args:
        model: as the user has it, wrapped or not.
        chosen: globs on the names of parameters.
        due: which backward passes are hit.
        kept: the records.

    Raises:
        UsageError, SelectionError: as for `ckptflip.live.faults`.
    """

    calls = clamped = 0

    def __init__(self, model: Any, chosen: tuple[str, ...], due: Due, kept: Kept) -> None:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise UsageError(
                "DistributedDataParallel averages gradients while the backward pass goes on, so that faults "
                "would come before or after it by chance: use ckptflip.callbacks.Injector, which hits them "
                "before the optimizer's step"
            )
        plain = unwrapped(model)
        if not any(parameter.requires_grad for parameter in plain.parameters()):
            raise UsageError("gradients are to be hit, and no parameter of the model has requires_grad")
        self._due, self._spent, self._kept = due, False, kept
        self._target = TorchTarget(plain, gradients=True)
        self._policies = narrowed(kept.policies, "gradients/", chosen)
        # What could not be drawn when the gradients are there is refused now.
        check(self._policies, self._target.foreseen()[0])
        self._held: Held | None = None
        self._globs, self._left_out = chosen, dict[str, str]()
        self._passes = BackwardPasses(plain, self._over)

    def counts(self) -> Iterator[Count]:
        yield self._held.count() if self._held else Count("gradients", 0, 0, 0, 0)

    def begin(self) -> None:
        self._passes.attach()

    def end(self) -> list[str]:
        self._passes.detach()
        if self._held is not None:
            # Gradients that were used up since, or are summed further, are no longer those that were hit.
            self._held.restore()
        return []

    def doubts(self) -> list[str]:
        return []

    def silences(self) -> list[str]:
        passes = self._passes.passes
        if not passes:
            return [
                "no fault fired in gradients: no backward pass reached a parameter of the model in the block"
            ]
        if self._held is None:
            return [f"no fault fired in gradients: none of {passes} backward passes was due (calls=, every=)"]
        if not self._left_out:
            return []
        named = [f"of {name}, which is {why}" for name, why in self._left_out.items()]
        return [f"gradients that cannot be hit were left out: {whole(named)}"]

    def _over(self, number: int) -> None:
        if self._spent or not self._due(number):
            return
        self._spent = self._due.once
        if self._held is None:
            self._held = Held("gradients", self._target, self._policies, self._kept)
        self._held.fire(seed_of(self._kept.seed, number, "gradients"), f"backward {number:06d}")
        for one in self._target.skipped:
            name = one.name.removeprefix("gradients/")
            if name != one.name and is_meant(name, self._globs):
                self._left_out[name] = one.reason
