"""Seals: a checkpoint's digests beside it, which find damage, name it and, with an erasure code, mend it.

Each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Damage": "findings",
    "Repaired": "repairing",
    "Sealed": "sealing",
    "Verdict": "verifying",
    "repair": "repairing",
    "seal": "sealing",
    "verified": "verifying",
    "verify": "verifying",
}
__all__ = ["Damage", "Repaired", "Sealed", "Verdict", "repair", "seal", "verified", "verify"]

if TYPE_CHECKING:
    from ckptflip.protect.seals.findings import Damage
    from ckptflip.protect.seals.repairing import Repaired, repair
    from ckptflip.protect.seals.sealing import Sealed, seal
    from ckptflip.protect.seals.verifying import Verdict, verified, verify


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptflip.protect.seals' has no attribute {name!r}")
    return getattr(import_module(f"ckptflip.protect.seals.{_HOMES[name]}"), name)
