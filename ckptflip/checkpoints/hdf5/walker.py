"""Walking an HDF5 file: every dataset once, by storage, with all its names."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5l, h5o, h5s, h5t
from msgspec import Struct
from msgspec.structs import replace

from ckptflip.checkpoints.hdf5 import types
from ckptflip.checkpoints.hdf5.window import Window
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.roles import guess
from ckptflip.checkpoints.target import Skipped
from ckptflip.faults.catalogue import Tensor

# Hard links may form cycles, and nested ones multiply names without end: beyond this many visits,
# no more aliases.
_MOST_ALIAS_VISITS = 100_000
_MOST_DEPTH = 200
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scale-offset", 32000: "lzf"}
FLETCHER32 = 3
_SCALE_OFFSET = 6
_LARGE_CLAIM = 1 << 34


class Dataset(Struct, frozen=True):
    """Where one dataset keeps its records.

    Attributes:
        key: its path in the file, as stored.
        shape: its shape in records; () for a scalar.
        record: bytes of one record.
        kind: ``flat`` (contiguous), ``external``, ``chunked``, or ``library`` (compact, unallocated and
            virtual: only the HDF5 library reaches them).
        offset: for ``flat``, the first byte.
        segments: for ``external``, (file name, offset, bytes) in order.
        chunk: for ``chunked``, the chunks' shape.
        filters: for ``chunked``, the filters' numbers in pipeline order.
        virtual: whether the library gathers it from other files.
    """

    key: bytes
    shape: tuple[int, ...]
    record: int
    kind: str
    offset: int = 0
    segments: tuple[tuple[str, int, int], ...] = ()
    chunk: tuple[int, ...] = ()
    filters: tuple[int, ...] = ()
    virtual: bool = False

    @property
    def records(self) -> int:
        """How many records there are."""
        return prod(self.shape)

    @property
    def coded(self) -> bool:
        """Whether chunks are stored other than byte for byte (Fletcher-32 leaves the bytes alone)."""
        return any(f != FLETCHER32 for f in self.filters)


class Found(Struct):
    """What a walk found: `tensors[i]` is `fields[i]` of `datasets[i]`."""

    tensors: list[Tensor] = []
    datasets: list[Dataset] = []
    fields: list[types.Field] = []
    skipped: list[Skipped] = []
    marks: Marks = Marks()


def walk(file: Any, size: int, user_block: int, member: Window | None = None) -> Found:
    """List the tensors of an open HDF5 file.

    Args:
        file: the low-level file identifier.
        size: bytes in the file, to check offsets against.
        user_block: bytes before HDF5's own first byte.
        member: where the HDF5 file lies in another one; offsets are then given in that one.
    """
    return _Walk(file, size, user_block, member).run()


class _Walk:
    def __init__(self, file: Any, size: int, user_block: int, member: Window | None) -> None:
        self._root = h5g.open(file, b"/")
        self._size = size
        # A file inside another one has no folder in which other files could lie.
        self._home = None if member is not None else Path(os.fsdecode(h5f.get_name(file))).parent
        self._start = 0 if member is None else member.start
        self._user_block = user_block
        self._found = Found()
        self._vars: dict[str, str] = {}
        self._layers: str | None = None
        self._at: dict[int, tuple[int, int]] = {}
        self._aliases: dict[int, list[str]] = {}
        self._group_names: dict[int, bytes] = {}
        self._later: list[tuple[bytes, bytes]] = []
        self._visits = 0
        self._number = 0

    def run(self) -> Found:
        root = h5o.get_info(self._root)
        self._number = root.fileno
        self._group_names[root.addr] = b""
        self._group(self._root, b"", 0)
        self._tell_apart()
        for alias, target in self._later:
            self._alias(alias, target)
        for address, names in self._aliases.items():
            for i in range(*self._at[address]):
                tensor = self._found.tensors[i]
                suffix = self._found.fields[i].suffix
                aliases = tuple(dict.fromkeys(n + suffix for n in names if n + suffix != tensor.name))
                self._found.tensors[i] = replace(tensor, aliases=aliases)
        self._found.marks = Marks(self._vars, self._layers)
        return self._found

    def _tell_apart(self) -> None:
        """Give every tensor a name of its own: field x of dataset c and a dataset c.x are both ``c.x``."""
        tensors, fields = self._found.tensors, self._found.fields
        taken: set[str] = set()
        # Whole datasets first: the name of one is its path.
        for i in sorted(range(len(tensors)), key=lambda i: fields[i].suffix != ""):
            name, number = tensors[i].name, 2
            while name in taken:
                name, number = f"{tensors[i].name}~{number}", number + 1
            taken.add(name)
            if name != tensors[i].name:
                tensors[i] = replace(tensors[i], name=name)

    def _group(self, group: Any, prefix: bytes, depth: int) -> None:
        if depth > _MOST_DEPTH:
            self._skip(prefix, f"groups nested more than {_MOST_DEPTH} deep")
            return
        names = list(group)
        siblings: set[str] | None = None
        given = _text_attribute(group, b"name")
        if prefix == b"vars/" or prefix.endswith(b"/vars/"):
            self._vars[_text(prefix[:-1])] = given
        elif prefix in (b"", b"model_weights/") and (
            h5a.exists(group, b"layer_names") or h5a.exists(group, b"layer_names0")
        ):
            self._layers = prefix.decode()
        for name in names:
            path = prefix + name
            link = group.links.get_info(name).type
            if link == h5l.TYPE_SOFT:
                self._later.append((path, b"/".join([prefix.rstrip(b"/"), name])))
                continue
            if link != h5l.TYPE_HARD:
                self._skip(path, "a link to another file; name that file instead")
                continue
            member = h5o.open(group, name)
            if isinstance(member, h5d.DatasetID):
                if siblings is None:
                    siblings = {_text(n) for n in names}
                self._dataset(member, path, siblings, given)
            elif isinstance(member, h5g.GroupID):
                address = h5o.get_info(member).addr
                if address in self._group_names:
                    self._later.append((path, self._group_names[address]))
                else:
                    self._group_names[address] = path
                    self._group(member, path + b"/", depth + 1)

    def _alias(self, alias: bytes, target: bytes, above: frozenset[int] = frozenset()) -> None:
        """Note that `alias` is another name of the dataset, or of all datasets in the group, at `target`."""
        self._visits += 1
        if self._visits > _MOST_ALIAS_VISITS:
            if self._visits == _MOST_ALIAS_VISITS + 1:
                self._skip(
                    alias,
                    "more aliases than can be listed; the tensors are all there under their first names",
                )
            return
        try:
            member = h5o.open(self._root, target or b"/")
        except (
            KeyError,
            OSError,
            RuntimeError,
        ):  # nothing there; a file that is not there; a circle of links
            self._skip(alias, "a dangling link")
            return
        info = h5o.get_info(member)
        if info.fileno != self._number:
            self._skip(alias, "a link to another file; name that file instead")
            return
        if isinstance(member, h5d.DatasetID):
            if info.addr in self._at:
                self._aliases.setdefault(info.addr, []).append(_text(alias))
            return
        if isinstance(member, h5g.GroupID):
            home = self._group_names.get(info.addr)
            # A group that holds itself would give names without end.
            if home is None or info.addr in above or (alias + b"/").startswith(home + b"/" if home else b""):
                return
            for name in member:
                if member.links.get_info(name).type == h5l.TYPE_HARD:
                    self._alias(alias + b"/" + name, home + b"/" + name, above | {info.addr})

    def _dataset(self, dataset: Any, path: bytes, siblings: set[str], given: str) -> None:
        address = h5o.get_info(dataset).addr
        if address in self._at:
            self._aliases.setdefault(address, []).append(_text(path))
            return
        start = len(self._found.tensors)
        try:
            self._tensors(dataset, path, siblings, given)
        except types.NotNumbersError as why:
            self._skip(path, str(why))
        self._at[address] = (start, len(self._found.tensors))

    def _tensors(self, dataset: Any, path: bytes, siblings: set[str], given: str) -> None:
        if dataset.get_space().get_simple_extent_type() == h5s.NULL:
            raise types.NotNumbersError("null: it has a type but no elements")
        kind = dataset.get_type()
        named = _text_attribute(dataset, b"dtype") if kind.get_class() in (h5t.INTEGER, h5t.OPAQUE) else ""
        found = types.fields(kind, named)
        shape = dataset.shape
        place, layout = self._place(dataset, path, shape, kind.get_size())
        name = _text(path)
        for each in found:
            whole = shape + each.shape
            layer, role = guess(name + each.suffix, each.number, len(whole), siblings, given)
            offset = place.offset + each.offset if place.kind == "flat" else None
            tensor = Tensor(
                name + each.suffix, whole, each.number, each.order, layer, role, (), layout, offset
            )
            self._found.tensors.append(tensor)
            self._found.datasets.append(place)
            self._found.fields.append(each)

    def _place(self, dataset: Any, path: bytes, shape: tuple[int, ...], record: int) -> tuple[Dataset, str]:
        creation = dataset.get_create_plist()
        layout = creation.get_layout()
        if layout == h5d.CONTIGUOUS:
            if creation.get_external_count():
                self._check_home()
                segments = tuple(
                    (name.decode("utf-8", "surrogateescape"), offset, length)
                    for name, offset, length in map(
                        creation.get_external, range(creation.get_external_count())
                    )
                )
                return Dataset(path, shape, record, "external", segments=segments), "external"
            offset = dataset.get_offset()
            # With a user block, HDF5 adds its length even to "nowhere", the largest address.
            if offset is None or offset < self._user_block:
                _check_claim(prod(shape) * record)
                return Dataset(path, shape, record, "library"), "unallocated"
            if offset + prod(shape) * record > self._size:
                raise types.NotNumbersError(
                    f"damaged: its data would end at byte {offset + prod(shape) * record} "
                    f"of a file of {self._size} bytes"
                )
            return Dataset(path, shape, record, "flat", self._start + offset), "contiguous"
        if layout == h5d.CHUNKED:
            return self._chunked(dataset, creation, path, shape, record)
        if layout == h5d.COMPACT:
            return Dataset(path, shape, record, "library"), "compact"
        self._check_view(creation)
        return Dataset(path, shape, record, "library", virtual=True), "virtual"

    def _chunked(
        self, dataset: Any, creation: Any, path: bytes, shape: tuple[int, ...], record: int
    ) -> tuple[Dataset, str]:
        if prod(shape) * record > _LARGE_CLAIM and not dataset.get_num_chunks():
            _check_claim(prod(shape) * record)
        pipeline = [creation.get_filter(i) for i in range(creation.get_nfilters())]
        filters = tuple(f[0] for f in pipeline)
        names = [_FILTERS.get(f[0], f"filter {f[0]}") for f in pipeline]
        if not creation.all_filters_avail():
            raise types.NotNumbersError(f"compressed by a filter that is not installed ({', '.join(names)})")
        for number, _, options, _ in pipeline:
            # Options: the scale type (2 for integers), then the bits kept (0: as many as it takes, lossless).
            if number == _SCALE_OFFSET and options[:2] != (2, 0):
                raise types.NotNumbersError(
                    "kept by a lossy filter (scale-offset), which cannot store altered words exactly"
                )
        layout = ", ".join(["chunked", *names])
        if _is_misnumbered(dataset):
            return Dataset(path, shape, record, "library", filters=filters), layout
        return Dataset(path, shape, record, "chunked", chunk=creation.get_chunk(), filters=filters), layout

    def _check_home(self) -> Path:
        """The folder in which other files of the checkpoint lie."""
        if self._home is None:
            raise types.NotNumbersError("kept outside the archive")
        return self._home

    def _check_view(self, creation: Any) -> None:
        """Refuse views that hold nothing of their own, or that HDF5 could follow without end."""
        home = self._check_home()
        maps = range(creation.get_virtual_count())
        sources = [(creation.get_virtual_filename(i), creation.get_virtual_dsetname(i)) for i in maps]
        if all(file == "." for file, _ in sources):
            raise types.NotNumbersError("a view of other datasets in this file, which are listed themselves")
        for file, name in sources:
            if file == "." or "%" in file + name:
                raise types.NotNumbersError(
                    "a view of this and other files, or of a numbered series of files"
                )
            path = home / file
            if path.is_file() and _is_view(path, name):
                raise types.NotNumbersError(f"a view of a view in {file}; name the file that holds the data")

    def _skip(self, path: bytes, reason: str) -> None:
        self._found.skipped.append(Skipped(_text(path), reason))


def _is_view(path: Path, name: str) -> bool:
    """Whether a dataset of another file is virtual itself."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = file.get(name)
            return isinstance(found, h5py.Dataset) and found.is_virtual
    except (OSError, RuntimeError):
        return False  # unreadable sources read as fill values


