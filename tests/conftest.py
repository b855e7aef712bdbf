"""Settings of Hypothesis, checkpoints that real libraries wrote, and an end to what hangs.

Hypothesis: no deadlines, for machines are shared; in CI the same examples every time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from ckptflip.frameworks import before_tensorflow
from ckptflip.loaders import Probe

# Run in processes of their own, which they set up before they import anything: no doctests to collect.
collect_ignore = [
    "callbacks/keras_callback_checks.py",
    "callbacks/lightning_ddp.py",
    "live/keras_target_checks.py",
    "protect/keras_clipping_checks.py",
]

# Tests of all frameworks meet in one process.
before_tensorflow()

settings.register_profile("ckptflip", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("ckptflip")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Probe], Path]:
    """Writes the checkpoint of a probe once in a run, alone in its folder; copy it before you alter it."""

    @cache
    def write(probe: Probe) -> Path:
        return probe.load_calls().write(tmp_path_factory.mktemp(probe.name))

    return write


@pytest.fixture
def soon() -> Iterator[None]:
    """Fails a test that takes minutes where a second is due, or has no end."""

    def end(*_: object) -> None:
        raise TimeoutError("no end within two minutes")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
