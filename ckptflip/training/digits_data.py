"""The handwritten digits and their split, without importing scikit-learn: that takes a second per process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import MissingExtraError

# `train_test_split(range(1797), test_size=0.2, stratify=targets, random_state=0)`, the one behind the other.
_SPLIT = Path(__file__).with_name("digits_split.npy")
_TRAINED = 1437


def digits(extra: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All images and what they show: float64[1797, 64] in 0 to 16, int64[1797].

    Args:
        extra: the extra that brings scikit-learn, for the message where it is missing.

    Raises:
        MissingExtraError: scikit-learn, which brings the images, is not installed.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise MissingExtraError("scikit-learn", extra, "The digits workloads")
    stored = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not stored.is_file():  # it is scikit-learn's own business where they lie
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        return pixels, targets
    rows: NDArray[Any] = np.loadtxt(stored, delimiter=",")
    return rows[:, :-1], rows[:, -1].astype(np.int64)


def split() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images are trained on and which are for the test, 80:20 by class, in the order of their use.

    Example:
        >>> [len(part) for part in split()]
        [1437, 360]
    """
    order = np.load(_SPLIT, allow_pickle=False).astype(np.int64)
    return order[:_TRAINED], order[_TRAINED:]
