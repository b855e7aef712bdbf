"""The policy: what may be hit, how much and how. From options, from Python or from TOML."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ckptflip.bits import BitSpec
from ckptflip.bits.values import EXTREME
from ckptflip.errors import UsageError
from ckptflip.faults import elements, models, ranks, rowwise
from ckptflip.faults.catalogue import expand_roles
from ckptflip.faults.stream import check_seed

DESIGNS = ("uniform", "tensor", "layer")
MOST_POLICIES = 16
# Fields that hold several strings.
_LISTS = ("tensors", "layers", "roles", "fields", "forbid")


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What may be hit (tensors × elements × bits), how much, and how.

    One of `count`, `fraction` and `ber` says how much; with none of them, one fault is drawn. The unit is a
    bit for flips and stuck-at faults, a placement for bursts and masks, a word for scale and value. A string
    in place of a list is a list of one.

    Attributes:
        tensors: globs on tensor names; ``!glob`` excludes.
        layers: globs on layer names, likewise.
        roles: roles or role groups.
        rows: rows of each tensor's first axis, such as ``"0-99,200"``, or ``"hot:1%"`` and ``"cold:1000"``,
            those read most or least.
        rows_weight: the file that says how often each row was read: npy, or npz with an array per table.
        slice: one slice per axis, such as ``"0:16,:,3"``; instead of `rows`.
        rowwise: the selected tensors are row-wise quantised tables in this layout, such as ``"int8"``, see
            `ckptflip.faults.rowwise.parse`; their codes, scales and biases are tensors of their own.
        fields: of such tables: ``code``, ``scale``, ``bias``; all unless given.
        ranks: parts that these ranks of a distributed run wrote: ``"0,2-3"``, or ``"2 of 8"``, drawn.
        bits: which bits of an element, see `ckptflip.bits.BitSpec`.
        count: this many faults, distinct.
        fraction: this share of all eligible units, distinct (rounded to the nearest whole number).
        ber: each eligible unit is hit independently with this probability.
        fault: the fault model, see `ckptflip.faults.models.parse`.
        design: ``uniform`` over eligible units; ``tensor`` or ``layer`` draws one of those first, each
            with the same chance.
        forbid: results to redraw: ``nan``, ``inf``, ``extreme`` or ``extreme:1e10``.

    Raises:
        UsageError: values that make no sense, alone or together.

    Example:
        >>> Policy(bits="exponent", count=10).amount
        '10 faults'
        >>> Policy(tensors="emb_l.*").tensors
        ('emb_l.*',)
    """

    tensors: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    rows: str | None = None
    rows_weight: str | None = None
    slice: str | None = None
    rowwise: str | None = None
    fields: tuple[str, ...] = ()
    ranks: str | None = None
    bits: str = "all"
    count: int | None = None
    fraction: float | None = None
    ber: float | None = None
    fault: str = "flip"
    design: str = "uniform"
    forbid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        model = models.parse(self.fault)
        BitSpec(self.bits)
        elements.check(self.rows, self.slice)
        self._check_tables()
        ranks.check(self.ranks)
        expand_roles(self.roles)
        self.guards()
        given = [n for n in ("count", "fraction", "ber") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} were both given; say how much in one way")
        if self.count is not None and self.count < 1:
            raise UsageError(f"count must be at least 1, not {self.count}")
        for name in ("fraction", "ber"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{name} must be above 0 and at most 1, not {share}")
        if self.design not in DESIGNS:
            raise UsageError(f"design {self.design!r} is not one of {', '.join(DESIGNS)}")
        if self.ber is not None and self.design != "uniform":
            raise UsageError(f"ber gives every bit the same chance; it cannot be drawn per {self.design}")
        if model.hits_words and self.bits != "all":
            raise UsageError(
                f"fault {self.fault!r} changes whole words; it cannot be limited to bits {self.bits!r}"
            )

    def _check_types(self) -> None:
        """Give every field its declared type; lists become tuples, numpy's numbers Python's."""
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            plain = value.item() if isinstance(value, np.generic) else value
            if isinstance(plain, str) and field.name in _LISTS:
                plain = (plain,)
            try:
                typed = msgspec.convert(plain, field.type)
            except msgspec.ValidationError as error:
                raise UsageError(f"{field.name} {value!r} is of the wrong kind: {error}") from None
            msgspec.structs.force_setattr(self, field.name, typed)

    def _check_tables(self) -> None:
        if elements.by_access(self.rows) != (self.rows_weight is not None):
            if self.rows_weight is None:
                raise UsageError(
                    f"rows {self.rows!r} needs to know how often each row was read: name the file of access "
                    "counts with rows_weight (on the command line --rows-weight)"
                )
            raise UsageError("rows_weight was given, and rows asks for no hot:1% or cold:1% of them")
        if self.rowwise is not None:
            rowwise.parse(self.rowwise)
        rowwise.check_fields(self.fields)

    @property
    def amount(self) -> str:
        """How much, in words."""
        if self.ber is not None:
            return f"BER {self.ber:g}"
        if self.fraction is not None:
            return f"a fraction of {self.fraction:g}"
        count = 1 if self.count is None else self.count
        return f"{count} fault{'s' * (count != 1)}"

    @property
    def selection(self) -> str:
        """Which tensors and elements, in words."""
        names = ("tensors", "layers", "roles", "rowwise", "fields", "rows", "rows_weight", "slice", "ranks")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        said = [f"{k} {v if isinstance(v, str) else ', '.join(v)}" for k, v in given.items()]
        return " and ".join(said) or "all tensors"

    def guards(self) -> dict[str, float]:
        """The forbidden results; the value is a threshold and only matters for ``extreme``."""
        found: dict[str, float] = {}
        for spec in self.forbid:
            kind, colon, argument = spec.partition(":")
            if kind in ("nan", "inf") and not colon:
                found[kind] = 0.0
                continue
            try:
                threshold = float(argument) if colon else EXTREME
            except ValueError:
                threshold = -1.0
            if kind != "extreme" or not threshold > 0:
                raise UsageError(f"forbid {spec!r} is not nan, inf, extreme or extreme:1e10")
            found[kind] = threshold
        return found


def load(path: str | Path) -> tuple[tuple[Policy, ...], int | None]:
    """Read policies from a TOML file.

    The file is one policy (its keys at top level), or several as ``[[policy]]`` tables that are applied
    together; ``seed`` may stand at top level.

    Args:
        path: the TOML file.

    Returns:
        The policies, and the seed or None.

    Raises:
        UsageError: no such file, not TOML, an unknown key or an impossible value; says where.
    """
    import tomllib

    path = Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"policy {path} is not a plain file")
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as why:
        raise UsageError(f"policy {path}: {why.strerror}") from None
    except (ValueError, RecursionError) as why:  # bad TOML, bad UTF-8, a number of 5000 digits
        raise UsageError(f"policy {path} is not TOML: {why}") from None
    seed = data.pop("seed", None)
    try:
        check_seed(0 if seed is None else seed)
    except UsageError as why:
        raise UsageError(f"policy {path}: {why}") from None
    tables = data.pop("policy", None)
    if tables is not None and data:
        raise UsageError(
            f"policy {path}: {', '.join(data)} stand beside [[policy]] tables; move them into one"
        )
    many = tables if isinstance(tables, list) else [data if tables is None else tables]
    if len(many) > MOST_POLICIES:
        raise UsageError(f"policy {path}: at most {MOST_POLICIES} policies can be combined, not {len(many)}")
    return tuple(_convert(table, path, i) for i, table in enumerate(many, 1)), seed


