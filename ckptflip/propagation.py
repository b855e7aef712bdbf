"""How far a fault has spread: the relative difference between two checkpoints of equal epoch, layer by layer.

Method: Rojas et al., "Understanding Soft Error Sensitivity of Deep Learning Models and Frameworks through
Checkpoint Alteration" (IEEE CLUSTER 2021): (A2 − A1) / |A1| for each weight, A1 clean and A2 faulty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import classify, to_values
from ckptflip.bits.values import EXTREME
from ckptflip.checkpoints import Checkpoint, opened
from ckptflip.checkpoints.files import Progress
from ckptflip.checkpoints.target import position_of, positions_by_name
from ckptflip.compare import aligned
from ckptflip.equivalence.names import logicals, normal_layer
from ckptflip.equivalence.stages import slot_numbers
from ckptflip.errors import CheckpointError, SelectionError, UsageError
from ckptflip.faults.catalogue import Tensor, listed, select
from ckptflip.quantiles import Quantiles

# A box: what `LayerPropagation.changes` holds.
BOX = (0.0, 0.25, 0.5, 0.75, 1.0)


class LayerPropagation(msgspec.Struct, frozen=True, kw_only=True):
    """How one layer differs between a clean and a faulty checkpoint.

    The difference of an element is (A2 − A1) / |A1|, 0 where it is the same in both. Elements that have none
    (A1 is 0 and A2 is not, or one of them is NaN, infinite or extreme) are counted and left out.

    Attributes:
        layer: its name.
        elements: in all of its tensors that were compared.
        changed: elements whose bits differ.
        from_zero: elements that were 0 and no longer are.
        nev: elements that are NaN, infinite or extreme in either checkpoint.
        minimum: the smallest difference of all elements that have one; NaN where none has.
        lower: their first quartile.
        median: their median.
        upper: their third quartile.
        maximum: the largest.
        mean: their mean.
        changes: minimum, quartiles and maximum of the magnitudes of those differences that are not 0; empty
            where all are.
    """

    layer: str
    elements: int
    changed: int
    from_zero: int
    nev: int
    minimum: float
    lower: float
    median: float
    upper: float
    maximum: float
    mean: float
    changes: tuple[float, ...] = ()

    @property
    def changed_share(self) -> float:
        """The share of all elements that changed; 0 of an empty layer."""
        return self.changed / self.elements if self.elements else 0.0


class _Counts(msgspec.Struct):
    """What is counted of a layer beside its differences."""

    elements: int = 0
    changed: int = 0
    from_zero: int = 0
    nev: int = 0


def propagation(
    clean: str | Path,
    faulty: str | Path,
    *,
    tensors: str | Iterable[str] = (),
    layers: str | Iterable[str] = (),
    roles: str | Iterable[str] | None = None,
    threshold: float = EXTREME,
    progress: Progress | None = None,
) -> list[LayerPropagation]:
    """Compare two checkpoints of equal epoch layer by layer: relative differences, element by element.

    Args:
        clean: a checkpoint of the clean run.
        faulty: one of the same epoch, from a run that a fault was put into.
        tensors: globs that limit the comparison.
        layers: globs on layers, likewise.
        roles: as in a policy; by default ``model``, or every role where `tensors` are given.
        threshold: what counts as an extreme value.
        progress: told the bytes of `clean` compared, step by step.

    Returns:
        One row per layer, in the order of the network as far as it is known: from the numbers of an
        optimizer's state, else the checkpoint's own order, names with numbers in order.

    Raises:
        CheckpointError: a file cannot be read, or the faulty one lacks a tensor or has it in another shape.
        SelectionError: nothing is selected, or no floating-point tensor.
        UsageError: a threshold that is not above 0.

    Example:
        >>> import ckptflip, h5py, numpy, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "epoch_005.h5"
        >>> with h5py.File(path, "w") as file:
        ...     file["conv1/kernel"] = numpy.ones((3, 3), "float32")
        >>> _ = ckptflip.inject(path, out=path.with_name("bad.h5"), bits="sign", seed=1)
        >>> [row] = propagation(path, path.with_name("bad.h5"))
        >>> row.layer, row.changed, row.minimum, row.maximum
        ('conv1', 1, -2.0, 0.0)
    """
    if not threshold > 0:
        raise UsageError(f"the threshold of extreme values must be above 0, not {threshold}")
    globs = listed(tensors)
    wanted_roles = listed(roles) if roles is not None else () if globs else ("model",)
    with ExitStack() as stack:
        first = stack.enter_context(opened(clean))
        second = stack.enter_context(opened(faulty))
        chosen = select(first.tensors, names=globs, layers=listed(layers), roles=wanted_roles)
        pairs = _pairs(first, second, [i for i in chosen if first.tensors[i].number.is_float])
        return [
            _layer(name, [pairs[i] for i in positions], first, second, threshold, progress)
            for name, positions in _by_layer(first, list(pairs))
        ]


def _pairs(first: Checkpoint, second: Checkpoint, chosen: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Each chosen tensor with that of the same name."""
    if not chosen:
        raise SelectionError("none of the selected tensors holds floating-point numbers")
    names = positions_by_name(second.tensors)
    pairs = {}
    for i in chosen:
        tensor, at = first.tensors[i], position_of(first.tensors[i], names)
        if at is None:
            raise CheckpointError(
                f"{second.path} has no tensor {tensor.name!r}: is it of the same network? Select others with "
                "tensors or layers"
            )
        other = second.tensors[at]
        if (other.shape, other.number) != (tensor.shape, tensor.number):
            raise CheckpointError(
                f"{tensor.name} is {tensor.dtype} {tensor.shape} in {first.path}, "
                f"{other.dtype} {other.shape} in {second.path}"
            )
        pairs[i] = (i, at)
    return pairs


