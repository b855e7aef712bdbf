"""A catalogue in which each row-wise table is three tensors, and what their words are in the stored bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.checkpoints.target import Changes, positions_by_name
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults.catalogue import Shard, Tensor, bare_name, matches, select
from ckptflip.faults.policy import Policy
from ckptflip.faults.record import TensorEntry
from ckptflip.faults.rowwise import FIELDS, Row, Rowwise, described, fitted, layout_of, parse

Positions = NDArray[np.int64]
Read = Callable[[int, Positions], NDArray[Any]]


class _Part(Struct, frozen=True):
    """What a tensor of the split catalogue is: a field of a stored table, or (no row) a stored tensor."""

    base: int
    row: Row | None = None
    field: str = ""


class Split:
    """Stored tensors, with some of them as fields.

    Args:
        stored: the target's own catalogue.
        tables: the row-wise ones by position, and their layouts.

    Attributes:
        tensors: the catalogue: ``NAME.code``, ``NAME.scale`` and ``NAME.bias`` in the place of a table.

    Raises:
        SelectionError: a tensor is no such table, or a name is taken.
    """

    def __init__(self, stored: Sequence[Tensor], tables: Mapping[int, Rowwise]) -> None:
        self.tensors: list[Tensor] = []
        self.parts: list[_Part] = []
        for base, tensor in enumerate(stored):
            if base not in tables:
                self.tensors.append(tensor)
                self.parts.append(_Part(base))
                continue
            row = fitted(tables[base], tensor)
            for field in FIELDS:
                self.tensors.append(_field(tensor, row, field))
                self.parts.append(_Part(base, row, field))
        names = {t.name for t in stored}
        taken = next(
            (t.name for t, p in zip(self.tensors, self.parts, strict=True) if p.row and t.name in names), None
        )
        if taken is not None:
            raise SelectionError(
                f"{taken} would be a field of a row-wise table, and there is a tensor of that name"
            )

    def read(self, read: Read, tensor: int, words: Positions) -> NDArray[Any]:
        """Words of one tensor at ascending positions.

        Args:
            read: hands out words of stored tensors at ascending positions.
            tensor: position in the split catalogue.
            words: of it.
        """
        part, number = self.parts[tensor], self.tensors[tensor].number
        if part.row is None:
            return read(part.base, words)
        at, shift = _places(part.row, part.field, words)
        size = number.word_size
        wanted, back = np.unique(at[:, None] + np.arange(size), return_inverse=True)
        raw = np.ascontiguousarray(read(part.base, wanted).astype(np.uint8)[back.reshape(-1, size)])
        if shift is None:
            return raw.view(f"<u{size}")[:, 0].astype(number.word_dtype)
        return raw[:, 0] >> shift & np.uint8((1 << number.part_width) - 1)

    def of_rows(self, tensor: int, rows: NDArray[np.uint8]) -> NDArray[Any]:
        """The words of a field in some whole rows, in order.

        Args:
            tensor: position in the split catalogue.
            rows: uint8[rows, bytes of a row].
        """
        from ckptflip.recsys.tables.quantised import unpacked

        part, size = self.parts[tensor], self.tensors[tensor].number.word_size
        assert part.row is not None
        if part.field == "code":
            return unpacked(rows, part.row).reshape(-1)
        at = part.row.offset(part.field)
        return np.ascontiguousarray(rows[:, at : at + size]).view(f"<u{size}")[:, 0].astype(f"u{size}")

    def stored_words(self, tensor: int, words: Positions) -> Positions:
        """Which words of the stored tensor hold these, ascending, each once."""
        part = self.parts[tensor]
        if part.row is None:
            return words
        at, _ = _places(part.row, part.field, words)
        return np.unique(at[:, None] + np.arange(self.tensors[tensor].number.word_size))

    def stored_changes(self, changes: Changes) -> Changes:
        """Changes to the split catalogue as changes to the stored one."""
        columns: list[tuple[NDArray[np.int32], Positions, NDArray[np.uint64], NDArray[np.uint64]]] = []
        for tensor, rows in changes.by_tensor():
            words, masks, faults = changes.word[rows], changes.mask[rows], changes.fault[rows]
            part = self.parts[tensor]
            if part.row is not None:
                words, masks, faults = self._as_bytes(tensor, words, masks, faults)
            columns.append((np.full(words.size, part.base, np.int32), words, masks, faults))
        if not columns:
            return changes
        base, word, mask, fault = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.lexsort((word, base))
        base, word, mask, fault = base[order], word[order], mask[order], fault[order]
        firsts = np.flatnonzero((np.diff(base, prepend=-1) != 0) | (np.diff(word, prepend=-1) != 0))
        # Two codes of one byte have bits of their own.
        mask, fault = (np.bitwise_or.reduceat(m, firsts) for m in (mask, fault))
        return Changes(base[firsts], word[firsts], mask, fault)

    def _as_bytes(
        self, tensor: int, words: Positions, masks: NDArray[np.uint64], faults: NDArray[np.uint64]
    ) -> tuple[Positions, NDArray[np.uint64], NDArray[np.uint64]]:
        """Masks of words of a field as masks of stored bytes; bytes of a word that no fault hits left out."""
        part, size = self.parts[tensor], self.tensors[tensor].number.word_size
        assert part.row is not None
        at, shift = _places(part.row, part.field, words)
        if shift is not None:
            return at, masks << shift.astype(np.uint64), faults << shift.astype(np.uint64)
        steps = np.arange(size)
        each = (at[:, None] + steps).reshape(-1)
        wide = [
            (m[:, None] >> (8 * steps).astype(np.uint64) & np.uint64(0xFF)).reshape(-1)
            for m in (masks, faults)
        ]
        hit = wide[1] != 0
        return each[hit], wide[0][hit], wide[1][hit]


def tables_of(policies: Sequence[Policy], stored: Sequence[Tensor]) -> dict[int, Rowwise]:
    """The tables that policies say are row-wise quantised.

    Args:
        policies: those with `rowwise` say so of the tensors they select.
        stored: the target's own catalogue.

    Raises:
        SelectionError: a policy selects nothing.
        UsageError: two policies say different things of one table.
    """
    found: dict[int, Rowwise] = {}
    named: list[Tensor] = []
    for policy in policies:
        if policy.rowwise is None:
            continue
        named = named or [replace(t, aliases=(*t.aliases, *_field_names(t))) for t in stored]
        layout = parse(policy.rowwise)
        # A field that is left out leaves its table a table.
        names = [n for n in policy.tensors if not n.startswith("!")]
        unwanted = [n.removeprefix("!") for n in policy.tensors if n.startswith("!")]
        for i in select(named, names=names, layers=policy.layers, roles=policy.roles):
            if any(matches(n, glob) for n in (stored[i].name, *stored[i].aliases) for glob in unwanted):
                continue
            if found.setdefault(i, layout) != layout:
                raise UsageError(
                    f"{stored[i].name} is said to be {found[i].name} and {layout.name}; it can be only one"
                )
    return found


def recorded_tables(entries: Sequence[TensorEntry], stored: Sequence[Tensor]) -> dict[int, Rowwise]:
    """The tables whose fields a record hits, as far as they are in a target and can be such tables.

    Args:
        entries: the record's tensors.
        stored: the target's own catalogue.
    """
    found: dict[int, Rowwise] = {}
    names: dict[str, int] = {}
    for entry in entries:
        layout = layout_of(entry.layout)
        if layout is None:
            continue
        names = names or positions_by_name(stored)
        known = [n.rpartition(".")[0] for n in (entry.name, *entry.aliases, bare_name(entry.name))]
        at = next((names[n] for n in known if n in names), None)
        if at is None:
            continue
        try:
            fitted(layout, stored[at])
        except SelectionError:
            continue  # whoever looks for the record's tensors says what is there instead
        found[at] = layout
    return found


def _field_names(tensor: Tensor) -> list[str]:
    return [f"{name}.{field}" for name in (tensor.name, *tensor.aliases) for field in FIELDS]


def _field(tensor: Tensor, row: Row, field: str) -> Tensor:
    shape = (tensor.shape[0], row.dim) if field == "code" else tensor.shape[:1]
    return replace(
        tensor,
        name=f"{tensor.name}.{field}",
        shape=shape,
        number=row.number(field),
        order="<",
        aliases=tuple(f"{alias}.{field}" for alias in tensor.aliases),
        layout=described(row, tensor.layout),
        offset=None if tensor.offset is None else tensor.offset + row.offset(field),
        shards=_shards(tensor, row, shape),
    )


def _shards(tensor: Tensor, row: Row, shape: tuple[int, ...]) -> tuple[Shard, ...]:
    """Which rank wrote which rows of a field; () where the bytes of a row were shared out."""
    if any(s.start[1] != 0 or s.shape[1] != row.width for s in tensor.shards):
        return ()
    return tuple(
        Shard(s.rank, (s.start[0], *(0 for _ in shape[1:])), (s.shape[0], *shape[1:])) for s in tensor.shards
    )


def _places(row: Row, field: str, words: Positions) -> tuple[Positions, NDArray[np.uint8] | None]:
    """The byte of a table that words of a field begin in; of packed codes, their lowest bit in it."""
    if field != "code":
        return words * row.width + row.offset(field), None
    rows, columns = np.divmod(words, row.dim)
    first = rows * row.width + row.offset(field)
    if row.layout.bits == 8:
        return first + columns, None
    bits = columns * row.layout.bits
    return first + (bits >> 3), (bits & 7).astype(np.uint8)
