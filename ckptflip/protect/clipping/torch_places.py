"""Which modules of a PyTorch model are clipped, and what may keep their hooks from being called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.live.torch_modules import Chosen, Wanted, blinders, choose, shares
from ckptflip.live.torch_tensors import unwrapped
from ckptflip.recsys.models.dlrm import Tables

_TABLES = (torch.nn.Embedding, torch.nn.EmbeddingBag)
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


def places(model: torch.nn.Module, layers: Wanted | None) -> list[Chosen]:
    """The modules whose outputs are clipped.

    Args:
        model: unwrapped.
        layers: names, globs, classes, as `ckptflip.live.torch_modules.choose` takes them. None: every module
            that computes with parameters of its own, where a fault in weights comes to light; of modules that
            only look up several tables, themselves and not the tables, so that one look serves for all.

    Raises:
        SelectionError: a name, glob or class that matches nothing.
        UsageError: the model has no such modules.
    """
    if layers is not None:
        return choose(model, layers, "layers")
    whole = [module for module in model.modules() if _gathers(module)]
    parts = {id(part) for module in whole for part in module.modules() if part is not module}
    every = {id(one.module): one for one in choose(model, True, "layers")} | {
        id(module): Chosen(name, module, own=False, fresh=False)
        for name, module in model.named_modules()
        if any(module is one for one in whole)
    }
    found = [
        every[id(module)]
        for module in model.modules()
        if id(module) in every and id(module) not in parts and any(True for _ in module.parameters())
    ]
    if not found:
        raise UsageError(
            f"no module of this {type(model).__name__} has parameters of its own: name those to clip, with "
            "layers="
        )
    return found


def rectified(
    model: torch.nn.Module, taken: Iterable[torch.nn.Module]
) -> dict[int, tuple[torch.nn.Sequential, torch.nn.ReLU]]:
    """Layers whose output goes into a ReLU and nowhere else, so that both can be done at once.

    So it is in a `torch.nn.Sequential`, as long as it is called as a whole.

    Args:
        model: unwrapped.
        taken: the layers in question.

    Returns:
        The `Sequential` and the ReLU behind a layer, by the layer's `id`.
    """
    wanted = {id(module) for module in taken}
    owners = [m for m in model.modules() if type(m) is torch.nn.Sequential and "forward" not in m.__dict__]
    uses = Counter(id(part) for m in model.modules() for part in m._modules.values())
    found = {}
    for owner in owners:
        for layer, after in pairwise(owner):
            once = uses[id(layer)] == uses[id(after)] == 1
            if id(layer) in wanted and once and type(after) is torch.nn.ReLU and not _watched(layer, after):
                found[id(layer)] = (owner, after)
    return found


def _watched(layer: torch.nn.Module, after: torch.nn.Module) -> bool:
    """Whether something looks between a layer and what is behind it."""
    return bool(layer._forward_hooks or after._forward_pre_hooks or "forward" in after.__dict__)


def _gathers(module: torch.nn.Module) -> bool:
    """Whether a module is a list of tables that is called itself: it is clipped as a whole."""
    if not isinstance(module, _LISTS) or type(module).forward is torch.nn.Module.forward:
        return False
    with_weights = [part for part in module.modules() if part._parameters]
    return len(with_weights) > 1 and all(isinstance(part, _TABLES) for part in with_weights)


def linears(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers but the last, in the model's order: those that the Terrorch study clips."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if len(names) < 2:
        raise UsageError(
            f"the model has {len(names)} torch.nn.Linear, and the last one is not clipped: name layers with "
            "layers="
        )
    return names[:-1]


def plain(model: Any) -> torch.nn.Module:
    """The model that hooks are put on.

    Raises:
        UsageError: hooks on it would not be called, or by several threads at once.
    """
    inner = unwrapped(model)
    for said in blinders(model):
        raise UsageError(
            f"{said}, and may skip the hooks that clip: clip the plain model first, then compile it with "
            "torch.compile. Scripted modules cannot be clipped"
        )
    if shares(model):
        raise UsageError(
            "torch.nn.DataParallel calls copies of the model in several threads at once: clip model.module, "
            "or use DistributedDataParallel"
        )
    return inner


def owned(model: torch.nn.Module, names: list[str]) -> dict[int, bool]:
    """Whether what modules give is theirs alone, so that it may be altered where it is; by their `id`.

    Args:
        model: unwrapped.
        names: of modules that it has.
    """
    return {id(one.module): one.fresh or type(one.module) is Tables for one in choose(model, names, "layers")}


def kinds(model: torch.nn.Module) -> dict[str, str]:
    """The classes of all modules, by every name."""
    named = model.named_modules(remove_duplicate=False)
    return {name: type(module).__name__ for name, module in named}
