"""Keras' variables in memory, on each backend that is installed: every check of `keras_target_checks.py`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("keras_target_checks.py")
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
BACKENDS = [b for b in ("torch", "tensorflow", "jax") if find_spec("keras") and find_spec(b)]


@cache
def results(backend: str, folder: Path) -> dict[str, str | None]:
    """What the checks raised, in a process of their own."""
    out = folder / f"{backend}.json"
    quiet = {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKS.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, str(CHECKS), str(out)], env=os.environ | quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str | None] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keras-checks")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_variables(backend: str, name: str, folder: Path) -> None:
    raised = results(backend, folder)[name]
    assert raised is None, raised
