"""A live Keras model as a target: its variables under the names that its files have, on every backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from ckptflip.bits import lookup
from ckptflip.checkpoints.keras.slots import COUNTS
from ckptflip.checkpoints.keras.variables import class_of, role_of, snake
from ckptflip.errors import LiveError, MissingExtraError, UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.live.keras_words import BACKENDS, Backend


class _Named(Struct):
    """A variable with what it is called.

    Attributes:
        variable: Keras' variable.
        name: as the file has it, less the number that tells two of one name apart.
        klass: the class of its layer, as files spell it.
        role: its role, where the name alone does not tell.
        of: the parameter that an optimizer keeps it for; its layer is that one's.
        aliases: its further names.
    """

    variable: Any
    name: str
    klass: str = ""
    role: str = ""
    of: str = ""
    aliases: list[str] = []


class KerasTarget:
    """The variables of a Keras model and of its optimizer, as words in memory.

    Names, layers and roles are those of the model's ``.keras`` file (``dense/kernel``,
    ``adam/momentum of dense/kernel``); Keras' own path of a variable is an alias where it differs. Seeds of
    dropout, which no file holds, have the role ``rng``; metrics are left out. A layer used twice is listed
    once.

    On torch and TensorFlow variables are altered in place, at a cost that grows with the flips. JAX's arrays
    cannot be: the variable gets an altered copy. Between two batches of ``fit`` on JAX, the model's variables
    are empty until ``model.jax_state_sync()`` (`ckptflip.callbacks.keras.KerasInjector` sees to it).

    Args:
        model: a built model.
        optimizer: whether the state of the optimizer it was compiled with may be hit too; it is built first
            if it was not, as training would.

    Attributes:
        tensors: the catalogue.
        format: ``keras variables``.

    Raises:
        UsageError: not a Keras model, or one that has no variables yet.
        LiveError: the variables are mirrored over several devices.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
        >>> model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        >>> [t.name for t in KerasTarget(model).tensors if "kernel" in t.name]
        ['head/kernel', 'sgd/momentum of head/kernel']
    """

    format = "keras variables"

    def __init__(self, model: Any, optimizer: bool = True) -> None:
        self._backend = backend_of(model)
        named = _model_variables(model)
        if not named:
            raise UsageError(
                f"the model {model.name!r} has no variables yet: build it first, with model.build(shape) or "
                "by calling it on one batch"
            )
        if optimizer and getattr(model, "optimizer", None) is not None:
            named += _optimizer_variables(model, named)
        self.tensors, self._variables = _catalogue(named, self._backend)

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one tensor at ascending positions, unsigned."""
        return self._backend.read(self._value(tensor), self.tensors[tensor].number, words)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one tensor, at ascending positions."""
        number = self.tensors[tensor].number
        self._value(tensor)
        self._backend.alter(self._variables[tensor], number, words, masks.astype(number.word_dtype))

    def _value(self, tensor: int) -> Any:
        variable = self._variables[tensor]
        if variable._value is None:
            raise LiveError(
                f"{self.tensors[tensor].name} is out of the model's hands in the middle of an epoch on JAX: "
                "call model.jax_state_sync() first"
            )
        return variable.value


class KerasGradients:
    """The gradients of one step on a Keras model, before the optimizer uses them.

    Args:
        model: the model.
        gradients: as `optimizer.apply` gets them: one for each variable, or None.
        variables: the variables, in the same order.

    Attributes:
        tensors: the catalogue: ``gradients/dense/kernel``. Sparse gradients are left out.
        gradients: the gradients as they are now; those altered on TensorFlow are new tensors.
        format: ``keras gradients``.
    """

    format = "keras gradients"

    def __init__(self, model: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        import keras

        self._backend = backend_of(model)
        self.gradients = list(gradients)
        found = {id(n.variable): n for n in _model_variables(model)}
        self._places: list[int] = []
        tensors = []
        for place, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            if _is_sparse(gradient) or id(variable) not in found:
                continue
            name = found[id(variable)].name
            number = lookup(keras.backend.standardize_dtype(gradient.dtype))
            layer = name.rpartition("/")[0]
            tensors.append(Tensor(f"gradients/{name}", tuple(gradient.shape), number, layer=layer))
            self._places.append(place)
        self.tensors = tensors

    def read(self, tensor: int, words: NDArray[np.int64]) -> NDArray[Any]:
        """Words of one gradient at ascending positions, unsigned."""
        value = self.gradients[self._places[tensor]]
        return self._backend.read(value, self.tensors[tensor].number, words)

    def xor(self, tensor: int, words: NDArray[np.int64], masks: NDArray[np.uint64]) -> None:
        """XOR masks into words of one gradient, at ascending positions."""
        place, number = self._places[tensor], self.tensors[tensor].number
        masks = masks.astype(number.word_dtype)
        self.gradients[place] = self._backend.altered(self.gradients[place], number, words, masks)


def backend_of(model: Any) -> Backend:
    """The words of Keras' present backend.

    Raises:
        UsageError: not a Keras model, or a backend whose variables cannot be altered.
    """
    try:
        import keras
    except ImportError as error:
        raise MissingExtraError("keras", "keras", "Altering a Keras model") from error
    if not isinstance(model, keras.Model):
        raise UsageError(f"a {type(model).__name__} is no Keras model")
    name = keras.backend.backend()
    if name not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise UsageError(f"variables of Keras' backend {name!r} cannot be altered; those of {known} can")
    return BACKENDS[name]()


def _is_sparse(gradient: Any) -> bool:
    """Whether there is no gradient, or one of some rows only."""
    if gradient is None or type(gradient).__name__ == "IndexedSlices":
        return True
    return bool(getattr(gradient, "is_sparse", False))


def _model_variables(model: Any) -> list[_Named]:
    """A model's variables, each once, with the names of its file."""
    found: dict[int, _Named] = {}
    for layer, prefix in _layers(model, ""):
        klass = snake(type(layer).__name__)
        for variable in layer.variables:
            name = f"{prefix}{_inside(layer.name, variable.path)}"
            if id(variable) in found:
                if name not in (found[id(variable)].name, *found[id(variable)].aliases):
                    found[id(variable)].aliases.append(name)
                continue
            parent = name.split("/")[-2]
            inner = parent == layer.name
            aliases = [variable.path] if variable.path != name else []
            role = "rng" if "seed_generator" in variable.path.rpartition("/")[2] else ""
            named = _Named(variable, name, klass if inner else class_of(parent), role, aliases=aliases)
            found[id(variable)] = named
    return list(found.values())


