"""Which parameter an optimizer's state belongs to, in a distributed checkpoint.

``optimizer.state_dict()`` numbers parameters, and the numbers are in the index: they are no names of layers,
though layers may be called alike. What the numbers mean is told as in a PyTorch file, by the parameter groups
(which lie outside the index, pickled, in the data files) or by a model beside the optimizer. See
`ckptflip.checkpoints.torch_zip.slots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckptflip.bits import lookup
from ckptflip.checkpoints.files import open_plain
from ckptflip.checkpoints.torch_dcp.index import Entry, Index, Item
from ckptflip.checkpoints.torch_zip.dtypes import Dtype
from ckptflip.checkpoints.torch_zip.pickles import parse_bytes
from ckptflip.checkpoints.torch_zip.slots import parameter_names
from ckptflip.checkpoints.torch_zip.trees import Tree, View
from ckptflip.checkpoints.torch_zip.values import Pairs, pairs_of
from ckptflip.checkpoints.zips import members
from ckptflip.errors import CheckpointError

# Trainings have one optimizer, or a few; of more, the state is in the catalogue without layers.
_MOST_OPTIMIZERS = 64
_MOST_ITEMS = 4096
# The names of a million parameters.
_MOST_BYTES = 1 << 26
_TOLD = ("params", "param_names")
# Names are told by shapes; the views need some dtype.
_ANY = Dtype(lookup("float32"), 4)

_Groups = dict[str, dict[str, Any]]


def parameters(index: Index, folder: Path) -> dict[str, str]:
    """By the name of an entry that is state of an optimizer, the parameter's name, as far as it is known.

    Args:
        index: of the checkpoint.
        folder: where its files are.
    """
    groups = _groups(index.items, folder)
    numbers = {optimizer: i for i, optimizer in enumerate(groups)}
    texts = {optimizer for optimizer, found in groups.items() if _by_name(found.values())}
    for optimizer in texts:
        for group in groups[optimizer].values():
            group["param_names"] = group.get("params")
    parents: dict[tuple[str, ...], int] = {}
    views: list[View] = []
    for entry in sorted(index.entries, key=lambda e: e.position):
        slot = _slot(entry.path, numbers, texts)
        parent = parents.setdefault(entry.path[:-1], len(parents) + 1)
        views.append(View(entry.name, entry.name, _ANY, 0, entry.shape, (), parent, slot))
    optimizers = [[Pairs(list(g.items())) for g in found.values()] for found in groups.values()]
    names = parameter_names(Tree(views, [], optimizers))
    names.update((e.name, named) for e in index.entries if (named := _stated(e)) and e.name not in names)
    return names


def _slot(
    path: tuple[str, ...], numbers: dict[tuple[str, ...], int], texts: set[tuple[str, ...]]
) -> tuple[int, int | str] | None:
    """The number of the optimizer and the parameter's key in it: keys …, state, parameter, slot."""
    for at, key in enumerate(path[:-2]):
        optimizer = path[:at]
        if key == "state" and optimizer in numbers:
            parameter = path[at + 1]
            is_number = parameter.isdecimal() and len(parameter) < 10 and optimizer not in texts
            return numbers[optimizer], int(parameter) if is_number else parameter
    return None


def _stated(entry: Entry) -> str:
    """The parameter that the names alone tell, or "": of a state without groups, or flattened."""
    path = entry.path
    if not any(p.startswith("opt") for p in path):
        return ""
    if len(path) > 2 and path[-3] == "state":
        name = path[-2]
    else:
        # Flattened: state.<parameter>.<slot>.
        first, _, rest = path[-1].partition(".")
        name = rest.rpartition(".")[0] if first == "state" else ""
    return "" if name.isdecimal() else name


def _by_name(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether an optimizer's state goes by names, as that of ``get_state_dict`` does."""
    return any(isinstance(p, str) for g in groups for p in _listed(g.get("params")))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _groups(items: Sequence[Item], folder: Path) -> dict[tuple[str, ...], _Groups]:
    """What the parameter groups of each optimizer say, by the optimizer's place and the group's number."""
    found: dict[tuple[str, ...], _Groups] = {}
    left = _MOST_BYTES
    for item in items[:_MOST_ITEMS]:
        at = item.path.index("param_groups")
        optimizer, inner = item.path[:at], item.path[at + 1 :]
        if optimizer not in found and len(found) >= _MOST_OPTIMIZERS:
            continue
        groups = found.setdefault(optimizer, {})
        if (inner and inner[1:] not in [(t,) for t in _TOLD]) or item.length > left:
            continue
        left -= item.length
        value = _read(item, folder)
        if inner:
            groups.setdefault(inner[0], {})[inner[1]] = value
        else:
            # PyTorch up to 2.3 stores all groups as one item.
            for i, group in enumerate(_listed(value)):
                groups[str(i)] = {k: v for k, v in pairs_of(group) if k in _TOLD}
    return found


def _read(item: Item, folder: Path) -> Any:
    """What an item holds, as inert values; None where it cannot be read: names are no reason to refuse."""
    path = folder / item.file
    where = f"{path}, {'/'.join(item.path)}"
    try:
        with open_plain(path) as file:
            archive = members(file.fileno(), where, start=item.offset, length=item.length)
            first = next(iter(archive), "")
            return parse_bytes(archive.read(f"{first[: first.find('/') + 1]}data.pkl", _MOST_BYTES), where)
    except (CheckpointError, OSError):
        return None