def _by_layer(target: Checkpoint, chosen: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The chosen tensors of each layer, layers in the order of the network."""
    groups: dict[str, list[int]] = {}
    for i in chosen:
        groups.setdefault(target.tensors[i].layer or target.tensors[i].name, []).append(i)
    numbers = slot_numbers(target.tensors, logicals(target.tensors))
    places = {name: numbers.get(normal_layer(name)) for name in groups}
    if all(place is not None for place in places.values()):
        return sorted(groups.items(), key=lambda group: places[group[0]] or 0)
    if target.format == "pytorch":
        return list(groups.items())
    return sorted(groups.items(), key=lambda group: _natural(group[0]))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """What sorts conv2 before conv10.

    Example:
        >>> sorted(["conv10", "conv2"], key=_natural)
        ['conv2', 'conv10']
    """
    parts: list[str] = []
    for char in name:
        if parts and parts[-1][-1].isdecimal() == char.isdecimal():
            parts[-1] += char
        else:
            parts.append(char)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]


def _layer(
    name: str,
    pairs: Sequence[tuple[int, int]],
    first: Checkpoint,
    second: Checkpoint,
    threshold: float,
    progress: Progress | None,
) -> LayerPropagation:
    counts = _Counts()
    passes = 0

    def differences() -> Iterator[NDArray[np.float64]]:
        """All differences that are not 0; counts the rest on the first pass."""
        nonlocal passes
        passes += 1
        told = progress if passes == 1 else None
        for i, at in pairs:
            blocks = aligned(first.blocks(i), second.blocks(at))
            yield from _differences(
                blocks, first.tensors[i], counts if passes == 1 else _Counts(), threshold, told
            )

    found = Quantiles(differences)
    same = counts.elements - counts.from_zero - counts.nev - found.count
    low, *quartiles, high = found.with_zeros(same, BOX)
    return LayerPropagation(
        layer=name,
        elements=counts.elements,
        changed=counts.changed,
        from_zero=counts.from_zero,
        nev=counts.nev,
        minimum=low,
        lower=quartiles[0],
        median=quartiles[1],
        upper=quartiles[2],
        maximum=high,
        mean=found.mean_with_zeros(same),
        changes=tuple(found.magnitudes(BOX)) if found.count else (),
    )


def _differences(
    blocks: Iterator[tuple[NDArray[Any], NDArray[Any]]],
    tensor: Tensor,
    counts: _Counts,
    threshold: float,
    progress: Callable[[int], None] | None,
) -> Iterator[NDArray[np.float64]]:
    number = tensor.number
    for a, b in blocks:
        if progress:
            progress(a.nbytes)
        counts.elements += a.size
        differs = np.flatnonzero(a != b)
        counts.changed += differs.size
        strange = _strange(a, number, threshold)
        if not differs.size:
            counts.nev += int(np.count_nonzero(strange))
            continue
        strange |= _strange(b, number, threshold)
        counts.nev += int(np.count_nonzero(strange))
        usable = differs[~strange[differs]]
        x, y = to_values(a[usable], number), to_values(b[usable], number)
        zero = x == 0
        counts.from_zero += int(np.count_nonzero(zero & (y != 0)))
        # Two numbers of this range differ by more than float64 holds only in units of the smallest of them.
        with np.errstate(over="ignore"):
            found: NDArray[np.float64] = (y[~zero] - x[~zero]) / np.abs(x[~zero])
        yield found


def _strange(words: NDArray[Any], number: Any, threshold: float) -> NDArray[np.bool_]:
    classes = classify(words, number, threshold)
    found: NDArray[np.bool_] = classes.nan | classes.inf | classes.extreme
    return found
