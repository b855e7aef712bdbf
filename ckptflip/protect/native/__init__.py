"""The compiled kernels, if they were built: one small extension that knows addresses and sizes, no framework.

It is built with the package where there is a C++ compiler. Everything that uses it has a way without it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

SWITCH = "CKPTFLIP_NATIVE"


@cache
def kernels() -> ModuleType | None:
    """The extension, or None where it was not built, cannot be loaded, or is switched off.

    ``CKPTFLIP_NATIVE=0`` in the environment switches it off for the process.

    Example:
        >>> found = kernels()
        >>> found is None or found.isa() in {"avx512", "avx2", "generic"}
        True
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return import_module("ckptflip.protect.native._kernels")
    except ImportError:
        return None


def why_not() -> str:
    """Why `kernels` gives None, and what to do; for messages.

    Example:
        >>> "compiler" in why_not()
        True
    """
    if os.environ.get(SWITCH) == "0":
        return f"compiled kernels are switched off: {SWITCH}=0 is set; unset it, and a compiler builds them"
    return "compiled kernels were not built: install a C++ compiler and reinstall ckptflip to have them"
