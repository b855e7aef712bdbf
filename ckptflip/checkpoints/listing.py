"""Named arrays that a file's header claims: are the claims possible, and what the catalogue says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from msgspec import Struct

from ckptflip.checkpoints.pieces import Layout
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.target import Skipped
from ckptflip.faults.catalogue import Tensor

# As many as numpy and PyTorch have; the axis of a complex number's parts is one of them here.
_MOST_AXES = 63
_MOST_BITS = 1 << 62


class DamagedError(Exception):
    """A claim that cannot be true. Formats turn it into a CheckpointError that names the file."""


class Array(Struct, frozen=True, gc=False):
    """An array of numbers in a file.

    Attributes:
        name: as the file has it.
        shape: elements along each axis.
        layout: where its words lie.
        how: the layout in words, for listings.
        aliases: its other names.
        part_of: the name of what it is a part of, which tells layer and role; "" when its own name does.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    how: str = "contiguous"
    aliases: tuple[str, ...] = ()
    part_of: str = ""


def bits_of(shape: Sequence[int], width: int) -> int:
    """Bits of an array whose elements have `width` bits each.

    Raises:
        DamagedError: no array can have this shape: too many axes, a negative length, too many elements.

    Example:
        >>> bits_of((2, 3), 4)
        24
    """
    if len(shape) > _MOST_AXES:
        raise DamagedError(f"it has {len(shape)} axes; at most {_MOST_AXES} are possible")
    if shape and min(shape) < 0:
        raise DamagedError(f"its shape {list(shape)} has a negative length")
    elements = prod(shape)
    # An axis of length 0 must not hide what the others claim.
    if (elements or prod(n for n in shape if n)) * width >= _MOST_BITS:
        raise DamagedError(f"its shape {list(shape)} has more elements than any file can hold")
    return elements * width


def check_apart(ranges: Iterable[tuple[int, int, str]]) -> None:
    """Refuse arrays that share bytes.

    Args:
        ranges: first byte, byte after the last, name; all of one file.

    Raises:
        DamagedError: two of them overlap.
    """
    last, owner = 0, ""
    for start, end, name in sorted(r for r in ranges if r[1] > r[0]):
        if start < last:
            raise DamagedError(f"{owner!r} and {name!r} overlap at byte {start}")
        last, owner = end, name


def without_repeats(arrays: Sequence[Array]) -> tuple[list[Array], list[Skipped]]:
    """Arrays with unique names: of several with one name the first, the others left out."""
    kept: dict[str, Array] = {}
    skipped = [
        Skipped(each.name, "another array has the same name")
        for each in arrays
        if kept.setdefault(each.name, each) is not each
    ]
    return list(kept.values()), skipped


def catalogue(arrays: Sequence[Array], files: int = 1) -> list[Tensor]:
    """The catalogue's entries for arrays with unique names, with layers and roles guessed from the names.

    Args:
        arrays: in the order of the catalogue.
        files: how many files the checkpoint has; beyond them count coded blobs.
    """
    groups: dict[str, set[str]] = {}
    for each in arrays:
        group, _, leaf = each.name.rpartition("/")
        groups.setdefault(group, set()).add(leaf)
    return [_tensor(each, groups[each.name.rpartition("/")[0]], files) for each in arrays]


def _tensor(array: Array, siblings: set[str], files: int) -> Tensor:
    layout = array.layout
    layer, role = guess(array.part_of or array.name, layout.number, len(array.shape), siblings)
    only = layout.pieces[0] if len(layout.pieces) == 1 else None
    offset = only.offset if only and only.file < files else None
    order = layout.order if layout.number.word_size > 1 else "<"
    return Tensor(
        array.name, array.shape, layout.number, order, layer, role, array.aliases, array.how, offset
    )