def _layers(model: Any, prefix: str) -> Iterator[tuple[Any, str]]:
    """The layers of a model and of the models in it, with the names of these in front; itself last."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer, f"{prefix}{layer.name}/")
        else:
            yield layer, prefix
    yield model, prefix.removesuffix(f"{model.name}/")


def _inside(layer: str, path: str) -> str:
    """A variable's path from its layer on."""
    parts = path.split("/")
    return "/".join(parts[parts.index(layer) :]) if layer in parts else f"{layer}/{path}"


def _optimizer_variables(model: Any, named: Sequence[_Named]) -> list[_Named]:
    """The optimizer's variables: ``adam/iteration``, ``adam/momentum of dense/kernel``."""
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    names = {id(n.variable): n.name for n in named}
    # Keras joins the parameter's path into the slot's name; the longest that fits is the one.
    joined = [
        (f"{v.path.replace('/', '_')}_", names[id(v)]) for v in model.trainable_variables if id(v) in names
    ]
    joined.sort(key=lambda pair: len(pair[0]), reverse=True)
    found = []
    for variable in optimizer.variables:
        owner, _, leaf = variable.path.rpartition("/")
        path, parameter = next((pair for pair in joined if leaf.startswith(pair[0])), ("", ""))
        slot = leaf.removeprefix(path)
        name = f"{owner}/{slot} of {parameter}" if parameter else variable.path
        outer = [f"{optimizer.name}/{name}"] if owner != optimizer.name else []
        role = "counter" if slot in COUNTS else "optimizer"
        found.append(_Named(variable, name, role=role, of=parameter, aliases=[*outer, variable.path]))
    return found


def _catalogue(named: Sequence[_Named], backend: Backend) -> tuple[list[Tensor], list[Any]]:
    """Tensors and their variables, names made unique as in files: ``~2`` behind the second."""
    tensors: list[Tensor] = []
    seen: Counter[str] = Counter()
    siblings: dict[str, list[str]] = {}
    for each in named:
        layer, _, leaf = each.name.rpartition("/")
        siblings.setdefault(layer, []).append(leaf)
    kept = [each for each in named if backend.holds(each.variable.dtype)]
    for each in kept:
        _check_plain(each)
        seen[each.name] += 1
        name = each.name if seen[each.name] == 1 else f"{each.name}~{seen[each.name]}"
        layer = (each.of or each.name).rpartition("/")[0] if each.of or not each.role else ""
        number = lookup(each.variable.dtype)
        tensor = Tensor(name, tuple(each.variable.shape), number, layer=layer)
        role = each.role or role_of(each.name, each.klass, tensor, siblings[layer])
        aliases = tuple(dict.fromkeys(a for a in each.aliases if a != name))
        tensors.append(Tensor(name, tensor.shape, number, layer=layer, role=role, aliases=aliases))
    names = {t.name for t in tensors}
    tensors = [replace(t, aliases=tuple(a for a in t.aliases if a not in names)) for t in tensors]
    return tensors, [each.variable for each in kept]


def _check_plain(each: _Named) -> None:
    if hasattr(each.variable._value, "_distribute_strategy") and hasattr(each.variable._value, "values"):
        raise LiveError(
            f"{each.name} is mirrored over replicas by tf.distribute, which keep one copy each: altering one "
            "would be no fault of one device. Train without a strategy"
        )
