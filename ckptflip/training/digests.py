"""A digest of a whole training state: equal digests, equal states, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

Feed = Callable[[bytes], None]


def state_digest(state: Any) -> str:
    """Digest a state made of dicts, lists, tuples, tensors, arrays, bytes and plain values.

    Args:
        state: nested as it likes; tensors of PyTorch and arrays of numpy count by dtype, shape and bits.

    Returns:
        32 hexadecimal digits of BLAKE2b.

    Example:
        >>> import numpy as np
        >>> one, other = np.float32([1, 2]), np.float32([1, 2])
        >>> state_digest({"w": one, "epoch": 3}) == state_digest({"w": other, "epoch": 3})
        True
        >>> other.view(np.uint32)[0] ^= 1
        >>> state_digest({"w": one, "epoch": 3}) == state_digest({"w": other, "epoch": 3})
        False
    """
    hashing = hashlib.blake2b(digest_size=16)
    _feed(state, hashing.update)
    return hashing.hexdigest()


def _feed(value: Any, update: Feed) -> None:
    # Every part says its kind and length first, so that no two states look alike.
    if isinstance(value, dict):
        update(f"d{len(value)};".encode())
        for key, item in value.items():
            _feed(key, update)
            _feed(item, update)
    elif isinstance(value, list | tuple):
        update(f"l{len(value)};".encode())
        for item in value:
            _feed(item, update)
    elif isinstance(value, bytes):
        update(f"b{len(value)};".encode())
        update(value)
    elif isinstance(value, float):
        update(f"f{value.hex()};".encode())
    elif hasattr(value, "untyped_storage"):
        _tensor(value, update)
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        update(f"a{value.dtype}{list(value.shape)};".encode())
        update(value.tobytes())
    else:
        text = repr(value).encode()
        update(f"r{type(value).__name__}{len(text)};".encode())
        update(text)


def _tensor(value: Any, update: Feed) -> None:
    import torch

    update(f"t{value.dtype}{list(value.shape)};".encode())
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8) if value.numel() else None
    if flat is not None:
        update(memoryview(flat.cpu().numpy()))  # type: ignore[arg-type]
