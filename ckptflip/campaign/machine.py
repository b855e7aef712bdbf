"""What a campaign runs on: the processor, memory, system and libraries, for the record."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ckptflip import __version__
from ckptflip.campaign import loading
from ckptflip.campaign.executors.worker_process import WARM
from ckptflip.campaign.spec import Campaign
from ckptflip.processor import processor
from ckptflip.training.workload import BUILT_IN

_LIBRARIES = ("numpy", "scipy", "h5py", "torch", "keras", "tensorflow", "jax")


def machine() -> dict[str, Any]:
    """The machine: processor, usable cores, memory in bytes, system.

    Example:
        >>> sorted(machine())
        ['cores', 'memory', 'name', 'processor', 'system']
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": platform.node(),
        "processor": processor(),
        "cores": usable or 1,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def command_line() -> str:
    """The command that was given, as a shell takes it; the program by its name alone, wherever it lies."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Of ckptflip, Python and the libraries that are installed, imported or not."""
    found = {"ckptflip": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment_of(campaign: Campaign) -> dict[str, str]:
    """Variables that workers need before they import a framework, and what they are to import at once.

    Every worker has the framework of a built-in workload when its first task comes; a recipe of one's own is
    imported by the task, whose failure it then is.
    """
    found = {} if campaign.keras_backend is None else {"KERAS_BACKEND": campaign.keras_backend}
    names = [name for spec in campaign.workload if (name := loading.registered(spec)) in BUILT_IN]
    # The last is what PyTorch imports when it makes its first optimizer.
    modules = [
        *(["ckptflip.training.pytorch", "torch._dynamo"] if any(map(_of_pytorch, names)) else []),
        *(["ckptflip.training.keras"] if not all(map(_of_pytorch, names)) else []),
    ]
    return {**found, **({WARM: ",".join(modules)} if modules else {})}


def _of_pytorch(name: str) -> bool:
    return not name.endswith("-keras")
