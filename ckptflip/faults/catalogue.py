"""The catalogue: what a target says of its tensors, and how a user names some of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from math import prod

from msgspec import Struct

from ckptflip.bits import NumberFormat
from ckptflip.errors import SelectionError, UsageError

ROLES = ("weight", "bias", "norm", "statistic", "embedding", "optimizer", "counter", "rng", "other")
# Names that stand for several roles at once.
ROLE_GROUPS = {
    "model": ("weight", "bias", "norm", "statistic", "embedding"),
    "state": ("optimizer", "counter", "rng"),
}


class Shard(Struct, frozen=True, gc=False):
    """The part of a tensor that one rank of a distributed run wrote.

    Attributes:
        rank: its number.
        start: where the part begins along each axis.
        shape: its elements along each axis.
    """

    rank: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Tensor(Struct, frozen=True, gc=False):
    """One storage of numbers in a target, under its first name.

    Attributes:
        name: unique in the target.
        shape: elements along each axis; `()` for a scalar.
        number: the format of one element.
        order: byte order of the stored words, ``<`` or ``>``.
        layer: the layer it belongs to, guessed; may be empty.
        role: one of `ROLES`, guessed.
        aliases: the other names of the same storage.
        layout: how the target keeps it, such as ``contiguous`` or ``chunked, gzip``.
        offset: where its first byte lies in the file, or None where that has no single answer.
        shards: which rank wrote which part, disjoint; empty where the target does not tell.
    """

    name: str
    shape: tuple[int, ...]
    number: NumberFormat
    order: str = "<"
    layer: str = ""
    role: str = "other"
    aliases: tuple[str, ...] = ()
    layout: str = "contiguous"
    offset: int | None = None
    shards: tuple[Shard, ...] = ()

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def words(self) -> int:
        """Words: elements, or twice as many for complex numbers."""
        return self.size * self.number.parts

    @property
    def nbytes(self) -> int:
        """Bytes of all words, as stored without compression."""
        return self.words * self.number.word_size

    @property
    def dtype(self) -> str:
        """The dtype's name, with a leading ``>`` where it is stored big-endian."""
        return (">" if self.order == ">" else "") + self.number.name


def listed(given: str | Iterable[str]) -> tuple[str, ...]:
    """A single string as a list of one.

    Example:
        >>> listed("conv1"), listed(["conv1", "fc"])
        (('conv1',), ('conv1', 'fc'))
    """
    return (given,) if isinstance(given, str) else tuple(given)


# Outermost keys under which training loops keep a model: its tensors are known by the rest of their names.
_OUTERMOST = ("model", "model_state_dict", "state_dict", "params", "module", "weights")


def bare_name(name: str) -> str:
    """A name without the outermost container of a model.

    Example:
        >>> bare_name("state_dict/conv1.weight"), bare_name("params/conv1/kernel"), bare_name("conv1/kernel")
        ('conv1.weight', 'conv1/kernel', 'conv1/kernel')
    """
    outer, slash, rest = name.partition("/")
    return rest if slash and rest and outer in _OUTERMOST else name


def matches(name: str, pattern: str) -> bool:
    """Whether a glob selects a name: all of it, or a part of it that ends at a ``/`` or a ``.``.

    The outermost container of a model (``model/``, ``state_dict/``, ``params/`` …) may be left out, and a
    pattern without ``/`` may also match from the start of the name's last path component. So ``conv1``
    selects ``model/conv1.weight`` and ``params/conv1/kernel``, and never ``model/conv10.weight``. A name
    always selects itself, also one with brackets such as ``groups[0]``.

    Example:
        >>> matches("model/conv1.weight", "conv1"), matches("model/conv10.weight", "conv1")
        (True, False)
        >>> matches("layers/dense/vars/0", "layers/dense"), matches("layers/dense_1/vars/0", "layers/dense")
        (True, False)
    """
    return _Glob(pattern)(name)


class _Glob:
    """A glob ready to be asked about many names."""

    def __init__(self, pattern: str) -> None:
        self._literal = pattern = pattern.strip("/")
        # fnmatch anchors its expression at the end of the string; here a name may end at a separator too.
        body = fnmatch.translate(pattern)[:-2]
        self._match = re.compile(rf"{body}(?=[/.]|\Z)").match
        self._bare = "/" not in pattern

    def __call__(self, name: str) -> bool:
        name = name.strip("/")
        if name == self._literal or self._match(name) or self._match(bare_name(name)):
            return True
        return self._bare and self._match(name.rpartition("/")[2]) is not None


