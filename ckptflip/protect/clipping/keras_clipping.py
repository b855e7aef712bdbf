"""Clipping of a Keras model on any backend: the `call` of its layers is wrapped, and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras

from ckptflip.errors import SelectionError, UsageError
from ckptflip.protect.clipping.bounds import Bound, Bounds, check_layers, unknown
from ckptflip.protect.clipping.keras_counting import Counter, counter
from ckptflip.protect.clipping.part import Clipped, Seen
from ckptflip.protect.clipping.spread import Spread


def clip(model: Any, bounds: Bounds) -> Clipped:
    """Wrap the `call` of the layers that the bounds name."""
    layers = _layers(model)
    _check_bare(layers)
    check_layers(bounds, {name: type(layer).__name__ for name, layer in layers.items()})
    calls, undo = [], []
    for bound in bounds.layers:
        layer = layers[bound.layer]
        calls.append(_Clipping(layer.call, bound, bounds.replacements(bound)))
        undo.append(_wrapped(layer, calls[-1]))
    _forget_traces(model)
    return Clipped(bounds, [call.seen for call in calls], [lambda: _forget_traces(model), *undo])


def spreads(model: Any, batches: Iterable[Any], layers: Any) -> dict[Bound, Spread]:
    """What each layer gives on clean data; the model is called eagerly, not in training."""
    every = _layers(model)
    _check_bare(every)
    chosen = _chosen(every, layers, lambda layer: bool(layer.weights))
    found = {name: Spread() for name in chosen}
    undo = [_wrapped(every[name], _Observing(every[name].call, found[name])) for name in chosen]
    try:
        for batch in batches:
            _call(model, batch)
    finally:
        for back in undo:
            back()
    return {_unbound(name, every[name]): found[name] for name in chosen}


def named(model: Any, layers: Any) -> list[Bound]:
    """The layers that fixed bounds hold for, without bounds yet; by default all dense ones but the last."""
    every = _layers(model)
    chosen = _chosen(every, layers, lambda layer: isinstance(layer, keras.layers.Dense))
    if layers is None and len(chosen) < 2:
        raise UsageError(
            f"the model has {len(chosen)} Dense layers, and the last one is not clipped: name layers with "
            "layers="
        )
    return [_unbound(name, every[name]) for name in (chosen[:-1] if layers is None else chosen)]


class _Observing:
    """A layer's `call` that notes what it gives."""

    def __init__(self, call: Callable[..., Any], spread: Spread) -> None:
        self._call, self._spread = call, spread

    def __call__(self, *given: Any, **named: Any) -> Any:
        output = self._call(*given, **named)
        for tensor in keras.tree.flatten(output):
            if _is_float(tensor):
                wide = "float64" if keras.backend.standardize_dtype(tensor.dtype) == "float64" else "float32"
                self._spread.add(keras.ops.convert_to_numpy(keras.ops.cast(tensor, wide)))
        return output


class _Clipping:
    """A layer's `call` whose floating-point outputs are within bounds."""

    def __init__(
        self, call: Callable[..., Any], bound: Bound, replacements: tuple[float, float, float]
    ) -> None:
        self._call, self._bound = call, bound
        self._below, self._above, self._nan = replacements
        self._counter: Counter = counter()

    def seen(self) -> Seen:
        """How often values were clipped."""
        return Seen(self._bound.layer, *self._counter.counts())

    def __call__(self, *given: Any, **named: Any) -> Any:
        output = self._call(*given, **named)
        return keras.tree.map_structure(self._clipped, output)

    def _clipped(self, tensor: Any) -> Any:
        if not _is_float(tensor) or isinstance(tensor, keras.KerasTensor):
            return tensor
        ops = keras.ops
        inside = ops.all(ops.logical_and(tensor >= self._bound.low, tensor <= self._bound.high))
        # What is within bounds is only looked at. Comparisons with NaN are false.
        made, found = ops.cond(
            inside, lambda: (tensor, ops.zeros((), "int32")), lambda: self._replaced(tensor)
        )
        self._counter.add(found)
        return made

    def _replaced(self, tensor: Any) -> tuple[Any, Any]:
        """The tensor within bounds, and how many of its values were not."""
        ops = keras.ops
        low, high, below, above, nan = (
            ops.cast(number, tensor.dtype)
            for number in (self._bound.low, self._bound.high, self._below, self._above, self._nan)
        )
        too_low, too_high, odd = tensor < low, tensor > high, ops.isnan(tensor)
        made = ops.where(too_low, below, ops.where(too_high, above, tensor))
        beyond = ops.logical_or(ops.logical_or(too_low, too_high), odd)
        return ops.where(odd, nan, made), ops.sum(ops.cast(beyond, "int32"))


def _layers(model: Any) -> dict[str, Any]:
    """The layers that compute, by name: those in other layers and models too, each once.

    A name that two of them have is made unique by the path in front of it.
    """
    every = [layer for layer in model._flatten_layers(include_self=False) if not list(layer._layers)]
    names = [layer.name for layer in every]
    return {
        layer.name if names.count(layer.name) == 1 else layer.path: layer
        for layer in dict.fromkeys(every)
        if not isinstance(layer, keras.layers.InputLayer)
    }


def _chosen(every: Mapping[str, Any], wanted: Any, usual: Callable[[Any], bool]) -> list[str]:
    """Names of the layers that are meant."""
    if wanted is None:
        found = [name for name, layer in every.items() if usual(layer)]
        if not found:
            raise UsageError("the model has no layers to clip: build it first, or name layers with layers=")
        return found
    terms = list(every) if wanted is True else [wanted] if isinstance(wanted, str | type) else list(wanted)
    matched: set[str] = set()
    for term in terms:
        hit = {
            name
            for name, layer in every.items()
            if (isinstance(layer, term) if isinstance(term, type) else fnmatchcase(name, term))
        }
        if not hit:
            said = term.__name__ if isinstance(term, type) else term
            raise SelectionError(unknown(said, every, "the model has no layer"))
        matched |= hit
    return [name for name in every if name in matched]


def _wrapped(layer: Any, call: Callable[..., Any]) -> Callable[[], None]:
    """Put a `call` in the place of a layer's own; returns what puts that back."""
    # Not by an assignment to the layer, which would look for variables and layers in what it is given.
    layer.__dict__["call"] = call

    def back() -> None:
        del layer.__dict__["call"]

    return back


def _check_bare(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        if isinstance(layer.__dict__.get("call"), _Clipping | _Observing):
            raise UsageError(f"the model is clipped already, in {name!r}: take that off first, with remove()")


def _forget_traces(model: Any) -> None:
    """Have Keras trace its functions anew: those it has contain the layers as they were."""
    for kept in ("train_function", "test_function", "predict_function"):
        if getattr(model, kept, None) is not None:
            setattr(model, kept, None)


def _call(model: Any, batch: Any) -> None:
    if isinstance(batch, tuple):
        # A functional model of several inputs takes them as one list.
        model(list(batch) if len(batch) > 1 else batch[0], training=False)
    else:
        model(batch, training=False)


def _is_float(tensor: Any) -> bool:
    dtype = getattr(tensor, "dtype", None)
    return dtype is not None and "float" in keras.backend.standardize_dtype(dtype)


def _unbound(name: str, layer: Any) -> Bound:
    return Bound(name, type(layer).__name__, -math.inf, math.inf)
