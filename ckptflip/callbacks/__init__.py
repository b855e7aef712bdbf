"""Faults, and seals, while a model trains: one schedule, and an adapter for each training loop.

Each name is imported when it is first used, so no framework is loaded before its adapter is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ConvergenceTracker": "tracker",
    "DivergenceGuard": "guard",
    "InjectionSchedule": "schedule",
    "Injector": "pytorch",
    "KerasGuard": "keras",
    "KerasInjector": "keras",
    "KerasSealer": "keras_seals",
    "KerasTracker": "keras",
    "LightningGuard": "lightning",
    "LightningInjector": "lightning",
    "LightningSealer": "lightning_seals",
    "LightningTracker": "lightning",
    "SkorchGuard": "skorch",
    "SkorchInjector": "skorch",
    "SkorchTracker": "skorch",
    "TrainerGuard": "transformers",
    "TrainerInjector": "transformers",
    "TrainerSealer": "transformers_seals",
    "TrainerTracker": "transformers",
}
__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ckptflip.callbacks' has no attribute {name!r}")
    return getattr(import_module(f"ckptflip.callbacks.{_HOMES[name]}"), name)
