"""The digits in other precisions than float32: stored as asked, resumed exactly, never mixed up."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch")

import ckptflip
from ckptflip.errors import UsageError, WorkloadError
from ckptflip.training import find

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


@pytest.mark.parametrize("precision", DTYPES)
def test_weights_and_optimizer_are_of_the_precision_and_a_resume_is_exact(
    precision: str, tmp_path: Path
) -> None:
    workload = find("digits-cnn", precision=precision)
    workload.start(3)
    workload.train_epoch()
    workload.save(tmp_path / "epoch_001.h5")
    workload.train_epoch()
    straight = workload.digest()
    assert workload.evaluate()["accuracy"] > 0.3
    again = find("digits-cnn", precision=precision)
    again.load(tmp_path / "epoch_001.h5")
    again.train_epoch()
    assert again.digest() == straight
    with ckptflip.opened(tmp_path / "epoch_001.h5") as target:
        stored = {t.dtype for t in target.tensors if t.role in ("weight", "bias", "optimizer")}
    assert stored == {DTYPES[precision]}


def test_float32_is_the_workload_that_it_was(tmp_path: Path) -> None:
    plain, named = find("digits-cnn"), find("digits-cnn", precision="fp32")
    plain.start(0)
    named.start(0)
    assert (plain.name, plain.train_epoch()) == (named.name, named.train_epoch())
    assert plain.digest() == named.digest()


def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    workload = find("digits-cnn", precision="bf16")
    workload.start(0)
    workload.save(tmp_path / "epoch_000.h5")
    with pytest.raises(WorkloadError, match=r"belongs to the workload 'digits-cnn\[precision=bf16\]'"):
        find("digits-cnn").load(tmp_path / "epoch_000.h5")


def test_an_unknown_precision_is_an_error_with_a_hint() -> None:
    with pytest.raises(UsageError, match="not 'fp61'; did you mean fp64"):
        find("digits-cnn", precision="fp61")


KERAS = """
import sys
from pathlib import Path
import ckptflip
from ckptflip.errors import UsageError
from ckptflip.training import find

file = Path(sys.argv[1]) / "epoch_001.keras"
for precision, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("fp64", "float64")):
    workload = find("digits-cnn-keras", precision=precision)
    workload.start(3)
    workload.train_epoch()
    workload.save(file)
    workload.train_epoch()
    again = find("digits-cnn-keras", precision=precision)
    again.load(file)
    again.train_epoch()
    assert again.digest() == workload.digest(), precision
    assert workload.evaluate()["accuracy"] > 0.5, precision
    with ckptflip.opened(file) as target:
        stored = {t.dtype for t in target.tensors if t.role in ("weight", "bias")}
    assert stored == {dtype}, stored
"""
REFUSED = """
from ckptflip.errors import UsageError
from ckptflip.training import find

try:
    find("digits-cnn-keras", precision="fp64").start(0)
except UsageError as why:
    assert "KERAS_BACKEND=tensorflow" in str(why)
else:
    raise AssertionError("float64 was promised")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "script"), [("tensorflow", KERAS), ("torch", REFUSED)])
def test_keras_in_a_process_of_its_own(backend: str, script: str, tmp_path: Path) -> None:
    if not (find_spec("keras") and find_spec(backend)):
        pytest.skip(f"Keras on {backend} is not installed")
    quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | quiet | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
