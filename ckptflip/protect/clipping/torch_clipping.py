"""Clipping of a PyTorch model: bounds learnt from its layers, and put on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.live.torch_modules import Chosen, Wanted
from ckptflip.live.torch_values import leaves
from ckptflip.protect.clipping.bounds import Bound, Bounds, check_layers
from ckptflip.protect.clipping.part import Clipped
from ckptflip.protect.clipping.spread import Spread
from ckptflip.protect.clipping.torch_forwards import (
    Chain,
    Forward,
    Hook,
    Making,
    Rectifier,
)
from ckptflip.protect.clipping.torch_places import kinds, linears, owned, places, plain, rectified
from ckptflip.protect.clipping.torch_values import Clip
from ckptflip.protect.evaluation import called, evaluating
from ckptflip.recsys.models.crossing import VectorCross
from ckptflip.recsys.models.dlrm import Tables
from ckptflip.recsys.models.fields import Scaled


def _gathered(clip: Clip, tables: Tables, ids: torch.Tensor) -> torch.Tensor:
    return clip.stacked(list(tables.each(ids)))


# What is clipped while it is made.
_FORWARDS: dict[type, Callable[[Clip, Any], Callable[..., Any]]] = {
    torch.nn.ReLU: Rectifier,
    Tables: partial(Making, make=_gathered),
    Scaled: partial(Making, make=Clip.scaled),
    VectorCross: partial(Making, make=Clip.crossed),
}
_FORMS = (Hook, Forward, Rectifier, Chain, Making)


def clip(model: Any, bounds: Bounds) -> Clipped:
    """Clip the layers that the bounds name: in their `forward`, in the ReLU behind a layer, or by a hook."""
    inner = plain(model)
    check_layers(bounds, kinds(inner))
    modules = dict(inner.named_modules(remove_duplicate=False))
    named = [modules[bound.layer] for bound in bounds.layers]
    _check_bare(inner)
    own = owned(inner, [bound.layer for bound in bounds.layers])
    behind = rectified(inner, [module for module in named if own[id(module)]])
    clips, undo = [], []
    for bound, module in zip(bounds.layers, named, strict=True):
        clips.append(Clip(bound, bounds.replacements(bound), own[id(module)]))
        _, after = behind.get(id(module), (None, None))
        undo.append(_put(module, clips[-1], after))
    for owner in {id(owner): owner for owner, _ in behind.values()}.values():
        undo.append(_placed(owner, Chain(owner)))
    return Clipped(bounds, [made.seen for made in clips], undo)


def spreads(model: Any, batches: Iterable[Any], layers: Wanted | None) -> dict[Bound, Spread]:
    """What each layer gives on clean data.

    Args:
        model: it is called in evaluation mode and without autograd, and left as it was.
        batches: as `ckptflip.protect.clipping.calibrate` takes them.
        layers: as `places` takes them.

    Returns:
        A spread per layer; the layer and its kind are in a `Bound` without bounds yet.
    """
    inner = plain(model)
    _check_bare(inner)
    chosen = places(inner, layers)
    found = {one.name: Spread() for one in chosen}
    handles = [one.module.register_forward_hook(_observer(found[one.name])) for one in chosen]
    try:
        with evaluating(inner):
            for batch in batches:
                called(inner, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {_unbound(one): found[one.name] for one in chosen}


def named(model: Any, layers: Wanted | None) -> list[Bound]:
    """The layers that fixed bounds hold for, without bounds yet; by default all linear ones but the last."""
    inner = plain(model)
    return [_unbound(one) for one in places(inner, linears(inner) if layers is None else layers)]


def _put(module: torch.nn.Module, clip: Clip, after: torch.nn.Module | None) -> Callable[[], object]:
    """Clip a module in its `forward`, in the ReLU behind it, or by a hook; returns what undoes it."""
    if after is None and (module._forward_hooks or "forward" in module.__dict__):
        remove: Callable[[], object] = module.register_forward_hook(Hook(clip)).remove
        return remove
    changed = module if after is None else after
    return _placed(changed, _FORWARDS.get(type(changed), Forward)(clip, module))


def _placed(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], object]:
    """Put another `forward` on a module; returns what undoes it."""
    module.forward = forward
    return lambda: module.__dict__.pop("forward", None)


def _check_bare(model: torch.nn.Module) -> None:
    """Raise UsageError where a model is clipped already."""
    for name, module in model.named_modules():
        for one in (*module._forward_hooks.values(), module.__dict__.get("forward")):
            if isinstance(one, _FORMS):
                raise UsageError(
                    f"the model is clipped already, in {name!r}: take that off first, with remove()"
                )


def _unbound(one: Chosen) -> Bound:
    return Bound(one.name, type(one.module).__name__, -math.inf, math.inf)


def _observer(spread: Spread) -> Callable[[torch.nn.Module, Any, Any], None]:
    def look(module: torch.nn.Module, given: Any, output: Any) -> None:
        for _, tensor in leaves(output):
            if tensor.is_floating_point():
                wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
                spread.add(tensor.detach().to("cpu", wide).resolve_neg().numpy())

    return look
