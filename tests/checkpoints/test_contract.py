"""Every format keeps the contract: what its real library wrote is altered exactly, undone, and read by it."""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptflip.loaders import PROBES, Probe
from ckptflip.testing import CheckpointContract

pytestmark = pytest.mark.filterwarnings("ignore")  # frameworks warn of their own future


def _tensorflow_error() -> type[Exception]:
    import tensorflow

    found: type[Exception] = tensorflow.errors.OpError
    return found


# What the loader raises when a checksum was left as it was; the others do not notice.
NOTICED: dict[str, Callable[[], type[Exception]]] = {
    "h5py-fletcher": lambda: OSError,
    "npz": lambda: zipfile.BadZipFile,
    "npz-deflated": lambda: zipfile.BadZipFile,
    "tf-reader": _tensorflow_error,
    "tf-restore": _tensorflow_error,
    "saved-model": _tensorflow_error,
    "zarr-crc32c": lambda: ValueError,
    "zarr-shards": lambda: ValueError,
}
if sys.version_info < (3, 13):  # from then on zipfile checks no stored member that is read out of order
    NOTICED["keras"] = lambda: zipfile.BadZipFile


def _contract(probe: Probe) -> type[CheckpointContract]:
    class Contract(CheckpointContract):
        exact = probe.exact
        patched = probe.patched

        @property
        def leave_error(self) -> type[Exception] | None:  # type: ignore[override]
            return NOTICED[probe.name]() if probe.name in NOTICED else None

        @pytest.fixture
        def checkpoint(self, tmp_path: Path, written: Callable[[Probe], Path]) -> Path:
            missing = probe.missing()
            if missing:
                pytest.skip(f"{missing} is not installed")
            path = written(probe)
            shutil.copytree(path.parent, tmp_path / "original")
            return tmp_path / "original" / path.name

        def load(self, path: Path):  # type: ignore[no-untyped-def]
            return probe.load_calls().load(path)

    Contract.__name__ = Contract.__qualname__ = f"Test_{probe.name.replace('-', '_')}"
    return Contract


for _probe in PROBES:
    globals()[f"Test_{_probe.name.replace('-', '_')}"] = _contract(_probe)
