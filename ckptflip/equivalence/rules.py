"""MAP.toml: what belongs together where names do not tell, and what cannot be inferred."""

from __future__ import annotations

import difflib
import re
from math import prod
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ckptflip.equivalence.layouts import MisfitError, permuted
from ckptflip.errors import UsageError

DTYPES = ("same", "fields")
LAYOUTS = ("same", "depthwise", "gru")


class Pair(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of one checkpoint and its counterpart in another.

    Attributes:
        to: name of the counterpart.
        layout: ``OIHW->HWIO`` or another two orders of axes, ``same``, ``depthwise`` or ``gru``; None: as for
            tensors paired by name.
        flatten: channels, height, width … of what a dense layer takes flattened; None: as for others.
    """

    to: str
    layout: str | None = None
    flatten: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            try:
                permuted(self.layout, (1,) * len(self.layout.partition("->")[0].strip()))
            except MisfitError as why:
                near = difflib.get_close_matches(self.layout, LAYOUTS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; or say {', '.join(LAYOUTS)}"
                raise ValueError(f"{why}{hint}") from None
        _check_flatten(self.flatten)


class Rules(Struct, frozen=True, forbid_unknown_fields=True):
    """How tensors of one framework's checkpoint are found in another's.

    Attributes:
        auto: whether tensors that are not listed are paired by name.
        dtypes: ``same``, or ``fields``: a bit of another float type is the one in the same place of the same
            field (sign, exponent, mantissa), counted from the field's most significant bit.
        flatten: for dense layers, by name: channels, height, width … of what they take flattened.
        layers: layers by their names in the one checkpoint, with those in the other.
        tensors: tensors by their names in the one, with their counterparts.

    Example:
        >>> Rules(flatten={"fc1": (64, 4, 4)}).flatten["fc1"]
        (64, 4, 4)
    """

    auto: bool = True
    dtypes: str = "same"
    flatten: dict[str, tuple[int, ...]] = {}
    layers: dict[str, str] = {}
    tensors: dict[str, Pair | str] = {}

    def __post_init__(self) -> None:
        if self.dtypes not in DTYPES:
            raise ValueError(f"dtypes must be {' or '.join(DTYPES)}, not {self.dtypes!r}")
        for shape in self.flatten.values():
            _check_flatten(shape)

    def pairs(self) -> dict[str, Pair]:
        """The tensors that are listed."""
        return {name: Pair(pair) if isinstance(pair, str) else pair for name, pair in self.tensors.items()}


AUTO = Rules()


def load(path: str | Path) -> Rules:
    """Read a map.

    Raises:
        UsageError: no such file, not TOML, an unknown key, an impossible value; says where.
    """
    import tomllib

    path = Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"map {path} is not a plain file")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as why:
        raise UsageError(
            f"map {path}: {why.strerror}; it is the name of a TOML file, or auto to pair tensors by name"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as why:
        raise UsageError(f"map {path} is not TOML: {why}") from None
    try:
        return msgspec.convert(data, Rules)
    except msgspec.ValidationError as why:
        raise UsageError(f"map {path}: {_explained(str(why), data)}") from None


def _check_flatten(shape: tuple[int, ...] | None) -> None:
    if shape is not None and (len(shape) < 2 or min(shape) < 1 or prod(shape) >= 2**31):
        raise ValueError(
            f"flatten is the shape before flattening, [channels, height, width], not {list(shape)}"
        )


def _explained(message: str, data: dict[str, Any]) -> str:
    """A message of msgspec with the nearest known key."""
    unknown = re.search(r"unknown field `(.+?)`", message)
    if unknown is None:
        return message
    at_top = unknown.group(1) in data and "$." not in message
    known = Rules.__struct_fields__ if at_top else Pair.__struct_fields__
    near = difflib.get_close_matches(unknown.group(1), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    pair = data.get(unknown.group(1))
    if at_top and not near and (isinstance(pair, str) or (isinstance(pair, dict) and "to" in pair)):
        hint = "pairs of tensors belong into a table [tensors]"
    return f"{message}; {hint}"
