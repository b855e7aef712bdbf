"""Weights of a PyTorch model under Keras' names and layouts, and back; the stored bits stay as they are.

======================  ==========================  =========================================
PyTorch                 Keras                       layout
======================  ==========================  =========================================
``conv1.weight``        ``conv1/kernel``            OIHW ↔ HWIO
``fc.weight``           ``fc/kernel``               (outputs, inputs) ↔ (inputs, outputs)
``conv1.bias``          ``conv1/bias``              the same
``bn1.weight, .bias``   ``bn1/gamma, /beta``        the same
``bn1.running_mean``    ``bn1/moving_mean``         the same
``bn1.running_var``     ``bn1/moving_variance``     the same; see docs/vision.md on its meaning
``…num_batches_…``      none                        Keras does not count batches
======================  ==========================  =========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import WorkloadError

if TYPE_CHECKING:
    import keras
    import torch

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, int, int]]

_NORM = {
    "weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"
}  # fmt: skip
_NORM_BACK = {keras: torch for torch, keras in _NORM.items()}
_COUNTER = "num_batches_tracked"


def keras_name(name: str) -> str:
    """The name in Keras of a PyTorch module: hyphens for dots, which Keras' torch backend does not take.

    Example:
        >>> keras_name("layer1.0.conv1"), torch_name("layer1-0-conv1")
        ('layer1-0-conv1', 'layer1.0.conv1')
    """
    return name.replace(".", "-")


def torch_name(name: str) -> str:
    """The path in PyTorch of a Keras layer; `keras_name` the other way round."""
    return name.replace("-", ".")


def to_keras(state: Mapping[str, Any], flattened: Shapes | None = None) -> Arrays:
    """Convert a PyTorch state dict.

    Args:
        state: tensors or arrays by name, as ``model.state_dict()`` gives them.
        flattened: (channels, height, width) of the image that a dense layer takes flattened, by the layer's
            name in PyTorch, for Keras models that flatten it channels last. Those of `keras_models` do not.

    Returns:
        New arrays by Keras' variable path, such as ``layer1-0-conv1/kernel``.

    Raises:
        WorkloadError: a tensor has no counterpart in Keras.

    Example:
        >>> state = {"fc.weight": np.zeros((10, 64)), "fc.bias": np.zeros(10)}
        >>> {path: array.shape for path, array in to_keras(state).items()}
        {'fc/kernel': (64, 10), 'fc/bias': (10,)}
    """
    found: Arrays = {}
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == _COUNTER:
            continue
        array, layer = _array(value), keras_name(owner)
        norm = f"{owner}.running_mean" in state
        if norm and leaf in _NORM:
            found[f"{layer}/{_NORM[leaf]}"] = array
        elif leaf == "bias" and array.ndim == 1:
            found[f"{layer}/bias"] = array
        elif leaf == "weight" and array.ndim == 4:
            found[f"{layer}/kernel"] = array.transpose(2, 3, 1, 0)
        elif leaf == "weight" and array.ndim == 2:
            found[f"{layer}/kernel"] = _dense_to_keras(array, (flattened or {}).get(owner), name)
        else:
            raise WorkloadError(f"{name} {list(array.shape)} has no counterpart in Keras that is known here")
    return _copied(found)


def from_keras(arrays: Mapping[str, Any], flattened: Shapes | None = None) -> Arrays:
    """Convert arrays by Keras' variable path to a PyTorch state, as arrays; `to_keras` the other way round.

    ``num_batches_tracked``, which Keras does not have, is missing from it.

    Raises:
        WorkloadError: a variable has no counterpart in PyTorch.
    """
    found: Arrays = {}
    for path, value in arrays.items():
        owner, _, leaf = path.rpartition("/")
        array, module = np.asarray(value), torch_name(owner)
        if leaf in _NORM_BACK:
            found[f"{module}.{_NORM_BACK[leaf]}"] = array
        elif leaf == "bias" and array.ndim == 1:
            found[f"{module}.bias"] = array
        elif leaf == "kernel" and array.ndim == 4:
            found[f"{module}.weight"] = array.transpose(3, 2, 0, 1)
        elif leaf == "kernel" and array.ndim == 2:
            found[f"{module}.weight"] = _dense_from_keras(array, (flattened or {}).get(module), path)
        else:
            raise WorkloadError(
                f"{path} {list(array.shape)} has no counterpart in PyTorch that is known here"
            )
    return _copied(found)


def read_keras(model: keras.Model) -> Arrays:
    """A Keras model's weights as arrays by path; random states of its layers are left out."""
    return {
        variable.path: np.array(_numpy(variable))
        for variable in model.variables
        if "seed_generator" not in variable.path
    }


