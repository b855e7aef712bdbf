"""The catalogue of PyTorch tensors in memory: names as in a file, one entry for each piece of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.target import Skipped
from ckptflip.faults.catalogue import Tensor
from ckptflip.live import torch_words
from ckptflip.torch_h5.names import member_name

Fetch = Callable[[], Any]


class Found(Struct, frozen=True):
    """A tensor that may be hit: its name, how to get it as it is now, what its role is guessed from."""

    name: str
    fetch: Fetch
    siblings: frozenset[str]
    given: str = ""


def catalogue(
    found: Sequence[Found], *, foreseen: bool = False
) -> tuple[list[Tensor], list[Fetch], list[Skipped]]:
    """Tensors by storage, in the order of a file: the catalogue, how to get each, and what is left out.

    Args:
        found: by name.
        foreseen: whether gradients and tensors without memory stand for those to come.
    """
    kept: dict[Any, _Kept] = {}
    skipped = []
    for each in sorted(found, key=lambda f: [part.encode() for part in f.name.split("/")]):
        tensor = each.fetch()
        try:
            number = torch_words.number_of(tensor, foreseen=foreseen)
        except ValueError as why:
            skipped.append(Skipped(each.name, str(why)))
            continue
        to_come = foreseen and (tensor.is_meta or each.name.startswith("gradients/"))
        place = each.name if to_come or tensor.numel() == 0 else _place(tensor)
        if place in kept:
            kept[place].aliases.append(each.name)
        else:
            kept[place] = _Kept(each, tensor, number, [])
    several = list(kept.values()) if foreseen else _apart(list(kept.values()), skipped)
    return [_entry(k) for k in several], [k.found.fetch for k in several], skipped


class _Kept(Struct, frozen=True):
    """A tensor of the catalogue in the making."""

    found: Found
    tensor: torch.Tensor
    number: NumberFormat
    aliases: list[str]


def _entry(kept: _Kept) -> Tensor:
    found, tensor = kept.found, kept.tensor
    name, shape = found.name, tuple(tensor.shape)
    # A gradient belongs to its parameter's layer; it is no weight, and no role has it in.
    guessed = f"model/{name.removeprefix('gradients/')}" if name.startswith("gradients/") else name
    layer, role = guess(guessed, kept.number, len(shape), found.siblings, found.given)
    role = "other" if name.startswith("gradients/") else role
    layout = f"{tensor.device}, {'contiguous' if tensor.is_contiguous() else 'strided'}"
    return Tensor(name, shape, kept.number, "<", layer, role, tuple(kept.aliases), layout)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _apart(kept: list[_Kept], skipped: list[Skipped]) -> list[_Kept]:
    """Tensors no two of which share memory: a view becomes an alias of the tensor that it is a view of."""
    order = sorted(
        (str(k.tensor.device), start, -end, i)
        for i, k in enumerate(kept)
        for start, end in [torch_words.address(k.tensor)]
        if end > start
    )
    folded: set[int] = set()
    before: list[tuple[str, int, int]] = []
    for device, start, negative, i in order:
        before = [b for b in before if b[0] == device and b[1] > start]
        for _, end, owner in before:
            if not _overlap(kept[owner].tensor, kept[i].tensor):
                continue
            folded.add(i)
            name = kept[i].found.name
            whole = torch_words.is_dense(kept[owner].tensor) and -negative <= end
            if whole:
                kept[owner].aliases.append(name)
            else:
                reason = f"shares part of its memory with {kept[owner].found.name}, which is listed"
                skipped.append(Skipped(name, reason))
            break
        else:
            before.append((device, -negative, i))
    return [k for i, k in enumerate(kept) if i not in folded]


def _overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors whose ranges in memory overlap have an element in common: views may interleave."""
    if torch_words.is_dense(first) or torch_words.is_dense(second):
        return True
    return bool(np.intersect1d(torch_words.offsets(first), torch_words.offsets(second)).size)


def named(group: str, members: Mapping[str, Fetch]) -> Iterator[Found]:
    """Tensors of one group under the names that its file would have."""
    taken: set[str] = set()
    names = {}
    for key, fetch in members.items():
        name = member_name(key, taken)
        taken.add(name)
        names[name] = fetch
    siblings = frozenset(names)
    for name, fetch in names.items():
        yield Found(f"{group}/{name}", fetch, siblings)


def nested(prefix: str, value: Any, given: str) -> Iterator[Found]:
    """The tensors in dicts and lists inside each other."""
    if isinstance(value, torch.Tensor):
        # An optimizer that loads a state drops its tensors; a target must not keep them alive.
        yield Found(prefix, weakref.ref(value), frozenset(), given)
        return
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    names: dict[str, Any] = {}
    for key, item in items:
        names[member_name(key, names)] = item
    siblings = frozenset(names)
    for name, item in names.items():
        for found in nested(f"{prefix}/{name}", item, given):
            yield found if found.siblings else replace(found, siblings=siblings)
