"""Clipping of Keras models, on each backend that is installed: every check of `keras_clipping_checks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from keras_processes import BACKENDS, names_in, results

CHECKS = Path(__file__).with_name("keras_clipping_checks.py")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keras-clipping")


@pytest.mark.parametrize("name", names_in(CHECKS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_clipping(backend: str, name: str, folder: Path) -> None:
    raised = results(CHECKS, backend, folder)[name]
    assert raised is None, raised
