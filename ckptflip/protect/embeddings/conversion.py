"""Protects every embedding bag of a model in one call; the modules' names stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ckptflip.errors import MissingExtraError, SelectionError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.detection import policy
from ckptflip.protect.embeddings.kept import KeptRows
from ckptflip.protect.embeddings.module import REACTIONS, ProtectedEmbeddingBag
from ckptflip.protect.embeddings.tables import check_layout, protect_table
from ckptflip.protect.layers import Left, listed, more_than, read_elsewhere

_QUANTISED = {torch.quint8: "int8", torch.quint4x2: "int4"}


@dataclass(frozen=True, slots=True, eq=False)
class ProtectedBags(Mapping[str, ProtectedEmbeddingBag]):
    """The embedding bags of a model that are protected now, by name, and those that are not.

    Attributes:
        taken: the protected bags; one that the model holds under several names is here under the first.
        left: bags that stayed as they were, with reasons.
    """

    taken: dict[str, ProtectedEmbeddingBag]
    left: list[Left]

    def __getitem__(self, name: str) -> ProtectedEmbeddingBag:
        return self.taken[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.taken)

    def __len__(self) -> int:
        return len(self.taken)


def protect_bags(
    model: torch.nn.Module,
    layout: str = "int8",
    *,
    tables: str = "*",
    on_error: str = "raise",
    threads: int = 1,
) -> ProtectedBags:
    """Put protected embedding bags in the place of a model's.

    `torch.nn.EmbeddingBag` are quantised to `layout`, or kept in float with ``fp32`` and ``bf16``. PyTorch's
    quantised ones (``torch.ao.nn.quantized.EmbeddingBag``) keep their codes, and `layout` must be theirs.
    Bags that take the maximum or renormalise their rows, subclasses, and bags with hooks or another forward
    stay as they are; `ProtectedBags.left` names them.

    Args:
        model: altered in place; it is for inference then.
        layout: see `ckptflip.protect.embeddings.protect_table`.
        tables: a glob on modules' names.
        on_error: see `ProtectedEmbeddingBag`. With ``restore``, a copy of each table is kept
            (`ckptflip.protect.embeddings.kept`).
        threads: see `ProtectedEmbeddingBag`.

    Returns:
        The protected bags by name, and what was left.

    Raises:
        SelectionError: no embedding bag has such a name.
        UsageError: no bag can be protected, or the model is a bag itself; the message says why. Arguments
            that make no sense. The model is as it was then.

    Example:
        >>> model = torch.nn.ModuleDict({"emb": torch.nn.EmbeddingBag(10, 4, mode="sum")})
        >>> bags = protect_bags(model, "int4")
        >>> list(bags), bags.left, model["emb"](torch.tensor([[1, 2]])).shape
        (['emb'], [], torch.Size([1, 4]))
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    check_layout(layout)
    policy(on_error, REACTIONS)
    found = _found(model, tables)
    read = read_elsewhere(model)
    reasons = {name: _reason(module, layout, read) for name, module in found.items()}
    left = [Left(name, type(found[name]).__name__, reason) for name, reason in reasons.items() if reason]
    made = {
        name: _protected(module, layout, name, on_error, threads)
        for name, module in found.items()
        if not reasons[name]
    }
    if not made:
        raise UsageError(f"no embedding bag of this model can be protected: {listed(left)}")
    by_module = {id(found[name]): bag for name, bag in made.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in by_module:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, by_module[id(module)])
    return ProtectedBags(made, left)


def _found(model: torch.nn.Module, tables: str) -> dict[str, Any]:
    """The bags of a model whose names match, each under the first name that does."""
    if _is_bag(model):
        raise UsageError(
            "this is an embedding bag itself, and bags are replaced in the model around them: give that, or "
            "use ProtectedEmbeddingBag.from_float(bag.weight, layout, mode=bag.mode)"
        )
    bags = [(n, module) for n, module in model.named_modules(remove_duplicate=False) if _is_bag(module)]
    if not bags:
        raise SelectionError("the model has no torch.nn.EmbeddingBag: there is nothing to protect")
    found: dict[int, tuple[str, Any]] = {}
    for name, module in bags:
        if fnmatchcase(name, tables):
            found.setdefault(id(module), (name, module))
    if not found:
        names = [name for name, _ in bags]
        there = f"{', '.join(names[:4])}{', …' * (len(names) > 4)}"
        raise SelectionError(f"no embedding bag is named {tables!r}; this model has {there}")
    return dict(found.values())


def _is_bag(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.EmbeddingBag, ProtectedEmbeddingBag)) or _quantised(module)


def _quantised(module: torch.nn.Module) -> bool:
    # By name: importing PyTorch's quantised modules warns of their future.
    return any(
        kind.__name__ == "EmbeddingBag" and ".quantized." in kind.__module__ for kind in type(module).__mro__
    )


def _reason(module: Any, layout: str, read: set[int]) -> str:
    """Why a bag stays as it is; empty if it can be protected."""
    if isinstance(module, ProtectedEmbeddingBag):
        return "it is protected already"
    quantised = _quantised(module)
    if lost := more_than(module, type(module) if quantised else torch.nn.EmbeddingBag, read):
        return lost
    if quantised and type(module).__name__ != "EmbeddingBag":
        return "a subclass of EmbeddingBag may do more"
    if (mode := getattr(module, "mode", "sum")) not in ("sum", "mean"):
        return f"bags that are checked take the sum or mean, not the {mode}"
    if getattr(module, "max_norm", None) is not None:
        return "it renormalises its rows (max_norm) as it reads them"
    weight = module.weight() if quantised else module.weight
    bits = _QUANTISED.get(weight.dtype)
    if quantised and bits != layout.partition(":")[0]:
        return f"it is quantised as {bits or weight.dtype}, and {layout} was asked for"
    return (
        "" if weight.device.type == "cpu" else f"it is on {weight.device}; protected tables stay on the CPU"
    )


def _protected(module: Any, layout: str, name: str, on_error: str, threads: int) -> ProtectedEmbeddingBag:
    if isinstance(module, torch.nn.EmbeddingBag):
        table = ProtectedEmbeddingBag.from_float(module.weight, layout).weight
    else:
        table = protect_table(_packed_rows(module.weight()), layout)
    return ProtectedEmbeddingBag(
        table,
        layout,
        mode=getattr(module, "mode", "sum"),
        include_last_offset=getattr(module, "include_last_offset", False),
        padding_idx=getattr(module, "padding_idx", None),
        threads=threads,
        name=name,
        on_error=on_error,
        restore=KeptRows(table, layout) if on_error == "restore" else None,
    )


def _packed_rows(weight: torch.Tensor) -> torch.Tensor:
    """The rows of one of PyTorch's quantised bags, as ATen's operators store them."""
    scales, zeros = weight.q_per_channel_scales().float(), weight.q_per_channel_zero_points().float()
    number = torch.float32 if weight.dtype is torch.quint8 else torch.float16
    codes = weight.int_repr().contiguous().view(torch.uint8).reshape(weight.shape[0], -1)
    # A bias is what the zero point stands for, as ATen's own prepacking has it.
    pairs = (each.to(number).reshape(-1, 1).view(torch.uint8) for each in (scales, zeros * scales * -1))
    return torch.cat([codes, *pairs], dim=1)
