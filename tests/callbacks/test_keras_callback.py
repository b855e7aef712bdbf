"""Keras' callbacks on each backend that is installed: every check of `keras_callback_checks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from keras_processes import BACKENDS, names_in, results

CHECKS = Path(__file__).with_name("keras_callback_checks.py")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keras-callbacks")


@pytest.mark.parametrize("name", names_in(CHECKS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_callbacks(backend: str, name: str, folder: Path) -> None:
    found = results(CHECKS, backend, folder)
    if name not in found:
        pytest.skip("compiles a step for every model; checked on the other backends")
    assert found[name] is None, found[name]
