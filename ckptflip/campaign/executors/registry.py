"""Executors by name: three built in, and those that other packages bring by an entry point."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from ckptflip.campaign.executors.protocol import Executor
from ckptflip.errors import CampaignError, CkptflipError, UsageError

ENTRY_POINTS = "ckptflip.executors"
PERFORM = "ckptflip.campaign.worker:perform"

_BUILT_IN = {
    "local": "ckptflip.campaign.executors.local:start",
    "ray": "ckptflip.campaign.executors.ray_cluster:start",
    "slurm": "ckptflip.campaign.executors.slurm:start",
}


class Starter(Protocol):
    """What an entry point of the group ``ckptflip.executors`` names: a function that starts an executor."""

    def __call__(
        self,
        *,
        workers: int | None,
        call: str,
        folder: Path,
        environment: dict[str, str],
        options: dict[str, Any],
    ) -> Executor:
        """Start workers.

        Args:
            workers: how many tasks run at once at most; None: as many as there is room for.
            call: ``package.module:function``, from bytes to bytes, that workers call on each payload.
            folder: theirs alone; it exists.
            environment: variables to set in workers before any framework is imported.
            options: of this executor; `check_options` refuses those it does not know.
        """


def names() -> list[str]:
    """The executors there are, sorted.

    Example:
        >>> set(names()) >= {"local", "ray", "slurm"}
        True
    """
    return sorted({*_BUILT_IN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def start(
    name: str,
    *,
    workers: int | None,
    call: str = PERFORM,
    folder: Path,
    environment: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> Executor:
    """Start an executor.

    Args:
        name: one of `names`.
        workers: how many tasks run at once at most; None: as many as there is room for.
        call: ``package.module:function``, from bytes to bytes, that workers call on each payload.
        folder: for logs and what is under way; it belongs to one store, and is made when missing.
        environment: variables to set in workers before any framework is imported.
        options: of the executor, as ``docs/executors.md`` lists them.

    Raises:
        UsageError: no such executor or option, or a value that makes no sense.
        MissingExtraError: the executor needs a library that is not installed.
        CampaignError: the executor cannot be started.

    Example:
        >>> start("lokal", workers=1, folder=Path("spool"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ckptflip.errors.UsageError: there is no executor 'lokal'. Did you mean 'local'? There are: ...
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers: at least 1 is needed")
    if ":" not in call:
        raise UsageError(f"{call!r} names no function: it is written package.module:function")
    starter = _starter(name)
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CampaignError(f"the executor's folder {folder} cannot be made: {error.strerror}") from error
    return starter(
        workers=workers,
        call=call,
        folder=folder,
        environment=dict(environment or {}),
        options=dict(options or {}),
    )


def check_options(
    name: str, options: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]]
) -> None:
    """Refuse options that an executor does not take.

    Args:
        name: the executor's.
        options: as given.
        known: the types that each option may have.

    Raises:
        UsageError: an unknown option, or a value of another type.

    Example:
        >>> check_options("slurm", {"partion": "gpu"}, {"partition": str})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ckptflip.errors.UsageError: executor slurm has no option 'partion'. Did you mean 'partition'? ...
    """
    for option, value in options.items():
        if option not in known:
            takes = f"It takes: {', '.join(sorted(known))}" if known else "It takes none"
            raise UsageError(f"executor {name} has no option {option!r}.{_nearest(option, known)} {takes}")
        given = known[option]
        kinds = given if isinstance(given, tuple) else (given,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"executor {name}: option {option} is {value!r}, which is no {wanted}")


def _starter(name: str) -> Starter:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return cast(Starter, getattr(import_module(module), attribute))
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            return cast(Starter, entry.load())
        except CkptflipError:
            raise
        except Exception as error:  # another package may fail in any way on import
            raise CampaignError(
                f"executor {name} ({entry.value}) cannot be imported: {type(error).__name__}: {error}"
            ) from error
    known = names()
    raise UsageError(f"there is no executor {name!r}.{_nearest(name, known)} There are: {', '.join(known)}")


def _nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
