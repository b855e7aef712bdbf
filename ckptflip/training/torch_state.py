"""The state of a PyTorch run as one dict, and taking it up again with checks that name what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ckptflip.errors import CheckpointError, WorkloadError
from ckptflip.training.settings import set_random_state


@dataclass(slots=True)
class Run:
    """Everything of one run that changes while it trains."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    rng: dict[str, torch.Tensor]
    seed: int
    epoch: int = 0


def capture(run: Run, name: str) -> dict[str, Any]:
    """Collect the state of a run under the keys of a checkpoint; tensors are shared with the run."""
    state = {
        "workload": name,
        "epoch": run.epoch,
        "seed": run.seed,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "rng": run.rng,
    }
    if buffers := _unsaved_buffers(run.model):
        state["buffers"] = buffers
    if run.scheduler is not None:
        state["scheduler"] = run.scheduler.state_dict()
    if run.scaler is not None:
        state["scaler"] = run.scaler.state_dict()
    return state


def identify(state: Any, name: str, path: str) -> tuple[int, int]:
    """Check that a state belongs to this workload.

    Returns:
        Its seed and its epoch.
    """
    needed = {"workload", "epoch", "seed", "model", "optimizer", "rng"}
    missing = needed - set(state) if isinstance(state, dict) else needed
    if missing:
        raise WorkloadError(f"{path} is no checkpoint of a workload: it lacks {', '.join(sorted(missing))}")
    if state["workload"] != name:
        raise WorkloadError(f"{path} belongs to the workload {state['workload']!r}, not to {name!r}")
    seed, epoch = state["seed"], state["epoch"]
    if not all(type(value) is int and value >= 0 for value in (seed, epoch)):
        raise CheckpointError(f"{path} is damaged: seed {seed!r} and epoch {epoch!r} are not counts")
    return seed, epoch


def take_up(run: Run, state: dict[str, Any], path: str, device: torch.device) -> None:
    """Load a captured state into a freshly built run; call it where random states may be altered."""
    _check_model(run.model.state_dict(), state["model"], path)
    _check_optimizer(run.optimizer.state_dict()["param_groups"], state["optimizer"], path)
    targets = {
        "model": run.model,
        "optimizer": run.optimizer,
        "scheduler": run.scheduler,
        "scaler": run.scaler,
    }
    for part, target in targets.items():
        if (target is None) != (part not in state):
            has, lacks = ("the workload", path) if target is not None else (path, "the workload")
            raise WorkloadError(f"{has} has a {part}, {lacks} has none")
        if target is None:
            continue
        try:
            target.load_state_dict(state[part])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkloadError(f"{path}: the {part} does not fit the workload: {error}") from error
    _take_buffers(run.model, state.get("buffers", {}), path)
    try:
        set_random_state(state["rng"], device)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: the state of the random generators is damaged: {error}") from error


def _unsaved_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that the state dict leaves out (``persistent=False``), although training may change them."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _take_buffers(model: torch.nn.Module, found: Any, path: str) -> None:
    buffers = _unsaved_buffers(model)
    if not isinstance(found, dict) or found.keys() != buffers.keys():
        raise WorkloadError(f"{path}: its buffers {sorted(found)} are not the model's {sorted(buffers)}")
    for name, buffer in buffers.items():
        if _form(found[name]) != _form(buffer):
            raise WorkloadError(
                f"{path}: the buffer {name} is {_form(found[name])}, the model has {_form(buffer)}"
            )
        with torch.no_grad():
            buffer.copy_(found[name])


def _check_model(expected: dict[str, Any], found: Any, path: str) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its model is a {type(found).__name__}")
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is unknown to the model" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        ours, theirs = _form(expected[name]), _form(found[name])
        if ours != theirs:
            differences.append(f"{name} is {theirs}, the model has {ours}")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        listed = "; ".join(sorted(differences)[:3])
        raise WorkloadError(f"{path} holds a model of another architecture: {listed}{more}")


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _check_optimizer(expected: list[dict[str, Any]], found: Any, path: str) -> None:
    """Compare the settings' names, since PyTorch takes up another optimizer's state without a word."""
    groups = found.get("param_groups") if isinstance(found, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{path} is damaged: its optimizer has no list of parameter groups")
    for ours, theirs in zip(expected, groups, strict=False):
        # A scheduler adds the first learning rate; the other settings are the optimizer's own.
        if different := (ours.keys() ^ theirs.keys()) - {"initial_lr", "param_names"}:
            raise WorkloadError(
                f"{path} holds the state of another optimizer: {', '.join(sorted(different))} differ"
            )
