"""Digests of training states, and Keras models that are kept from one checkpoint to the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckptflip.training.digests import state_digest

ROOT = Path(__file__).parent.parent.parent
KERAS = """
import sys
from pathlib import Path
import ckptflip
from ckptflip.errors import CkptflipError
from ckptflip.training import find

folder = Path(sys.argv[1])
first, second, other = (find("digits-mlp-keras") for _ in range(3))
first.start(3)
first.train_epoch()
first.save(folder / "a.keras")
saved = first.digest()
first.train_epoch()
trained = first.digest()
assert trained != saved
second.load(folder / "a.keras")
assert second.digest() == saved
second.train_epoch()
assert second.digest() == trained
# Into the same model, after other training, after another checkpoint and after a seed of its own.
second.reload(folder / "a.keras")
assert second.digest() == saved
ckptflip.inject(folder / "a.keras", out=folder / "b.keras", bits="critical", count=40, roles="model", seed=1)
second.reload(folder / "b.keras")
second.train_epoch()
other.load(folder / "b.keras")
other.train_epoch()
assert second.digest() == other.digest() != saved
other.start(4)
other.reload(folder / "a.keras")
other.train_epoch()
assert other.digest() == trained
# A checkpoint that cannot be taken up leaves no state, rather than half of one.
(folder / "c.keras").write_bytes(b"no archive")
try:
    other.reload(folder / "c.keras")
except CkptflipError:
    pass
try:
    other.train_epoch()
except CkptflipError as why:
    assert "start()" in str(why) or "no state" in str(why) or "load" in str(why), why
else:
    raise AssertionError("it trains what is half loaded")
print("fine")
"""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [2, 1]), ([1], [1.0]), ({"a": 1}, {"b": 1}), ([[1], 2], [1, [2]]), ("1", 1), (b"1", "1"),
        (0.0, -0.0), (np.float32([1, 2]), np.float32([[1, 2]])), (np.zeros(2, "i4"), np.zeros(2, "f4")),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ([], {}), (True, 1),
    ],
)  # fmt: skip
def test_different_states_differ(one: object, other: object) -> None:
    assert state_digest(one) != state_digest(other)
    assert state_digest(one) == state_digest(one)


def test_torch_states_count_by_their_bits() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        one = torch.ones(6).to(dtype).reshape(2, 3)
        assert state_digest(one) == state_digest(one.clone())
        # A view with strides counts by its elements, in their order.
        assert state_digest(one.t().contiguous().t()) == state_digest(one)
        changed = one.clone()
        changed.view(torch.uint8).reshape(-1)[0] ^= 1
        assert state_digest(changed) != state_digest(one)
    assert state_digest(torch.empty(0)) != state_digest(torch.empty(0, 2))


def test_a_workload_digests_what_it_would_save(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from ckptflip.training import find

    workload, again = find("digits-mlp"), find("digits-mlp")
    workload.start(1)
    workload.train_epoch()
    workload.save(tmp_path / "a.h5")
    before = workload.digest()  # type: ignore[attr-defined]
    again.load(tmp_path / "a.h5")
    assert again.digest() == before  # type: ignore[attr-defined]
    workload.evaluate()
    assert workload.digest() == before  # type: ignore[attr-defined]
    workload.train_epoch()
    assert workload.digest() != before  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", ["tensorflow", "torch", "jax"])
def test_a_kept_keras_model_is_as_good_as_a_new_one(tmp_path: Path, backend: str) -> None:
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    import importlib.util

    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = {
        **os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KERAS, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("fine")
