"""A whole model with checked linear layers, in one call, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.detection import Detections, policy
from ckptflip.protect.evaluation import called, evaluating
from ckptflip.protect.gemm.checked import ON_ERROR
from ckptflip.protect.gemm.linear import ProtectedLinear, ProtectedQuantized, QuantisedLinear
from ckptflip.protect.gemm.quantised import Quantised, scale_of
from ckptflip.protect.gemm.reading import NotTakenError, dequantised, read_float, read_quantised
from ckptflip.protect.layers import Left, listed, more_than, read_elsewhere

Protected = (ProtectedLinear, ProtectedQuantized, QuantisedLinear)


@dataclass(frozen=True, slots=True)
class Taken:
    """A layer that is checked now: its name, what it was, n, k, and how its input gets its range."""

    name: str
    was: str
    outputs: int
    inputs: int
    range: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A protected model, and which of its layers are.

    Attributes:
        model: call it like the one it was made from.
        taken: layers that are checked.
        left: layers with weights that are not, with reasons.
    """

    model: torch.nn.Module
    taken: list[Taken]
    left: list[Left]

    def detections(self) -> Detections:
        """What the checks of all layers saw."""
        layers = (module for module in self.model.modules() if isinstance(module, Protected))
        return sum((layer.detections for layer in layers), Detections())


def protect(
    model: torch.nn.Module,
    *,
    scheme: str = "exact",
    placement: str | None = None,
    on_error: str = "raise",
    calibration: Iterable[Any] | None = None,
    per_channel: bool = True,
) -> Converted:
    """Give every linear layer of a model a checked int8 product; for inference on the CPU.

    Taken are `torch.nn.Linear` (of floats, or with an int8 weight of torchao), and the static, dynamic and
    ReLU-fused linear layers of `torch.ao.nn.quantized`. Those of floats are quantised: symmetric weights.

    Args:
        model: any module; it is left alone, and what is not replaced is copied.
        scheme, placement, on_error: as of `ckptflip.protect.gemm.linear.QuantisedLinear`.
        calibration: batches that the model accepts, each a tensor, a tuple or list of arguments, or a dict of
            them: inputs of float layers get the range seen there. None: each call finds its own (dynamic
            quantisation).
        per_channel: whether float weights get a scale for each output.

    Raises:
        UsageError: no layer can be taken; the message says why. An unknown scheme or policy; no batch; a
            layer that is given NaN or infinities by one.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> converted = protect(model, on_error="recompute")
        >>> [layer.name for layer in converted.taken], converted.left
        (['0', '2'], [])
        >>> converted.model(torch.rand(4, 16)).shape, converted.detections().calls
        (torch.Size([4, 1]), 2)
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    policy(on_error, ON_ERROR)
    found = dict(_layers(model))
    ranges = {} if calibration is None else _ranges(model, found, calibration)
    options = {"scheme": scheme, "placement": placement, "on_error": on_error}
    memo: dict[int, Any] = {}
    taken, left = [], []
    for name, (module, reason) in found.items():
        was = type(module).__name__
        try:
            if reason:
                raise NotTakenError(reason)
            made, how = _protected(module, name, ranges.get(id(module)), per_channel, options)
        except NotTakenError as error:
            left.append(Left(name, was, str(error)))
            continue
        memo[id(module)] = made
        taken.append(Taken(name, was, made.out_features, made.in_features, how))
    if not taken:
        raise UsageError(
            f"no layer of this model can be protected: {listed(left) or 'it has no linear layer'}"
        )
    # A copy that finds its layers replaced already, wherever they are used.
    return Converted(copy.deepcopy(model, memo).eval(), taken, left)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Every module with a weight of its own, and why it cannot be taken, or nothing."""
    read = read_elsewhere(model)
    for name, module in model.named_modules():
        if _reader(module) is not None or isinstance(module, torch.nn.Linear):
            yield name, (module, more_than(module, torch.nn.Linear, read))
        elif isinstance(module, Protected):
            yield name, (module, "it is protected already")
        elif getattr(module, "weight", None) is not None:
            yield name, (module, "not a linear layer")


