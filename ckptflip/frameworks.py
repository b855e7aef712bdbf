"""What frameworks that meet in one process ask of each other."""

from __future__ import annotations

import contextlib
import sys
from importlib import import_module
from importlib.util import find_spec


def before_tensorflow() -> None:
    """Load Triton, where it is installed: call this before TensorFlow is imported.

    TensorFlow and Triton bring an LLVM each. Where Triton's comes second, it registers options once more, and
    LLVM ends the process. PyTorch loads Triton when the first optimizer is made, so a process that trains in
    both would end there. In this order they bear each other. Seen with TensorFlow 2.21, Triton 3.7 and 3.9.
    """
    if "tensorflow" not in sys.modules and "triton" not in sys.modules and find_spec("triton"):
        with contextlib.suppress(Exception):  # a broken one is not ours to report
            import_module("triton")
