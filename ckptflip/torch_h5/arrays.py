"""Tensors and numpy arrays as HDF5 datasets, moved as bytes from end to end.

Neither HDF5 nor h5py converts anything here: data goes in and out under the dataset's own type. Dtypes
without an HDF5 type are opaque bytes with the name in the attribute ``dtype``, the way Keras stores bfloat16.
"""

from __future__ import annotations

from math import prod
from typing import Any

import h5py
import numpy as np
import torch

from ckptflip.errors import CheckpointError
from ckptflip.torch_h5.plain import dtype_name, dtype_of

_NATIVE: dict[torch.dtype, str] = {
    torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8",
    torch.complex64: "<c8", torch.complex128: "<c16",
    torch.int8: "|i1", torch.int16: "<i2", torch.int32: "<i4", torch.int64: "<i8",
    torch.uint8: "|u1", torch.uint16: "<u2", torch.uint32: "<u4", torch.uint64: "<u8",
    torch.bool: "|b1",
}  # fmt: skip
_OPAQUE: dict[torch.dtype, str] = {
    getattr(torch, name): name
    for name in (
        "bfloat16", "complex32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
        "float8_e8m0fnu", "float4_e2m1fn_x2",
    )
    if hasattr(torch, name)
}  # fmt: skip
_TORCH_BY_NUMPY = {np.dtype(name): dtype for dtype, name in _NATIVE.items()}
_TORCH_BY_NAME = {name: dtype for dtype, name in _OPAQUE.items()}
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_tensor(tensor: torch.Tensor, where: str) -> None:
    """Refuse what is not a dense array of numbers in memory, by its place in the state."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{where} is a {type(tensor).__name__}: only plain tensors can be stored")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise CheckpointError(f"{where} is a sparse or nested tensor ({tensor.layout}): store it dense")
    if tensor.is_quantized:
        raise CheckpointError(f"{where} is a quantised tensor: store its int_repr(), scale and zero point")
    if tensor.is_meta:
        raise CheckpointError(f"{where} is a meta tensor: it has no values to store")
    if tensor.dtype not in _NATIVE and tensor.dtype not in _OPAQUE:
        raise CheckpointError(f"{where} has the dtype {tensor.dtype}, which cannot be stored")


def write_tensor(group: h5py.Group, name: str, tensor: torch.Tensor) -> h5py.Dataset:
    """Write a tensor that passed `check_tensor` as a dataset in C order; note dense strides that differ."""
    shape = tuple(tensor.shape)
    opaque = _OPAQUE.get(tensor.dtype)
    file_dtype = f"V{tensor.itemsize}" if opaque else _NATIVE[tensor.dtype]
    dataset = _create(group, name, shape, np.dtype(file_dtype), _tensor_bytes(tensor))
    if opaque:
        dataset.attrs["dtype"] = opaque
    if tensor.stride() != _default_stride(shape) and _is_dense(shape, tensor.stride()):
        dataset.attrs["stride"] = np.array(tensor.stride(), np.int64)
    if isinstance(tensor, torch.nn.Parameter):
        dataset.attrs["parameter"] = True
    if tensor.requires_grad:
        dataset.attrs["requires_grad"] = True
    return dataset


def write_array(group: h5py.Group, name: str, array: np.ndarray, where: str) -> h5py.Dataset:
    """Write a numpy array as a dataset in C order; HDF5's opaque type holds what HDF5 has no type for."""
    if type(array) is not np.ndarray:
        raise CheckpointError(f"{where} is a {type(array).__name__}: only plain numpy arrays can be stored")
    label = dtype_name(array.dtype, where)
    native = array.dtype.newbyteorder("<") in _TORCH_BY_NUMPY
    file_dtype = array.dtype if native else np.dtype(f"V{array.dtype.itemsize}")
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    dataset = _create(group, name, array.shape, file_dtype, data)
    dataset.attrs["array"] = "numpy"
    if not native:
        dataset.attrs["dtype"] = label
    return dataset


def read(dataset: h5py.Dataset) -> torch.Tensor | np.ndarray:
    """Read a dataset as what it was written from; ValueError where type and size do not fit together."""
    name = dataset.attrs.get("dtype")
    if dataset.attrs.get("array") == "numpy":
        dtype = dataset.dtype if name is None else dtype_of(str(name))
        return _read_bytes(dataset, dtype.itemsize).numpy().view(dtype).reshape(dataset.shape)
    torch_dtype = _TORCH_BY_NUMPY.get(dataset.dtype) if name is None else _TORCH_BY_NAME.get(str(name))
    if torch_dtype is None:
        raise ValueError(
            f"dataset {dataset.name} has the type {name or dataset.dtype}, unknown to this format"
        )
    data = _read_bytes(dataset, torch_dtype.itemsize)
    stride = dataset.attrs.get("stride")
    if stride is None:
        tensor = data.view(torch_dtype).reshape(dataset.shape)
    else:
        tensor = _restride(data, torch_dtype, dataset.shape, tuple(int(step) for step in stride))
    grad = bool(dataset.attrs.get("requires_grad", False))
    if dataset.attrs.get("parameter", False):
        return torch.nn.Parameter(tensor, requires_grad=grad)
    return tensor.requires_grad_(grad)


def _create(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: np.dtype, data: Any) -> h5py.Dataset:
    dataset = group.create_dataset(name, shape=shape, dtype=dtype)
    if data.size:
        dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, data, dataset.id.get_type())
    return dataset


def _tensor_bytes(tensor: torch.Tensor) -> Any:
    plain = tensor.detach().resolve_conj().resolve_neg()
    # Copies are made of integers, so that no float instruction can quieten a signalling NaN.
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    words = plain.view(_SAME_SIZE[plain.itemsize]).cpu().contiguous()
    return words.reshape(-1).view(torch.uint8).numpy()


def _read_bytes(dataset: h5py.Dataset, itemsize: int) -> torch.Tensor:
    """Read a dataset's bytes as they lie; into memory of PyTorch's own alignment."""
    file_type = dataset.id.get_type()
    simple = (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM, h5py.h5t.OPAQUE, h5py.h5t.COMPOUND)
    if file_type.get_class() not in simple or dataset.dtype.hasobject or file_type.get_size() != itemsize:
        raise ValueError(f"dataset {dataset.name} has a type that does not fit {itemsize}-byte elements")
    size = prod(dataset.shape) * itemsize
    # A damaged shape must not become a request for memory: what is there bounds what is read.
    if dataset.chunks is None and dataset.id.get_storage_size() < size:
        raise ValueError(f"dataset {dataset.name} holds fewer than the {size} bytes of its shape")
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, data.numpy(), file_type)
    return data


def _restride(
    data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    if len(stride) != len(shape) or not _is_dense(shape, stride):
        raise ValueError(f"stride {stride} does not fit shape {shape}")
    order = sorted(range(len(shape)), key=lambda axis: -stride[axis])
    elements = data.numpy().view(f"V{dtype.itemsize}").reshape(shape).transpose(order)
    moved = torch.empty_like(data)
    moved.numpy().view(f"V{dtype.itemsize}").reshape(elements.shape)[...] = elements
    return moved.view(dtype).as_strided(shape, stride)


def _default_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Say whether the strides lay the elements side by side, in whatever order of the axes."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return prod(shape) > 0 and all(step >= 0 for step in stride)
