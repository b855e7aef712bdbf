"""Where an element of a tensor lies in its counterpart: axes that change places, and gates that do."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Shape = tuple[int, ...]

# Axes of a kernel with 1, 2 or 3 spatial axes, outputs first.
_KERNELS = {2: "OI", 3: "OIW", 4: "OIHW", 5: "OIDHW"}
# PyTorch's GRU keeps reset, update, new; Keras' update, reset, new.
_GRU = (1, 0, 2)


class MisfitError(ValueError):
    """Why a tensor cannot be laid onto another, in words."""


class Layout(Struct, frozen=True):
    """A one-to-one map from the elements of one tensor to those of another.

    The first tensor is seen with the axes `split`, which then change places as `axes` says.

    Attributes:
        name: what it does, in short: ``OIHW->HWIO``.
        source: shape of the one tensor.
        target: shape of the other.
        split: the axes of the first as they are moved; of the same product as `source`.
        axes: which of them comes first, second … in the second.
        along: the axis of `split` whose positions are put in another order, or -1.
        order: the position that comes first, second … along it in the second.

    Example:
        >>> layout = permuted("OIHW->HWIO", (8, 3, 5, 5))
        >>> layout.target, layout.forward(np.array([0, 1, 25]))
        ((5, 5, 3, 8), array([ 0, 24,  8]))
    """

    name: str
    source: Shape
    target: Shape
    split: Shape
    axes: tuple[int, ...]
    along: int = -1
    order: tuple[int, ...] = ()

    def forward(self, elements: NDArray[np.int64]) -> NDArray[np.int64]:
        """The elements' flat positions in the second tensor."""
        if self.axes == tuple(range(len(self.axes))) and self.along < 0:
            return elements
        index: list[Any] = list(np.unravel_index(elements, self.split))
        if self.along >= 0:
            index[self.along] = np.argsort(self.order)[index[self.along]]
        moved = tuple(index[a] for a in self.axes)
        found: NDArray[np.int64] = np.ravel_multi_index(moved, tuple(self.split[a] for a in self.axes))
        return found.astype(np.int64)

    def inverse(self) -> Layout:
        """The map back."""
        left, arrow, right = self.name.partition("->")
        return Layout(
            name=f"{right}->{left}" if arrow else self.name,
            source=self.target,
            target=self.source,
            split=tuple(self.split[a] for a in self.axes),
            axes=tuple(int(a) for a in np.argsort(self.axes)),
            along=self.axes.index(self.along) if self.along >= 0 else -1,
            order=tuple(int(p) for p in np.argsort(self.order)),
        )

    def moved(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of shape `source` with its elements as in the second tensor."""
        made = np.empty(self.target, array.dtype)
        made.reshape(-1)[self.forward(np.arange(array.size, dtype=np.int64))] = array.reshape(-1)
        return made


def same(shape: Shape) -> Layout:
    """Every element where it is."""
    return Layout("same", shape, shape, shape, tuple(range(len(shape))))


def permuted(name: str, source: Shape) -> Layout:
    """Axes named by letters, as in ``OIHW->HWIO``.

    Raises:
        MisfitError: not two orders of the same letters, or more or fewer than the tensor's axes.
    """
    left, arrow, right = (part.strip() for part in name.partition("->"))
    if not arrow or sorted(left) != sorted(right) or len(set(left)) < len(left) or not left.isalpha():
        raise MisfitError(f"layout {name!r} does not name the same axes on both sides, as OIHW->HWIO does")
    if len(left) != len(source):
        raise MisfitError(
            f"layout {name!r} has {len(left)} axes, the tensor {_text(source)} has {len(source)}"
        )
    axes = tuple(left.index(letter) for letter in right)
    return Layout(f"{left}->{right}", source, tuple(source[a] for a in axes), source, axes)


def flattened(source: Shape, channels: int) -> Layout:
    """A dense weight (outputs, inputs) whose inputs were C×H×W, to (inputs, outputs) with inputs H×W×C.

    Raises:
        MisfitError: the inputs are not a multiple of `channels`.
    """
    outputs, inputs = source
    if channels < 1 or inputs % channels:
        raise MisfitError(f"{inputs} inputs are not a whole number of positions of {channels} channels")
    split = (outputs, channels, inputs // channels)
    return Layout("O(CHW)->(HWC)O", source, (inputs, outputs), split, (2, 1, 0))


def depthwise(source: Shape, multiplier: int) -> Layout:
    """A depthwise kernel (C·m, 1, spatial …) to (spatial …, C, m).

    Raises:
        MisfitError: another shape.
    """
    if len(source) < 3 or source[1] != 1 or multiplier < 1 or source[0] % multiplier:
        raise MisfitError(f"{_text(source)} is no depthwise kernel of {multiplier} outputs per channel")
    spatial, channels = source[2:], source[0] // multiplier
    split = (channels, multiplier, *spatial)
    axes = (*range(2, 2 + len(spatial)), 0, 1)
    return Layout("depthwise OIHW->HWCM", source, (*spatial, channels, multiplier), split, axes)


def gru(source: Shape) -> Layout:
    """A GRU's weights (3·H, inputs) to (inputs, 3·H), with the gates in Keras' order.

    Raises:
        MisfitError: the rows are no three gates.
    """
    if len(source) != 2 or source[0] % 3:
        raise MisfitError(f"{_text(source)} does not hold the three gates of a GRU")
    units = source[0] // 3
    split = (3, units, source[1])
    return Layout("GRU OI->IO", source, (source[1], source[0]), split, (2, 0, 1), 0, _GRU)


def between(source: Shape, target: Shape, *, channels: int | None = None, gates: int = 0) -> Layout:
    """The layout from a kernel with its outputs first to its counterpart with its outputs last.

    Args:
        source: a dense weight (outputs, inputs), a convolution's (outputs, inputs, spatial …) …
        target: (inputs, outputs), (spatial …, inputs, outputs) …
        channels: of the convolution whose flattened output a dense layer takes; None: of no convolution.
        gates: of a recurrent layer, 0 for any other.

    Raises:
        MisfitError: the shapes do not go together.
    """
    if len(source) != len(target) or len(source) not in _KERNELS:
        raise MisfitError(f"{_text(source)} and {_text(target)} are not the same kernel in two layouts")
    letters = _KERNELS[len(source)]
    if len(source) == 2:
        if gates == 3:
            layout = gru(source)
        elif channels is not None:
            layout = flattened(source, channels)
        else:
            layout = permuted("OI->IO", source)
    else:
        layout = permuted(f"{letters}->{letters[2:]}IO", source)
        if layout.target != target and source[1] == 1 and target[-1] * target[-2] == source[0]:
            layout = depthwise(source, target[-1])
    if layout.target != target:
        raise MisfitError(
            f"{_text(source)} would become {_text(layout.target)} ({layout.name}), but it is {_text(target)}"
        )
    return layout


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
