"""ckptflip: flip chosen bits in saved checkpoints, resume training, and measure what the flips did.

The verbs are functions here; each is imported when it is first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "inject": "ckptflip.alter",
    "replay": "ckptflip.alter",
    "undo": "ckptflip.alter",
    "convert": "ckptflip.conversion",
    "diff": "ckptflip.compare",
    "scan": "ckptflip.compare",
    "repair": "ckptflip.protect.seals",
    "seal": "ckptflip.protect.seals",
    "verify": "ckptflip.protect.seals",
    "Policy": "ckptflip.faults",
    "opened": "ckptflip.checkpoints",
    "CkptflipError": "ckptflip.errors",
}
__all__ = [
    "CkptflipError",
    "Policy",
    "__version__",
    "convert",
    "diff",
    "inject",
    "opened",
    "repair",
    "replay",
    "scan",
    "seal",
    "undo",
    "verify",
]

if TYPE_CHECKING:
    from ckptflip.alter import inject, replay, undo
    from ckptflip.checkpoints import opened
    from ckptflip.compare import diff, scan
    from ckptflip.conversion import convert
    from ckptflip.errors import CkptflipError
    from ckptflip.faults import Policy
    from ckptflip.protect.seals import repair, seal, verify


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptflip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
