"""When a backward pass of a PyTorch model is over: the moment at which its gradients can be hit as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class BackwardPasses:
    """Counts the backward passes that reach a model's parameters.

    Args:
        model: without what wraps it.
        done: called at the end of each, with its number from 0, when all gradients are there.

    Attributes:
        passes: so far.
    """

    def __init__(self, model: torch.nn.Module, done: Callable[[int], None]) -> None:
        self._model, self._done = model, done
        self._handles: list[Any] = []
        self._task = -1
        self.passes = 0

    def attach(self) -> None:
        """Put a hook on every parameter that has a gradient."""
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._reached))

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _reached(self, parameter: torch.Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task and self._handles:
            self._task = task
            # What DistributedDataParallel uses to the same end; there is no public way.
            torch.autograd.Variable._execution_engine.queue_callback(self._over)

    def _over(self) -> None:
        if self._handles:
            self.passes += 1
            self._done(self.passes - 1)
