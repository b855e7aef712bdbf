"""Checks of Keras on one backend, run by a script in a process of its own: a process has one backend."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

BACKENDS = [b for b in ("torch", "tensorflow", "jax") if find_spec("keras") and find_spec(b)]
_ROOT = Path(__file__).parent.parent


def names_in(script: Path) -> list[str]:
    """The checks of a script: its functions `check_…`."""
    body = ast.parse(script.read_text("utf-8")).body
    return [n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("check_")]


@cache
def results(script: Path, backend: str, folder: Path) -> dict[str, str | None]:
    """What each check raised; None where it passed. The script runs once for all of them."""
    out = folder / f"{backend}.json"
    quiet = {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(_ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(script), str(out)], env=os.environ | quiet, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str | None] = json.loads(out.read_text())
    return found
