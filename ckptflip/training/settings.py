"""PyTorch's process-wide settings, held for the length of a block and put back after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ckptflip.errors import UsageError


@contextmanager
def settled(threads: int, device: torch.device) -> Iterator[None]:
    """Compute reproducibly inside the block; threads, determinism and random states are restored after it.

    Args:
        threads: intra-op threads of PyTorch inside the block. A sum split over another number of threads
            is another sum in its last bit, so this number is part of an exact resume.
        device: the device whose random state is kept, besides the CPU's.

    Raises:
        UsageError: a CUDA device that is not there.
    """
    cuda = device.type == "cuda"
    if cuda:
        # Not when a workload is made: a campaign may be planned where no GPU is.
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"there is no device {device}; CUDA devices here: {torch.cuda.device_count()}")
        # cuBLAS is deterministic only with a fixed workspace, which it reads from the environment.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.backends.cudnn.benchmark,
    )
    devices = [device.index or 0] if cuda else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(threads)
            # The switch of use_deterministic_algorithms, which would import the compiler: a second's work.
            torch.set_deterministic_debug_mode("error")
            torch.backends.cudnn.benchmark = False
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.set_deterministic_debug_mode(before[1])
            torch.backends.cudnn.benchmark = before[2]


def seed_all(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and, for a CUDA device, that device's; other devices stay untouched."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the generators that a model on this device draws from, as byte tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; RuntimeError where PyTorch sees that a state is damaged."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
