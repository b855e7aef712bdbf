"""A whole model protected: every linear layer with the cheapest check for its shape, measured once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.detection import Detections, policy
from ckptflip.protect.evaluation import evaluating
from ckptflip.protect.intensity.calibration import BUCKETS, bucket
from ckptflip.protect.intensity.choice import Choice, cheapest
from ckptflip.protect.intensity.confirming import batch_of, better, builder
from ckptflip.protect.intensity.layer import CheckedLinear
from ckptflip.protect.intensity.roofline import Shape
from ckptflip.protect.intensity.schemes import Scheme, chosen
from ckptflip.protect.intensity.times import Times
from ckptflip.protect.intensity.weights import prepared
from ckptflip.protect.layers import Left, listed, more_than, read_elsewhere


@dataclass(frozen=True, slots=True)
class Protected:
    """A protected model and how its checks were chosen.

    Attributes:
        model: call it like the one it was made from.
        choices: one for each layer and batch that was measured.
        left: linear layers that are not checked, with reasons.
    """

    model: torch.nn.Module
    choices: list[Choice]
    left: list[Left]

    def detections(self) -> Detections:
        """What the checks of all layers saw."""
        checked = [module for module in self.model.modules() if isinstance(module, CheckedLinear)]
        return sum((module.detections for module in checked), Detections())

    def table(self) -> str:
        """A line for each choice: shape, FLOP per byte, scheme, each scheme's measured overhead, reason.

        Below, layers that are not checked, with reasons.
        """
        schemes = [name for name in ("global", "row", "tile", "replication") if self._measured(name)]
        head = ["layer", "m", "n", "k", "FLOP/B", "scheme", *schemes, "reason"]
        lines = [head, *(self._line(choice, schemes) for choice in self.choices)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        texts = []
        for line in lines:
            cells = [
                cell.ljust(width) if column in (0, 5, len(head) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            texts.append("  ".join(cells).rstrip())
        return "\n".join([*texts, *(f"not checked: {left}" for left in self.left)])

    def _measured(self, scheme: str) -> bool:
        return any(scheme in choice.seconds for choice in self.choices)

    def _line(self, choice: Choice, schemes: list[str]) -> list[str]:
        shape = choice.shape
        found = [choice.overhead(name) for name in schemes]
        overheads = ["-" if overhead is None else f"{overhead:+.1%}" for overhead in found]
        sizes = [str(size) for size in (shape.rows, shape.outputs, shape.inputs)]
        return [choice.layer, *sizes, f"{shape.intensity:.3g}", choice.scheme, *overheads, choice.reason]


def protect(
    model: torch.nn.Module,
    example: Any,
    *,
    batches: Iterable[int] | None = None,
    schemes: Sequence[str] | None = None,
    on_error: str = "raise",
    remeasure: bool = False,
    confirm: bool = True,
    cache_folder: str | Path | None = None,
) -> Protected:
    """Give every linear layer of a model the cheapest check for its shape, batch, dtype, threads and device.

    The first call on a device measures, in turn, every scheme for every shape, some milliseconds each; the
    times are kept in the user's cache folder. Numbers of rows in between take the choice of the next power of
    two, those beyond what was measured that of the nearest.

    Args:
        model: any module; it is copied, and the `torch.nn.Linear` layers that are called with the example are
            replaced. Subclasses, layers with hooks, and those whose weights PyTorch's attention and
            transformer layers read without calling them stay as they are: see `Protected.left`.
        example: a batch that the model accepts: a tensor, or a tuple of arguments; the first dimension of the
            first tensor counts the batch.
        batches: batch sizes to measure for; by default that of the example alone.
        schemes: which to choose from: `global`, `row`, `tile`, `replication`; by default all that can run.
        on_error: `raise`, `count` or `recompute`.
        remeasure: measure anew what is in the cache.
        confirm: measure the choice in the whole model too, and take one scheme for all layers where that is
            cheaper there.
        cache_folder: where measured times are kept; by default in the user's cache folder.

    Raises:
        UsageError: an unknown scheme or policy; no linear layer; none of the schemes can check a layer.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> protected = protect(model, torch.rand(4, 16), cache_folder=folder)
        >>> [choice.layer for choice in protected.choices]
        ['0', '2']
        >>> protected.model(torch.rand(4, 16)).shape, protected.detections().faulty
        (torch.Size([4, 1]), 0)
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    policy(on_error)
    asked = chosen(None if schemes is None else tuple(schemes))
    arguments = example if isinstance(example, tuple) else (example,)
    given = _batch(arguments)
    sizes = (given,) if batches is None else tuple(batches) if isinstance(batches, Iterable) else ()
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise UsageError(f"batches are a list of whole numbers from 1 on, one at least, not {batches!r}")
    rows, left = _rows(model, arguments)
    protected = copy.deepcopy(model).eval()
    times, choices = Times(remeasure, None if cache_folder is None else Path(cache_folder)), []
    for size in sorted(set(sizes)):
        layers = {name: protected.get_submodule(name) for name in rows}
        made = [
            _choice(name, layer, bucket(max(1, rows[name] * size // given)), times, asked)
            for name, layer in layers.items()
        ]
        choices += _confirmed(protected, made, batch_of(arguments, given, size)) if confirm else made
    times.keep()
    choices = list({(choice.module, choice.shape.rows): choice for choice in choices}.values())
    for name in rows:
        own = [choice for choice in choices if choice.layer == (name or "linear")]
        by_bucket = {size: _nearest(own, size).scheme for size in BUCKETS}
        layer = protected.get_submodule(name)
        checked = CheckedLinear(layer, by_bucket, on_error=on_error, name=name or "linear")
        protected = _replaced(protected, layer, checked)
    return Protected(protected, sorted(choices, key=lambda choice: list(rows).index(choice.module)), left)


def _confirmed(model: torch.nn.Module, made: list[Choice], arguments: tuple[Any, ...]) -> list[Choice]:
    """The choices for a batch, or one scheme for all where that is cheaper in the whole model."""
    schemes = set.intersection(*(set(choice.seconds) for choice in made)) - {"none"}
    device = next(model.parameters()).device
    chosen_now = {choice.module: choice.scheme for choice in made}
    found = better(builder(model, _replaced), chosen_now, tuple(sorted(schemes)), arguments, device)
    return made if found is None else [replace(choice, scheme=found, alone=choice.scheme) for choice in made]


def _batch(arguments: tuple[Any, ...]) -> int:
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.dim() and len(argument):
            return len(argument)
    raise UsageError("the example holds no tensor with a first dimension that counts the batch")


def _rows(model: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[dict[str, int], list[Left]]:
    """Rows that each linear layer is given for the example, by name; and the layers that are left out."""
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, CheckedLinear))
    }
    read = read_elsewhere(model)
    reasons = {
        name: "it is protected already"
        if isinstance(module, CheckedLinear)
        else more_than(module, torch.nn.Linear, read)
        for name, module in linear.items()
    }
    called = {name: module for name, module in linear.items() if not reasons[name]}
    rows = _called(model, called, arguments) if called else {}
    reasons |= {name: "it was not called with the example" for name in called if name not in rows}
    left = [Left(name, type(linear[name]).__name__, reason) for name, reason in reasons.items() if reason]
    if not rows:
        raise UsageError(f"there is nothing to protect: {listed(left) or 'the model has no torch.nn.Linear'}")
    return {name: rows[name] for name in linear if name in rows}, left


def _called(
    model: torch.nn.Module, layers: dict[str, torch.nn.Module], arguments: tuple[Any, ...]
) -> dict[str, int]:
    """Rows that each of these layers is given for the example; those never called are left out."""
    seen: dict[str, int] = {}

    def noting(name: str, forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(input: torch.Tensor) -> torch.Tensor:
            seen[name] = input.numel() // max(input.shape[-1], 1)
            return forward(input)

        return noted

    # No hooks: modules with fast paths of their own look for them, and call their layers then.
    for name, layer in layers.items():
        layer.forward = noting(name, layer.forward)
    try:
        with evaluating(model):
            model(*arguments)
    finally:
        for layer in layers.values():
            del layer.forward
    return seen


def _choice(name: str, layer: Any, rows: int, times: Times, asked: tuple[Scheme, ...]) -> Choice:
    """The cheapest of the schemes that were asked for and that fit."""
    known = times.of(layer.weight, layer.bias, rows)
    seconds = {s: known[s] for s in ("none", *(scheme.name for scheme in asked)) if s in known}
    if len(seconds) < 2:
        why = asked[0].unfit(prepared(layer.weight, layer.bias))
        raise UsageError(f"layer {name or 'linear'}: none of the schemes asked for can check it: {why}")
    n, k = layer.weight.shape
    shape = Shape(rows, n, k, layer.weight.element_size())
    return Choice(name or "linear", name, shape, cheapest(seconds), seconds, times.balance(layer.weight))


def _nearest(choices: list[Choice], rows: int) -> Choice:
    return min(choices, key=lambda choice: abs(choice.shape.rows.bit_length() - rows.bit_length()))


def _replaced(model: torch.nn.Module, layer: torch.nn.Module, by: torch.nn.Module) -> torch.nn.Module:
    """The model with a layer replaced wherever it is used."""
    if model is layer:
        return by
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is layer:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, by)
    return model