def _reader(module: Any) -> Callable[[Any], Quantised] | None:
    """What reads a quantised layer's numbers, or None. By name, for `torch.ao` is slow to import."""
    kind = type(module)
    place, name = kind.__module__, kind.__name__
    if not place.startswith("torch.ao.nn."):
        return None
    dynamic = ".dynamic." in place
    if name == "Linear" and ".quantized." in place:
        return lambda m: read_quantised(m, out=not dynamic)
    if name == "LinearReLU" and ".quantized." in place:
        return lambda m: read_quantised(m, out=not dynamic, relu=True)
    return None


def _protected(
    module: Any, name: str, seen: tuple[float, float] | None, per_channel: bool, options: dict[str, Any]
) -> tuple[Any, str]:
    """The layer in place of another, and how its input gets its range."""
    options = options | {"name": name or "linear"}
    reader = _reader(module)
    if reader is not None:
        layer = reader(module)
        if layer.out_scale is not None:
            return ProtectedQuantized(layer, **options), "given"
        return ProtectedLinear(layer, **options), "dynamic"
    if not isinstance(module, torch.nn.Linear):
        raise NotTakenError("not a linear layer")
    layer, how = read_float(module, per_channel), "dynamic"
    if seen is not None:
        scale, zero = scale_of(*seen)
        layer, how = replace(layer, x_scale=scale, x_zero=zero), "static"
    # It takes the dtype of the layer that it replaces, for `unprotect`.
    return ProtectedLinear(layer, **options).to(module.weight.dtype), how


def _ranges(
    model: torch.nn.Module, found: dict[str, tuple[Any, str]], batches: Iterable[Any]
) -> dict[int, tuple[float, float]]:
    """The smallest and the largest input of each float layer over all batches."""
    seen: dict[int, tuple[float, float]] = {}
    linear = {module: name for name, (module, _) in found.items() if isinstance(module, torch.nn.Linear)}

    def look(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = given[0] if given else named.get("input")
        if not isinstance(x, torch.Tensor) or not x.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(x))
        if not (isfinite(low) and isfinite(high)):
            raise UsageError(
                f"calibration gives layer {linear[module] or 'linear'!r} NaN or infinity: calibrate with "
                "clean data and a sound model"
            )
        before = seen.get(id(module), (low, high))
        seen[id(module)] = min(low, before[0]), max(high, before[1])

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in linear]
    done = 0
    try:
        with evaluating(model):
            for batch in batches:
                called(model, batch)
                done += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not done:
        raise UsageError("calibration holds no batch; leave it out for dynamic quantisation")
    return seen


def unprotect(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a protected model with ordinary layers, which compute with the same quantised weights.

    Layers of floats become `torch.nn.Linear` with the weight that the codes stand for, in the dtype of the
    layer that was protected, followed by a `torch.nn.ReLU` where it had one fused; those of quantised tensors
    become layers of `torch.ao.nn.quantized` again.

    Raises:
        UsageError: nothing in it is protected.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> plain = unprotect(protect(model).model)
        >>> type(plain[0]).__name__, bool((plain[0].weight - model[0].weight).abs().max() < 0.01)
        ('Linear', True)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, ProtectedLinear):
            memo[id(module)] = dequantised(module.checked.packed.layer, module.dtype)
        elif isinstance(module, ProtectedQuantized):
            memo[id(module)] = _quantized(module.checked.packed.layer)
    if not memo:
        raise UsageError("nothing in this model is protected")
    return copy.deepcopy(model, memo).eval()


def _quantized(layer: Quantised) -> torch.nn.Module:
    """A layer of `torch.ao.nn.quantized` with the same numbers."""
    from torch.ao.nn import quantized
    from torch.ao.nn.intrinsic import quantized as fused

    kind = fused.LinearReLU if layer.relu else quantized.Linear
    module = kind(layer.inputs, layer.outputs, layer.bias is not None)
    scales = layer.weight_scale.expand(layer.outputs).double()
    zeros = torch.zeros(layer.outputs, dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(layer.weight, scales, zeros, 0)
    module.set_weight_bias(weight, layer.bias)
    module.scale, module.zero_point = layer.out_scale, layer.out_zero
    return module