def set_keras(model: keras.Model, arrays: Mapping[str, Any]) -> None:
    """Give a Keras model all its weights.

    Raises:
        WorkloadError: a name, shape or dtype differs; then nothing was set.
    """
    variables = {v.path: v for v in model.variables if "seed_generator" not in v.path}
    _check_names(variables.keys(), arrays.keys(), "the Keras model")
    for path, variable in variables.items():
        array = np.asarray(arrays[path])
        if tuple(variable.shape) != array.shape or str(variable.dtype) != str(array.dtype):
            raise WorkloadError(
                f"{path} is {variable.dtype}{list(variable.shape)} in the model, "
                f"but {array.dtype}{list(array.shape)} is given"
            )
    for path, variable in variables.items():
        # A copy, for JAX may take an array's memory over.
        variable.assign(np.array(arrays[path]))


def set_torch(model: torch.nn.Module, arrays: Mapping[str, Any]) -> None:
    """Give a PyTorch model all its weights; counts of batches, which Keras does not have, stay.

    Raises:
        WorkloadError: a name, shape or dtype differs; then nothing was set.
    """
    import torch

    state = {name: value for name, value in model.state_dict().items() if not name.endswith(_COUNTER)}
    _check_names(state.keys(), arrays.keys(), "the PyTorch model")
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    for name, value in state.items():
        if (value.shape, value.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise WorkloadError(
                f"{name} is {value.dtype}{list(value.shape)} in the model, "
                f"but {tensors[name].dtype}{list(tensors[name].shape)} is given"
            )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(tensors[name])


def _dense_to_keras(array: NDArray[Any], shape: tuple[int, int, int] | None, name: str) -> NDArray[Any]:
    if shape is not None:
        _check_inputs(array.shape[1], shape, name)
        array = array.reshape(-1, *shape).transpose(0, 2, 3, 1).reshape(array.shape)
    return array.T


def _dense_from_keras(array: NDArray[Any], shape: tuple[int, int, int] | None, name: str) -> NDArray[Any]:
    array = array.T
    if shape is not None:
        _check_inputs(array.shape[1], shape, name)
        channels, height, width = shape
        array = array.reshape(-1, height, width, channels).transpose(0, 3, 1, 2).reshape(array.shape)
    return array


def _copied(arrays: Arrays) -> Arrays:
    """Arrays of their own: one that shared a tensor's memory would go on changing while it trains."""
    return {name: np.array(array, order="C") for name, array in arrays.items()}


def _check_inputs(inputs: int, shape: tuple[int, int, int], name: str) -> None:
    channels, height, width = shape
    if channels * height * width != inputs:
        raise WorkloadError(
            f"{name} takes {inputs} values, an image of {channels} channels of {height}x{width} has "
            f"{channels * height * width}"
        )


def _check_names(ours: Any, given: Any, what: str) -> None:
    differences = [f"{name} is missing" for name in sorted(ours - given)]
    differences += [f"{name} is unknown to it" for name in sorted(given - ours)]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise WorkloadError(f"the weights do not fit {what}: {'; '.join(differences[:3])}{more}")


def _array(value: Any) -> NDArray[Any]:
    """A tensor as an array, with its bits; numpy has no bfloat16 of its own."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        bits: NDArray[Any] = value.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    found: NDArray[Any] = value.numpy()
    return found


def _tensor(value: Any) -> torch.Tensor:
    import torch

    array = np.ascontiguousarray(value)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _numpy(variable: Any) -> NDArray[Any]:
    import keras

    found: NDArray[Any] = keras.ops.convert_to_numpy(variable.value)
    return found
