"""Products that check themselves on GPUs: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptflip.protect.intensity import CheckedLinear
from ckptflip.protect.intensity import triton_schemes as ts
from ckptflip.protect.intensity.schemes import SCHEMES
from ckptflip.protect.intensity.weights import prepared

CHECKS = Path(__file__).with_name("triton_checks.py")


@pytest.mark.parametrize("name", ["tile", "total", "fault", "weight", "narrow"])
def test_in_the_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, CHECKS, name], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "held\n", done.stdout + done.stderr


def test_what_is_missing_is_named(monkeypatch):
    weights = prepared(torch.ones(2, 2), None)
    monkeypatch.setattr(ts, "find_spec", lambda name: None)
    assert ts.unfit(weights) == "Triton is not installed: pip install 'ckptflip[triton]'"
    monkeypatch.setattr(ts, "find_spec", lambda name: object())
    assert ts.unfit(weights) == ""
    assert "float32, float16, bfloat16" in ts.unfit(prepared(torch.ones(2, 2, dtype=torch.float64), None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["global", "row", "tile", "replication"])
def test_on_a_gpu(name, dtype):
    layer = torch.nn.Linear(130, 70, dtype=dtype, device="cuda")
    if SCHEMES[name].unfit(prepared(layer.weight, layer.bias)):
        pytest.skip("Triton is not installed")
    checked, x = CheckedLinear(layer, name), torch.randn(100, 130, dtype=dtype, device="cuda")
    assert torch.allclose(checked(x).float(), layer(x).float(), atol=0.05)
    if name in ("global", "row"):
        checked.on_error = "count"
        checked.weight.data[3, 4] += 1000
        checked(x)
        assert checked.detections.faulty == 1
