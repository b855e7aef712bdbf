"""The names of the leaves of a saved tree, as Orbax' ``_METADATA`` tells them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.target import Skipped
from ckptflip.checkpoints.zarr.metadata import json_object


class Tree(Struct, frozen=True):
    """What ``_METADATA`` says.

    Attributes:
        names: the leaf that each array is, its keys joined by ``/``, by the name of the array.
        skipped: leaves that are no arrays.
    """

    names: dict[str, str]
    skipped: list[Skipped]


def read_tree(raw: bytes) -> Tree:
    """Read the names of leaves.

    Args:
        raw: the content of ``_METADATA``; empty where there is none.

    Raises:
        DamagedError: it is not what Orbax writes.

    Example:
        >>> keys = '[{"key": "dense", "key_type": 2}, {"key": "kernel.0", "key_type": 2}]'
        >>> value = '{"value_type": "jax.Array", "skip_deserialize": false}'
        >>> raw = f'{{"tree_metadata": {{"x": {{"key_metadata": {keys}, "value_metadata": {value}}}}}}}'
        >>> read_tree(raw.encode()).names
        {'dense.kernel.0': 'dense/kernel.0'}
    """
    leaves = json_object(raw).get("tree_metadata", {}) if raw else {}
    if not isinstance(leaves, dict):
        raise DamagedError("its tree_metadata is no object")
    tree = Tree({}, [])
    for leaf in leaves.values():
        keys = _keys(leaf)
        kind = leaf.get("value_metadata")
        if not isinstance(kind, dict):
            raise DamagedError(f"it does not say what {'/'.join(keys)[:60]!r} is")
        if kind.get("skip_deserialize"):  # None, and empty containers
            continue
        if kind.get("value_type") == "string":
            tree.skipped.append(Skipped("/".join(keys), "a string"))
        else:
            tree.names[".".join(keys)] = "/".join(keys)
    return tree


def _keys(leaf: Any) -> list[str]:
    """The keys on the way to a leaf."""
    given = leaf.get("key_metadata") if isinstance(leaf, dict) else None
    if isinstance(given, list) and given and all(isinstance(k, dict) for k in given):
        keys = [k.get("key") for k in given]
        if all(isinstance(k, str | int) for k in keys):
            return [str(k) for k in keys]
    raise DamagedError("its tree_metadata has a leaf without keys")
