"""The digits and their split are scikit-learn's, read without importing it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptflip.errors import MissingExtraError
from ckptflip.training import digits_data

ROOT = Path(__file__).parents[2]


def test_the_images_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, targets = digits_data.digits("torch")
    wanted = datasets.load_digits(return_X_y=True)
    for found, expected in zip((pixels, targets), wanted, strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    # Where a release of it keeps them elsewhere.
    monkeypatch.setattr(Path, "is_file", lambda _: False)
    again = digits_data.digits("torch")
    assert np.array_equal(again[0], pixels) and np.array_equal(again[1], targets)


def test_the_split_is_the_one_that_scikit_learn_draws() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    _, targets = digits_data.digits("torch")
    wanted = selection.train_test_split(range(1797), test_size=0.2, stratify=targets, random_state=0)
    assert [part.tolist() for part in digits_data.split()] == wanted


def test_the_digits_are_read_without_importing_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    code = (
        "import sys; from ckptflip.training.digits import images; images(); print('sklearn' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_data, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="scikit-learn"):
        digits_data.digits("torch")
