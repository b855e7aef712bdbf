"""What torch itself holds, as unsigned words: to compare with what ckptflip reads."""

import numpy as np
import torch

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """The words of a tensor in C order, real and imaginary parts apart, as they lie in memory."""
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    ints = tensor.view(_SAME_SIZE[tensor.itemsize]).contiguous().reshape(-1).numpy()
    return ints.view(f"u{tensor.itemsize}").copy()


def nibbles_of(tensor: torch.Tensor) -> np.ndarray:
    """The halves of each byte, the low one first."""
    words = words_of(tensor)
    return np.stack([words & 15, words >> 4], axis=-1).reshape(-1)


def all_words(checkpoint, name: str) -> np.ndarray:
    """All words that ckptflip reads of a tensor."""
    position = next(i for i, t in enumerate(checkpoint.tensors) if t.name == name)
    blocks = list(checkpoint.blocks(position))
    whole = np.concatenate(blocks) if blocks else np.empty(0, np.uint8)
    every = np.arange(checkpoint.tensors[position].words, dtype=np.int64)
    assert (checkpoint.read(position, every) == whole).all()
    return whole


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of any dtype with random bits, NaNs and all; bools are 0 or 1."""
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = rng.integers(0, 2 if dtype == torch.bool else 256, int(np.prod(shape)) * size, dtype=np.uint8)
    if not raw.size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.tobytes()), dtype=dtype).reshape(shape).clone()
