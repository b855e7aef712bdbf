"""A whole PyTorch training state in one readable HDF5 file, and back exactly as it was.

``torch.save`` writes a pickle inside a zip. This format writes what HDF5 tools can read: tensors are
datasets, dicts and lists are groups, everything else is a small JSON attribute of its group, so that
``state["model"]["conv1.weight"]`` is the dataset ``model/conv1.weight``. No value is ever carried through
a float: every bit pattern survives, signalling NaNs included. Nothing in a file is executed on loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptflip.errors import MissingExtraError

__all__ = ["load", "save"]


def save(state: Any, path: str | Path) -> None:
    """Write a training state to an HDF5 file; the file appears under its name only when it is complete.

    Args:
        state: a dict, list or tuple, nested to any depth. Keys: str, int, float, bool, None and tuples of
            these. Leaves: dense tensors and numpy arrays of every numeric dtype, numpy scalars, int, float,
            complex, str, bytes, bool, None, ``torch.Size``, ``torch.dtype``, ``torch.device``.
            Tensors that share one storage, offset, shape and stride become one dataset with hard links;
            views that merely overlap become datasets of their own. Tensors on a device are read from it.
        path: the file to write; an existing one is replaced.

    Raises:
        CheckpointError: something in the state cannot be stored (the message names its place), or the
            file cannot be written; then nothing is left under ``path``.
        MissingExtraError: PyTorch is not installed.

    Example:
        >>> import tempfile, torch
        >>> from ckptflip import torch_h5
        >>> path = Path(tempfile.mkdtemp()) / "state.h5"
        >>> torch_h5.save({"model": {"w": torch.ones(2, dtype=torch.bfloat16)}, "epoch": 5}, path)
        >>> torch_h5.load(path)
        {'model': {'w': tensor([1., 1.], dtype=torch.bfloat16)}, 'epoch': 5}
    """
    _need_torch("Saving a PyTorch training state")
    from ckptflip.torch_h5 import writing

    writing.save(state, Path(path))


def load(path: str | Path) -> Any:
    """Read back what `save` wrote; tensors come back on the CPU, tied tensors as one object.

    Raises:
        CheckpointError: the file is missing, damaged, or not written by `save`.
        MissingExtraError: PyTorch is not installed.
    """
    _need_torch("Loading a PyTorch training state")
    from ckptflip.torch_h5 import reading

    return reading.load(Path(path))


def _need_torch(purpose: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torch", "torch", purpose) from error
