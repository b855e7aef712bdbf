"""Checkpoints that real libraries wrote, each of them once in a run: frameworks are slow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from ckptflip.loaders import Probe


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Probe], Path]:
    """Writes the checkpoint of a probe, alone in its folder; copy it before you alter it."""

    @cache
    def write(probe: Probe) -> Path:
        return probe.load_calls().write(tmp_path_factory.mktemp(probe.name))

    return write
