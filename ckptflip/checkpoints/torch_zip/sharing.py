"""Tensors that share a storage: which of them are the same words, which are apart, which overlap.

A word must be in the catalogue once, whatever the number of its names. Views of the same words are one
tensor, and those of them with the same shape and strides are its aliases; element 5 of a transposed view is
another word, so other views give no names. Views that overlap in part are one tensor as well: a run of
words from the first to the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from msgspec import Struct

from ckptflip.bits.formats import lookup_name
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.pieces import Layout, Piece, contiguous, strides_of
from ckptflip.checkpoints.torch_zip.dtypes import Dtype
from ckptflip.checkpoints.torch_zip.trees import View

_SHARED = "views of one storage"
# The shape is not that of the tensor's name: views overlap in part, or an axis repeats the same words.
RUN = "run of overlapping views"
EXPANDED = "expanded"
# Views between which it is worked out whether they are apart; more of them at once count as overlapping.
_MOST_TOGETHER = 256
_MOST_PAIRS = 1 << 20


class Shared(Struct, frozen=True):
    """One tensor of the catalogue.

    Attributes:
        view: the one that names it.
        shape: elements along each axis.
        layout: where its words lie.
        aliases: names of the other views of the same elements in the same order.
        how: the layout in words.
        views: names of views that share its words otherwise.
    """

    view: View
    shape: tuple[int, ...]
    layout: Layout
    aliases: tuple[str, ...] = ()
    how: str = "contiguous"
    views: tuple[str, ...] = ()


class _Region(Struct, frozen=True):
    """The bytes of a view: from `low` to before `high`, in steps: (count, stride), the widest first.

    Views of the same bytes have equal regions, whatever the order and the number of their axes. Steps are ()
    where a view meets a byte more than once.
    """

    low: int
    high: int
    steps: tuple[tuple[int, int], ...]

    @property
    def is_run(self) -> bool:
        """Whether it has no gaps."""
        return self.steps == ((self.high - self.low, 1),)


class _Same(Struct):
    """Views of one region: their positions."""

    region: _Region
    members: list[int]


class Storage(Struct, frozen=True):
    """Where the bytes of a storage lie.

    Attributes:
        file: position in the checkpoint's list of files.
        offset: its first byte.
        size: its bytes.
        order: byte order of its words.
    """

    file: int
    offset: int
    size: int
    order: str = "<"


class Sharing:
    """Works out what the tensors are, one storage after the other."""

    def __init__(self) -> None:
        self._pairs_left = _MOST_PAIRS

    def tensors(self, views: Sequence[View], storage: Storage) -> list[Shared]:
        """The tensors that the views of one storage come down to, in the order of their names in the file.

        Raises:
            DamagedError: a view reaches beyond the storage.
        """
        empty = [_laid(v, storage) for v in views if 0 in v.shape]
        views = [v for v in views if 0 not in v.shape]
        if len(views) == 1:
            region = _region(views[0])
            _check_inside(views[0], region, storage)
            return [*empty, _laid(views[0], storage) if region.steps else _run(views, [0], region, storage)]
        same: dict[_Region, _Same] = {}
        for i, view in enumerate(views):
            region = _region(view)
            _check_inside(view, region, storage)
            same.setdefault(region, _Same(region, [])).members.append(i)
        found = [
            each
            for cluster in _clusters(list(same.values()))
            for each in self._untangled(cluster, views, storage)
        ]
        found.sort(key=lambda f: f[0])
        return [*empty, *(shared for _, shared in found)]

    def _untangled(
        self, cluster: list[_Same], views: Sequence[View], storage: Storage
    ) -> list[tuple[int, Shared]]:
        """Tensors of views whose spans overlap, each with the position of its first name."""
        low, high = min(c.region.low for c in cluster), max(c.region.high for c in cluster)
        whole = next((c for c in cluster if (c.region.low, c.region.high) == (low, high)), None)
        if len(cluster) == 1 and cluster[0].region.steps:
            return [(cluster[0].members[0], _named(cluster[0].members, views, storage))]
        if whole is not None and whole.region.is_run:
            rest = [i for c in cluster if c is not whole for i in c.members]
            found = _named(whole.members, views, storage, tuple(views[i].name for i in sorted(rest)))
            return [(whole.members[0], found)]
        if self._all_apart(cluster):
            return [(c.members[0], _named(c.members, views, storage)) for c in cluster]
        largest = max(cluster, key=lambda c: (c.region.high - c.region.low, -c.members[0]))
        members = sorted(i for c in cluster for i in c.members)
        first = largest.members[0]
        members.remove(first)
        return [(first, _run(views, [first, *members], _Region(low, high, ()), storage))]

    def _all_apart(self, cluster: list[_Same]) -> bool:
        count = len(cluster)
        self._pairs_left -= count * count // 2
        if count > _MOST_TOGETHER or self._pairs_left < 0:
            return False
        return all(
            _apart(cluster[i].region, cluster[k].region) for i in range(count) for k in range(i + 1, count)
        )


def _region(view: View) -> _Region:
    dtype = view.dtype
    if dtype.counted:
        low = view.offset * dtype.packed // 8
        size = dtype.bytes_of(view.shape)
        return _Region(low, low + size, ((size, 1),))
    low = view.offset * dtype.itemsize
    axes = [(n, s * dtype.itemsize) for n, s in zip(view.shape, view.strides, strict=True) if n > 1 and s]
    high = low + sum((n - 1) * s for n, s in axes) + dtype.itemsize
    steps = [(dtype.itemsize, 1)]
    for count, stride in sorted(axes, key=lambda a: a[1]):
        inner_count, inner_stride = steps[-1]
        extent = sum((n - 1) * s for n, s in steps) + 1
        if stride < extent:
            return _Region(low, high, ())
        if stride == inner_count * inner_stride:
            steps[-1] = (inner_count * count, inner_stride)
        else:
            steps.append((count, stride))
    return _Region(low, high, tuple(reversed(steps)))


def _check_inside(view: View, region: _Region, storage: Storage) -> None:
    if region.high > storage.size:
        raise DamagedError(
            f"{view.name} needs {region.high} bytes of the storage {view.storage!r}, which has {storage.size}"
        )
    if view.dtype.counted and view.strides != strides_of(view.shape, 1) and max(view.shape, default=1) > 1:
        raise DamagedError(f"{view.name} is packed, but its strides {view.strides} leave gaps")


def _clusters(same: list[_Same]) -> list[list[_Same]]:
    """Regions whose spans overlap, directly or through others, together."""
    clusters: list[list[_Same]] = []
    reach = -1
    for each in sorted(same, key=lambda s: s.region.low):
        if each.region.low < reach:
            clusters[-1].append(each)
        else:
            clusters.append([each])
        reach = max(reach, each.region.high)
    return clusters


def _apart(a: _Region, b: _Region) -> bool:
    """Whether two regions surely share no byte. Decides for boxes of one array; else says no.

    Both are cut into rows of a length that divides the widest stride of each. If each has a fixed place in
    its rows, they are apart where these places are, or the rows; else what they hold of one row decides.
    """
    if a.high <= b.low or b.high <= a.low:
        return True
    if not a.steps or not b.steps:
        return False
    row = gcd(*(r.steps[0][1] for r in (a, b) if r.steps[0][1] > 1))
    if row <= 1:
        return False
    origin = min(a.low, b.low)
    (first_a, end_a, in_a), (first_b, end_b, in_b) = _in_rows(a, row, origin), _in_rows(b, row, origin)
    if in_a.high > row or in_b.high > row:
        return False
    return end_a <= first_b or end_b <= first_a or _apart(in_a, in_b)


def _in_rows(region: _Region, row: int, origin: int) -> tuple[int, int, _Region]:
    """A region cut into rows: the first one, the one after the last, and what it holds of each."""
    first, low = divmod(region.low - origin, row)
    between = [(n, s // row) for n, s in region.steps if s % row == 0]
    within = tuple((n, s) for n, s in region.steps if s % row)
    end = first + sum((n - 1) * s for n, s in between) + 1
    return first, end, _Region(low, low + sum((n - 1) * s for n, s in within) + 1, within or ((1, 1),))


def _named(
    members: Sequence[int], views: Sequence[View], storage: Storage, others: tuple[str, ...] = ()
) -> Shared:
    """A tensor after one of its views: one in C order if there is one, whichever name comes first."""
    natural = [i for i in members if views[i].strides == strides_of(views[i].shape, 1)]
    first = (natural or list(members))[0]
    found = _laid(views[first], storage)
    alike = [i for i in members if i != first and _same_elements(views[i], views[first])]
    apart = [i for i in members if i != first and i not in alike]
    named = tuple(views[i].name for i in alike)
    return Shared(
        found.view,
        found.shape,
        found.layout,
        named,
        _SHARED if others or apart else found.how,
        (*(views[i].name for i in apart), *others),
    )


def _same_elements(a: View, b: View) -> bool:
    return (a.dtype, a.offset, a.shape, a.strides) == (b.dtype, b.offset, b.shape, b.strides)


def _run(views: Sequence[View], members: Sequence[int], region: _Region, storage: Storage) -> Shared:
    """A tensor of all words from the first to the last, in the dtype of the first view if it fits."""
    view = views[members[0]]
    number, size = view.dtype.number, view.dtype.itemsize
    start = view.offset * size - region.low
    if view.dtype.packed or start % size or (region.high - region.low) % size:
        number, size = lookup_name("uint8"), 1
    shape = ((region.high - region.low) // size,)
    order = storage.order if size > 1 else "<"
    layout = contiguous(storage.file, storage.offset + region.low, number, shape, order)
    return Shared(view, shape, layout, (), RUN, tuple(views[i].name for i in members[1:]))


def _laid(view: View, storage: Storage) -> Shared:
    """A tensor after a view that meets no word twice, but for expanded axes: those count once."""
    dtype, file = view.dtype, storage.file
    number, order = dtype.number, storage.order if dtype.number.word_size > 1 else "<"
    if 0 in view.shape:
        shape = _spread(view.shape, dtype)
        layout = contiguous(file, storage.offset, number, shape, order, dtype.packed)
        return Shared(view, shape, layout)
    if dtype.counted:
        at = storage.offset + view.offset * dtype.packed // 8
        layout = contiguous(file, at, number, view.shape, order, dtype.packed)
        return Shared(view, view.shape, layout, how="packed")
    at = storage.offset + view.offset * dtype.itemsize
    kept = tuple(1 if s == 0 else n for n, s in zip(view.shape, view.strides, strict=True))
    shape = _spread(kept, dtype)
    natural = strides_of(kept, 1)
    strides = tuple(s if n > 1 else m for n, s, m in zip(kept, view.strides, natural, strict=True))
    how = "packed" if dtype.packed else "contiguous"
    if kept != view.shape:
        how = EXPANDED
    elif strides != natural:
        how = f"{how}, strided" if dtype.packed else "strided"
    if strides == natural and dtype.packed == 0:
        return Shared(view, shape, contiguous(file, at, number, shape, order), how=how)
    bits = tuple(s * dtype.itemsize * 8 for s in strides)
    dims = kept
    if dtype.packed:
        dims, bits = (*dims, dtype.per_item), (*bits, dtype.packed)
    elif number.parts == 2:
        dims, bits = (*dims, 2), (*bits, number.part_width)
    return Shared(
        view, shape, Layout(dims, (Piece(file, at, dims, bits),), number, order, dtype.packed), how=how
    )


def _spread(shape: tuple[int, ...], dtype: Dtype) -> tuple[int, ...]:
    """A shape in elements, where PyTorch counts the bytes that two of them share."""
    if dtype.per_item == 1:
        return shape
    return (*shape[:-1], shape[-1] * dtype.per_item) if shape else (dtype.per_item,)
