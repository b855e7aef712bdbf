"""Which modules of a PyTorch model are hit, and what keeps hooks from seeing their calls."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from msgspec import Struct

from ckptflip.errors import SelectionError, UsageError
from ckptflip.live.torch_gate import is_compiled

Wanted = bool | str | type | Iterable[str | type]

_MAGIC = frozenset("*?[")
# Layers whose result is never what they were given, nor a view of it.
_FRESH = (
    *(torch.nn.Linear, torch.nn.Bilinear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding),
    *(torch.nn.modules.batchnorm._BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.EmbeddingBag),
)


class Chosen(Struct, frozen=True):
    """A module whose calls are hit.

    Attributes:
        name: its first name in the model; the model itself is ````.
        module: the module.
        own: whether each of its outputs is a tensor of its own, or a view of what it was given: so it is with
            the layers of PyTorch, while others may keep what they give and give it again.
        fresh: whether it is always a tensor of its own.
    """

    name: str
    module: torch.nn.Module
    own: bool
    fresh: bool


def choose(model: torch.nn.Module, wanted: Wanted, option: str) -> list[Chosen]:
    """The modules that are meant, each once, in the model's order.

    Args:
        model: the model.
        wanted: names (``layer1.0.conv1``, exactly that module), globs (``conv*``, on the whole name or on its
            last part; of these the layers alone, not the modules that hold them), classes (``nn.Conv2d``);
            ``!`` before a name or glob takes modules away. True: every layer.
        option: the argument's name, for messages.

    Raises:
        SelectionError: a name, glob or class that matches nothing.
        UsageError: neither name nor class.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> [chosen.name for chosen in choose(model, "*", "activations")]
        ['0', '1']
        >>> [chosen.name for chosen in choose(model, [torch.nn.Linear], "activations")]
        ['0']
    """
    terms = _terms(wanted, option)
    names: dict[int, list[str]] = {}
    modules = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    # What another layer does by itself (a parametrization, the projection in attention) is never called.
    inner = {
        id(m) for module in modules.values() if _is_whole(module) for m in module.modules() if m is not module
    }
    layers = {key for key, module in modules.items() if key not in inner and not _parts(module)}
    taken, given = set[int](), set[int]()
    for term in terms:
        away = isinstance(term, str) and term.startswith("!")
        named = term.removeprefix("!") if isinstance(term, str) else term
        found = _matching(named, names, modules, layers)
        if not found:
            raise SelectionError(_no_match(term, option, names, modules, layers))
        taken, given = (taken | found, given) if away else (taken, given | found)
    if all(isinstance(term, str) and term.startswith("!") for term in terms):
        given = layers
    chosen = [key for key in modules if key in given - taken]
    if not chosen:
        raise SelectionError(f"{option} leaves no module of the model: what it names, it takes away again")
    return [_chosen(names[key][0], modules[key], key in layers) for key in chosen]


def _chosen(name: str, module: torch.nn.Module, is_layer: bool) -> Chosen:
    own = is_layer and _of_pytorch(module)
    return Chosen(name, module, own, own and isinstance(module, _FRESH))


def _terms(wanted: Wanted, option: str) -> list[str | type]:
    if wanted is True:
        return ["*"]
    terms: Any = [wanted] if isinstance(wanted, str | type) else wanted
    try:
        listed = list(terms)
    except TypeError:
        listed = [terms]
    if not listed or not all(isinstance(term, str | type) for term in listed):
        raise UsageError(
            f"{option} names modules: names, globs, classes or True for all layers, not {wanted!r}"
        )
    return listed


def _matching(
    term: str | type, names: dict[int, list[str]], modules: dict[int, torch.nn.Module], layers: set[int]
) -> set[int]:
    if isinstance(term, type):
        return {key for key, module in modules.items() if isinstance(module, term)}
    if not _MAGIC.intersection(term):
        return {key for key, called in names.items() if term in called}
    return {key for key in layers for name in names[key] if _fits(name, term)}


def _fits(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[2], glob)


def _is_whole(module: torch.nn.Module) -> bool:
    """Whether a module computes with its parts' parameters, not by calling them."""
    return isinstance(module, torch.nn.MultiheadAttention) or "parametrizations" in module._modules


def _parts(module: torch.nn.Module) -> list[str]:
    """The names of the modules that a module calls."""
    return [] if _is_whole(module) else [name for name, part in module._modules.items() if part is not None]


def _of_pytorch(module: torch.nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _no_match(
    term: str | type,
    option: str,
    names: dict[int, list[str]],
    modules: dict[int, torch.nn.Module],
    layers: set[int],
) -> str:
    if isinstance(term, type):
        kinds = {type(modules[key]) for key in layers}
        # A class of the model's own may have the same name.
        alike = any(kind.__name__ == term.__name__ for kind in kinds)
        wanted, *there = (f"{k.__module__}.{k.__name__}" if alike else k.__name__ for k in (term, *kinds))
        return f"{option}: the model has no {wanted}; its layers are {', '.join(sorted(set(there)))}"
    glob = term.removeprefix("!")
    known = [name for called in names.values() for name in called if name]
    near = difflib.get_close_matches(glob, known, 1, cutoff=0.5)
    ending = [name for name in known if name.rpartition(".")[2] == glob]
    if ending:
        hint = f"did you mean {ending[0]!r}, or all of them with '*{glob}'?"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    else:
        hint = (
            f"there are {', '.join(known[:4])}{' …' if len(known) > 4 else ''}"
            if known
            else "it has no parts"
        )
    return f"{option} {glob!r} is no module of the model; {hint}"


def blinders(model: torch.nn.Module) -> list[str]:
    """What may keep hooks from being called: compiled and scripted modules.

    Args:
        model: as it is called, with whatever wraps it.

    Returns:
        A sentence part for each, such as ``the model is compiled (torch.compile)``.
    """
    found = []
    eager = _is_forced_eager()
    for name, module in model.named_modules():
        said = f"module {name!r}" if name else "the model"
        if not eager and (type(module).__name__ == "OptimizedModule" or is_compiled(module)):
            found.append(f"{said} is compiled (torch.compile)")
        elif isinstance(module, torch.jit.ScriptModule) and not any("scripted" in one for one in found):
            found.append(f"{said} is scripted (torch.jit)")
    return found


def _is_forced_eager() -> bool:
    """Whether compiled code is not run at the moment: ``torch.compiler.set_stance("force_eager")``."""
    # There is no public way to ask; where this one has gone, one warning too many is given.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return getattr(getattr(dynamo, "_stance", None), "stance", None) == "force_eager"


def shares(model: Any) -> bool:
    """Whether a model is called in several threads at once, by `torch.nn.DataParallel` on several devices."""
    return isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1


def whole(names: Sequence[str]) -> str:
    """A few names of many, for messages."""
    return f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