def _convert(table: Any, path: Path, position: int) -> Policy:
    where = f"policy {path}, policy {position}"
    if isinstance(table, dict):
        _check_keys(table, where)
        table = {k: [v] if k in _LISTS and isinstance(v, str) else v for k, v in table.items()}
    try:
        return msgspec.convert(table, Policy)
    except msgspec.ValidationError as why:
        raise UsageError(f"{where}: {why}") from None


def _check_keys(table: dict[str, Any], where: str) -> None:
    if "seed" in table:
        raise UsageError(f"{where}: seed belongs at top level, before the tables")
    known = Policy.__struct_fields__
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{where}: there is no key {key!r}; {hint}")


def combine(policies: Policy | Sequence[Policy]) -> tuple[Policy, ...]:
    """One or several policies as a tuple.

    Raises:
        UsageError: none at all, more than `MOST_POLICIES`, or something else than policies.
    """
    several = (policies,) if isinstance(policies, Policy) else _each(policies)
    if not 1 <= len(several) <= MOST_POLICIES:
        raise UsageError(f"between 1 and {MOST_POLICIES} policies can be combined, not {len(several)}")
    return several


def _each(policies: Any) -> tuple[Policy, ...]:
    several = tuple(policies) if isinstance(policies, Iterable) else (policies,)
    other = next((one for one in several if not isinstance(one, Policy)), None)
    if other is not None or isinstance(policies, str):
        raise UsageError(
            f"a policy is a ckptflip.Policy, such as Policy(bits='exponent', count=3), not {policies!r}"
        )
    return several