def _check_claim(size: int) -> None:
    """Refuse a dataset of a size that a few bytes can claim: nothing of it was ever written."""
    if size > _LARGE_CLAIM:
        raise types.NotNumbersError(f"claims {size} bytes, none of which was ever written")


def _is_misnumbered(dataset: Any) -> bool:
    """Whether HDF5 may give wrong coordinates for the chunks.

    Newer files keep the chunks of a dataset with one unlimited axis in an extensible array, that axis first;
    HDF5 (2.0 at least) forgets to put the axes back in order when it is asked where a chunk lies.
    """
    most = dataset.get_space().get_simple_extent_dims(maxdims=True)
    unlimited = [axis for axis, length in enumerate(most) if length == h5s.UNLIMITED]
    return len(unlimited) == 1 and unlimited != [0]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _text_attribute(owner: Any, name: bytes) -> str:
    """A short text attribute, or "" where there is none."""
    if not h5a.exists(owner, name):
        return ""
    attribute = h5a.open(owner, name)
    if attribute.get_space().get_simple_extent_type() == h5s.NULL:
        return ""
    if attribute.get_storage_size() > 4096 or attribute.shape not in ((), (1,)):
        return ""
    if h5py.check_string_dtype(attribute.dtype) is None:
        return ""
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    text = value.reshape(-1)[0]
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