def select(
    tensors: Sequence[Tensor],
    *,
    names: Iterable[str] = (),
    layers: Iterable[str] = (),
    roles: Iterable[str] = (),
) -> list[int]:
    """Positions of the tensors that satisfy every given condition; an empty condition is satisfied by all.

    Args:
        tensors: a catalogue.
        names: globs on names and aliases (see `matches`); ``!glob`` takes tensors away.
        layers: globs on layers, likewise.
        roles: of `ROLES` and `ROLE_GROUPS`.

    Raises:
        SelectionError: a glob, or all conditions together, select nothing.
        UsageError: no such role.
    """
    names, layers, roles = tuple(names), tuple(layers), tuple(roles)
    wanted_roles = expand_roles(roles)
    chosen = set(range(len(tensors)))
    chosen &= _by_glob(tensors, names, "tensors", lambda t: (t.name, *t.aliases))
    chosen &= _by_glob(tensors, layers, "layers", lambda t: (t.layer,))
    if wanted_roles:
        chosen = {i for i in chosen if tensors[i].role in wanted_roles}
    if not chosen:
        raise SelectionError(_nothing(tensors, names, layers, roles))
    return sorted(chosen)


def expand_roles(roles: Iterable[str]) -> frozenset[str]:
    """Roles, with groups such as ``model`` spelt out.

    Raises:
        UsageError: no such role.
    """
    wanted: set[str] = set()
    for role in roles:
        if role not in ROLES and role not in ROLE_GROUPS:
            import difflib

            near = difflib.get_close_matches(role, [*ROLES, *ROLE_GROUPS], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join([*ROLES, *ROLE_GROUPS])}"
            raise UsageError(f"no role is called {role!r}; {hint}")
        wanted.update(ROLE_GROUPS.get(role, (role,)))
    return frozenset(wanted)


def _by_glob(
    tensors: Sequence[Tensor],
    globs: Sequence[str],
    option: str,
    names_of: Callable[[Tensor], tuple[str, ...]],
) -> set[int]:
    """Positions selected by globs: the union of the plain ones (all, if none) less the ``!`` ones."""
    wanted: set[int] = set()
    unwanted: set[int] = set()
    for glob in globs:
        pattern = _Glob(glob.removeprefix("!"))
        hit = {i for i, t in enumerate(tensors) if any(pattern(n) for n in names_of(t))}
        if not hit:
            known = {n for t in tensors for n in names_of(t)}
            raise SelectionError(_no_match(glob.removeprefix("!"), option, known))
        if glob.startswith("!"):
            unwanted |= hit
        else:
            wanted |= hit
    if all(g.startswith("!") for g in globs):
        wanted = set(range(len(tensors)))
    return wanted - unwanted


def _no_match(glob: str, option: str, known: set[str]) -> str:
    import difflib

    names = sorted(n for n in known if n)
    spoken = {part: n for n in names for part in (n, *n.split("/"), n.rpartition(".")[0])}
    # A part that is spelt right is no answer: then the whole name is.
    holding = next((n for n in names if glob in re.split(r"[/.]", n)), None)
    near = difflib.get_close_matches(glob, [p for p in spoken if p != glob], 1, cutoff=0.5)
    if holding is not None:
        hint = f"did you mean {holding!r}?"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    elif names:
        hint = f"there are {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
    else:
        hint = "the target has none"
    return f"{option} {glob!r} matches nothing; {hint} (`ckptflip ls` lists all)"


def _nothing(
    tensors: Sequence[Tensor], names: Sequence[str], layers: Sequence[str], roles: Sequence[str]
) -> str:
    if not tensors:
        return "the target holds no tensor whose bits can be altered"
    present = sorted({t.role for t in tensors})
    conditions = (("tensors", names), ("layers", layers), ("roles", roles))
    asked = " and ".join(f"{option} {', '.join(given)}" for option, given in conditions if given)
    return f"no tensor satisfies {asked} together; the target has the roles {', '.join(present)}"
