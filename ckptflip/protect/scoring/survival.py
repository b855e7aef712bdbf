"""Contenders that go on with a faulty model: clipping of what layers give, correction of chosen bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckptflip.protect import clipping
from ckptflip.protect.bits import Guard, guard
from ckptflip.protect.scoring.contender import Run, Verdict


class Clipping:
    """Activation clipping.

    Args:
        name: what it is called.
        about: what it is.
        rule: of `clipping.calibrate`, or ``fixed:LIMIT`` for the published one.
        options: of `clipping.calibrate` or `clipping.fixed`.
    """

    def __init__(self, name: str, about: str, rule: str, **options: Any) -> None:
        self.name, self.about, self._rule, self._options = name, about, rule, options

    def prepare(
        self, model: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]
    ) -> clipping.Bounds | None:
        """Bounds from the clean model; none where it has no layer for them."""
        kind, _, limit = self._rule.partition(":")
        if kind == "fixed":
            return clipping.fixed(model, float(limit), **self._options)
        return clipping.calibrate(model, batches, rule=self._rule, **self._options)

    def face(self, model: torch.nn.Module, prepared: clipping.Bounds, run: Run) -> Verdict:
        """Run the model with its layers clipped."""
        with clipping.clipped(model, prepared) as clipped:
            outputs = run()
        return Verdict(outputs=outputs, counts={"clipped": float(clipped.values)})


class Bits:
    """Selective bit protection: chosen bits of all weights are checked and put right before the model runs.

    It noticed a fault where a check did not hold. The checks themselves are never hit here.

    Args:
        name: what it is called.
        about: what it is.
        bits: which bits of each word.
        code: of `ckptflip.protect.bits.CODES`.
    """

    def __init__(self, name: str, about: str, bits: str, code: str) -> None:
        self.name, self.about, self._bits, self._code = name, about, bits, code

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> tuple[Guard, Any]:
        """A guard over the weights, and the checks of the clean ones."""
        made = guard(model, self._bits, self._code)
        return made, made.checks()

    def face(self, model: torch.nn.Module, prepared: tuple[Guard, Any], run: Run) -> Verdict:
        """Scrub the weights, and run the model."""
        guarded, checks = prepared
        # A scrub of another trial's flips may have taken them for flips of the checks.
        guarded.restore(checks)
        # Loading a checkpoint writes the weights on purpose, as far as PyTorch can tell.
        scrub = guarded.scrub(force=True)
        counts = {
            "corrected": float(scrub.corrected),
            "uncorrectable": float(scrub.uncorrectable),
            "memory": guarded.cost.share,
        }
        outputs = None if self._code == "parity" else run()
        return Verdict(found=not scrub.clean, outputs=outputs, counts=counts)
