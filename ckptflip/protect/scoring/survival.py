"""Contenders that go on with a faulty model: clipping of what layers give, correction of chosen bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ckptflip.protect import clipping
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
