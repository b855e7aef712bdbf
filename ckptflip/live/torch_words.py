"""Words of a PyTorch tensor where they lie: read and XOR by flat position, on any device, with any strides.

Nothing here is seen by autograd: like a fault in memory, a change leaves no trace in a tensor's version.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptflip.bits import NumberFormat
from ckptflip.checkpoints.torch_zip.dtypes import dtype_named

_UNSIGNED: dict[int, Any] = {1: c_uint8, 2: c_uint16, 4: c_uint32, 8: c_uint64}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def number_of(tensor: torch.Tensor, *, foreseen: bool = False) -> NumberFormat:
    """The format of a tensor's elements.

    Args:
        tensor: any tensor.
        foreseen: whether it may be one without memory, which stands for one to come.

    Raises:
        ValueError: its words cannot be altered one by one where they are; says why.

    Example:
        >>> number_of(torch.zeros(2, dtype=torch.bfloat16)).exponent
        8
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and not _is_plain_parameter(tensor):
        raise ValueError(f"a {type(tensor).__name__}: only plain tensors hold their own numbers")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError("inside torch.func (vmap, grad, jacrev), where it has no memory of its own")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ValueError(f"sparse or nested ({tensor.layout})")
    if tensor.is_quantized:
        raise ValueError("a quantised tensor, which shares a scale with its words")
    if tensor.is_meta and not foreseen:
        raise ValueError("a meta tensor, which has no values")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("a view that is negated or conjugated when it is read")
    known = dtype_named(str(tensor.dtype).removeprefix("torch."))
    if known is None or known.packed:
        raise ValueError(f"of the dtype {tensor.dtype}, whose words cannot be told apart")
    if not is_apart(tensor.shape, tensor.stride()):
        raise ValueError("expanded: several of its elements are one place in memory")
    return known.number


def read(tensor: torch.Tensor, number: NumberFormat, words: NDArray[np.int64]) -> NDArray[Any]:
    """Words at flat positions in C order, unsigned; no others are read or copied.

    Args:
        tensor: any that `number_of` accepts.
        number: its format.
        words: positions; word = 2 · element + part for complex numbers.

    Example:
        >>> x = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
        >>> [hex(word) for word in read(x.T, number_of(x), np.array([0, 2]))]
        ['0x3f800000', '0xc0000000']
    """
    if words.size == 1 and _is_inside(tensor, number, word := words.item()):
        return np.array([_there(tensor, number, word).value], number.word_dtype)
    memory, at = _places(tensor, words)
    if memory.device.type == "cpu":
        found: NDArray[Any] = memory.numpy().view(number.word_dtype)[at]
        return found
    gathered: NDArray[Any] = memory[_on(memory, at)].cpu().numpy().view(number.word_dtype)
    return gathered


def xor(
    tensor: torch.Tensor, number: NumberFormat, words: NDArray[np.int64], masks: NDArray[np.uint64]
) -> None:
    """XOR masks into words at distinct flat positions, in place.

    Args:
        tensor, number, words: as for `read`.
        masks: one for each word, no wider than it.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> xor(x, number_of(x), np.array([1]), np.array([1 << 31], np.uint64))
        >>> x
        tensor([ 1., -2.], requires_grad=True)
    """
    if words.size == 1 and _is_inside(tensor, number, word := words.item()):
        flip_one(tensor, number, word, masks.item())
        return
    memory, at = _places(tensor, words)
    fitting = masks.astype(number.word_dtype)
    if memory.device.type == "cpu":
        memory.numpy().view(number.word_dtype)[at] ^= fitting
        return
    place = _on(memory, at)
    signed = f"i{number.word_size}" if number.word_size > 1 else "u1"
    memory[place] ^= torch.tensor(fitting.view(signed), device=memory.device)


def is_row(tensor: torch.Tensor) -> bool:
    """Whether the words of a tensor lie in C order, one behind the other, in memory of this process."""
    return bool(tensor.is_cpu and tensor.is_contiguous())


def flip_one(tensor: torch.Tensor, number: NumberFormat, word: int, mask: int) -> int:
    """XOR a mask into one word, in place; the fastest way there is, in a plain row of words.

    Args:
        tensor, number: as for `read`; one that `is_row`.
        word: its position, within the tensor.
        mask: no wider than the word.

    Returns:
        The word as it was before.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> hex(flip_one(x, number_of(x), 1, 1 << 31)), x.tolist()
        ('0x40000000', [1.0, -2.0])
    """
    there = _there(tensor, number, word)
    before: int = there.value
    there.value = before ^ mask
    return before


def _there(tensor: torch.Tensor, number: NumberFormat, word: int) -> Any:
    """One word in a plain row of them, where it is."""
    size = number.word_size
    return _UNSIGNED[size].from_address(tensor.data_ptr() + size * word)


def _is_inside(tensor: torch.Tensor, number: NumberFormat, word: int) -> bool:
    """Whether a tensor is a plain row of words that has this one."""
    parts = number.parts
    fits = tensor.element_size() == number.word_size * parts
    return fits and 0 <= word < tensor.numel() * parts and is_row(tensor)


def address(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a dense tensor, and the byte after its last; (0, 0) for an empty one."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.data_ptr()
    return first, first + (_span(tensor.shape, tensor.stride())) * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their range of memory, in whatever order of the axes."""
    return bool(_span(tensor.shape, tensor.stride()) == tensor.numel())


def offsets(tensor: torch.Tensor) -> NDArray[np.int64]:
    """The address of every element, eight bytes for each: for the rare tensors that interleave."""
    positions = np.arange(tensor.numel(), dtype=np.int64)
    found: NDArray[np.int64] = _strided(positions, tuple(tensor.shape), tensor.stride())
    found *= tensor.element_size()
    found += tensor.data_ptr()
    return found


def _places(tensor: torch.Tensor, words: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """A tensor's memory as a row of integers, and where words lie in it."""
    data = tensor.data
    if data.is_complex():
        data = torch.view_as_real(data)
    integers = data.view(_INTEGERS[data.element_size()])
    if integers.is_contiguous():
        return integers.view(-1), words
    shape, stride = tuple(integers.shape), integers.stride()
    row = integers.as_strided((_span(shape, stride),), (1,), integers.storage_offset())
    return row, _strided(words, shape, stride)


def _on(memory: torch.Tensor, at: NDArray[np.int64]) -> torch.Tensor:
    return torch.tensor(at, device=memory.device)


def _strided(
    positions: NDArray[np.int64], shape: tuple[int, ...], stride: Sequence[int]
) -> NDArray[np.int64]:
    """Where elements lie, counted in elements from the first; from their flat positions in C order."""
    found = np.zeros_like(positions)
    rest = positions
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        rest, along = np.divmod(rest, max(length, 1))
        found += along * step
    return found


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last place in memory, both included."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def is_apart(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every element has a place of its own: each axis steps over all that the shorter ones reach."""
    reached = 0
    for step, length in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if length and step <= reached:
            return False
        reached += (length - 1) * step
    return True


def _is_plain_parameter(tensor: torch.Tensor) -> bool:
    """Whether a subclass of Parameter leaves to PyTorch what becomes of its numbers."""
    kind = type(tensor)
    return isinstance(tensor, torch.nn.Parameter) and bool(
        kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and kind.__torch_function__ == torch.nn.Parameter.__torch_function__
    )
