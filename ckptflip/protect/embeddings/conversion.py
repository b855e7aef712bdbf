"""Protects every embedding bag of a model in one call; the modules' names stay."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from ckptflip.errors import MissingExtraError, SelectionError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag
from ckptflip.protect.embeddings.tables import protect_table, unprotect_table


def protect_bags(
    model: torch.nn.Module,
    layout: str = "int8",
    *,
    tables: str = "*",
    on_error: str = "raise",
    threads: int = 1,
) -> dict[str, ProtectedEmbeddingBag]:
    """Put protected embedding bags in the place of a model's.

    `torch.nn.EmbeddingBag` are quantised to `layout`, or kept in float with ``fp32`` and ``bf16``. PyTorch's
    quantised ones (``torch.ao.nn.quantized.EmbeddingBag``) keep their codes, and `layout` must be theirs.

    Args:
        model: altered in place; it is for inference then.
        layout: see `ckptflip.protect.embeddings.protect_table`.
        tables: a glob on modules' names.
        on_error: see `ProtectedEmbeddingBag`. With ``restore``, a copy of each table is kept.
        threads: see `ProtectedEmbeddingBag`.

    Returns:
        The protected bags by name.

    Raises:
        SelectionError: no embedding bag has such a name.
        UsageError: a bag that takes the maximum, or is of another layout.

    Example:
        >>> model = torch.nn.ModuleDict({"emb": torch.nn.EmbeddingBag(10, 4, mode="sum")})
        >>> list(protect_bags(model, "int4")), model["emb"](torch.tensor([[1, 2]])).shape
        (['emb'], torch.Size([1, 4]))
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name and fnmatchcase(name, tables) and _is_bag(module)
    }
    if not found:
        raise SelectionError(f"no embedding bag is named {tables!r}; name those of the model, or '*' for all")
    made = {name: _protected(module, layout, name, on_error, threads) for name, module in found.items()}
    for name, bag in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, last, bag)
    return made


def _is_bag(module: torch.nn.Module) -> bool:
    if isinstance(module, ProtectedEmbeddingBag):
        return False
    # By name: importing PyTorch's quantised modules warns of their future.
    quantised = type(module).__name__ == "EmbeddingBag" and ".quantized." in type(module).__module__
    return isinstance(module, torch.nn.EmbeddingBag) or quantised


def _protected(module: Any, layout: str, name: str, on_error: str, threads: int) -> ProtectedEmbeddingBag:
    options: dict[str, Any] = {
        "mode": getattr(module, "mode", "sum"),
        "include_last_offset": getattr(module, "include_last_offset", False),
        "padding_idx": getattr(module, "padding_idx", None),
        "threads": threads,
        "name": name,
        "on_error": on_error,
    }
    if getattr(module, "max_norm", None) is not None:
        raise UsageError(f"{name} renormalises its rows (max_norm) as it reads them: it cannot be protected")
    if isinstance(module, torch.nn.EmbeddingBag):
        table = ProtectedEmbeddingBag.from_float(module.weight, layout).weight
    else:
        table = protect_table(_packed_rows(module, layout, name), layout)
    if on_error == "restore":
        options["restore"] = _rows_of(unprotect_table(table, layout))
    return ProtectedEmbeddingBag(table, layout, **options)


def _rows_of(stored: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: stored[rows]


def _packed_rows(module: Any, layout: str, name: str) -> torch.Tensor:
    """The rows of one of PyTorch's quantised bags, as ATen's operators store them."""
    weight = module.weight()
    bits = {torch.quint8: "int8", torch.quint4x2: "int4"}.get(weight.dtype)
    if bits != layout.partition(":")[0]:
        raise UsageError(f"{name} is quantised as {bits or weight.dtype}, and {layout} was asked for")
    scales, zeros = weight.q_per_channel_scales().float(), weight.q_per_channel_zero_points().float()
    number = torch.float32 if bits == "int8" else torch.float16
    codes = weight.int_repr().contiguous().view(torch.uint8).reshape(weight.shape[0], -1)
    # A bias is what the zero point stands for, as ATen's own prepacking has it.
    pairs = (each.to(number).reshape(-1, 1).view(torch.uint8) for each in (scales, zeros * scales * -1))
    return torch.cat([codes, *pairs], dim=1)
