"""The contract of a resumable training recipe, and finding one by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ckptflip.errors import CkptflipError, WorkloadError
from ckptflip.training.checks import check_options

BUILT_IN = {
    "digits-cnn": "ckptflip.training.digits:cnn",
    "digits-cnn-keras": "ckptflip.training.digits_keras:cnn",
    "digits-mlp": "ckptflip.training.digits:mlp",
    "digits-mlp-keras": "ckptflip.training.digits_keras:mlp",
    "afm": "ckptflip.recsys.workloads:afm",
    "alexnet": "ckptflip.vision.workloads:alexnet",
    "alexnet-keras": "ckptflip.vision.workloads:alexnet_keras",
    "dcn": "ckptflip.recsys.workloads:dcn",
    "dcn-v2": "ckptflip.recsys.workloads:dcn_v2",
    "deepfm": "ckptflip.recsys.workloads:deepfm",
    "dlrm": "ckptflip.recsys.workloads:dlrm",
    "dummy-dlrm": "ckptflip.recsys.workloads:dummy_dlrm",
    "fm": "ckptflip.recsys.workloads:fm",
    "resnet18": "ckptflip.vision.workloads:resnet18",
    "resnet18-keras": "ckptflip.vision.workloads:resnet18_keras",
    "resnet50": "ckptflip.vision.workloads:resnet50",
    "resnet50-keras": "ckptflip.vision.workloads:resnet50_keras",
    "served": "ckptflip.recsys.workloads:served",
    "sharded": "ckptflip.training.sharded:sharded",
    "vgg16": "ckptflip.vision.workloads:vgg16",
    "vgg16-keras": "ckptflip.vision.workloads:vgg16_keras",
    "wide-deep": "ckptflip.recsys.workloads:wide_deep",
}


@runtime_checkable
class Workload(Protocol):
    """A recipe that stops at any epoch and resumes exactly.

    The promise every implementation makes: ``start(s)``, n epochs, ``save``, ``load`` (in this or a fresh
    process) and m more epochs leave the same bits as ``start(s)`` and n + m epochs. Nothing outside the
    object, such as a global random generator, has a part in the result.

    A workload may say in ``suffix`` how its checkpoints' names end; without it they end in ``.h5``.
    """

    @property
    def name(self) -> str:
        """What the workload is called; a checkpoint of another name is refused by `load`."""

    @property
    def epoch(self) -> int:
        """Epochs trained so far; 0 after `start`."""

    def start(self, seed: int) -> None:
        """Set up the initial state: weights, optimizer and every random stream follow from `seed` (>= 0)."""

    def train_epoch(self) -> dict[str, float]:
        """Train one epoch over the whole training set.

        Returns:
            ``loss``, the mean over the samples, and ``grad_norm``, the L2 norm of the whole gradient, mean
            over the steps. Either may be NaN or infinite: training that went wrong is a result, not an error.
        """

    def evaluate(self) -> dict[str, float]:
        """Measure the current state on the test set without changing it.

        Returns:
            ``accuracy`` (0 to 1) and ``loss``; where counted, ``nan``, ``inf`` and ``extreme``: how many
            weights are NaN, infinite or beyond the threshold. Any further value is recorded under its name.
        """

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to a checkpoint."""

    def load(self, path: Path) -> None:
        """Take up a checkpoint's state, seed and epoch included; an altered one as far as it can be read.

        Raises:
            CheckpointError: the file cannot be read, or what it holds cannot be taken up.
            WorkloadError: the file belongs to another workload or another architecture.
        """


def find(name: str, **options: Any) -> Workload:
    """Find a workload: a built-in name, or ``package.module:object`` for one of your own.

    The object is a workload, or a function or class that makes one. Modules are found as Python finds them,
    and in the working directory.

    Args:
        name: the workload.
        options: keyword arguments of the function that makes it, such as ``data`` and ``precision`` of the
            vision models.

    Raises:
        WorkloadError: no such name, module or object, or it is no workload.
        UsageError: the workload does not take an option, or not its value.

    Example:
        >>> find("digits-mlp").name
        'digits-mlp'
    """
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(BUILT_IN))
        raise WorkloadError(
            f"there is no workload {name!r}.{hint} Built in: {known}. Yours are named package.module:object"
        )
    module_name, _, attribute = path.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        module = f"{Path(module_name).stem}:{attribute}"
        raise WorkloadError(f"{name} names a file; name the module, as in {module}, from the file's folder")
    found = _attribute(_module(module_name, name), attribute, name)
    if isinstance(found, Workload) and not isinstance(found, type):
        _check_options(None, options, name)
        return found
    if not callable(found):
        raise WorkloadError(
            f"{name} is a {type(found).__name__}, neither a workload nor a function that makes one"
        )
    _check_options(found, options, name)
    return _made(found, name, options)


def _check_options(factory: Any, options: dict[str, Any], name: str) -> None:
    """Refuse options that a workload does not take; None stands for a workload that is made already."""
    try:
        taken = dict(inspect.signature(factory).parameters) if factory is not None else {}
    except (TypeError, ValueError):
        return  # written in C: calling it will tell
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    check_options(name, options, list(taken))


def _module(module_name: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except CkptflipError:
        raise
    except Exception as error:  # a user's module may fail in any way on import
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(error.name or "\0")
        why = "there is no such module, here or installed" if missing else f"{type(error).__name__}: {error}"
        raise WorkloadError(f"workload {name}: importing {module_name!r} failed: {why}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _attribute(module: Any, attribute: str, name: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise WorkloadError(f"workload {name}: {module.__name__} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def _made(factory: Any, name: str, options: dict[str, Any]) -> Workload:
    try:
        made = factory(**options)
    except CkptflipError:
        raise
    except Exception as error:  # the user's function may fail in any way
        raise WorkloadError(f"workload {name}: calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Workload):
        wanted = ("name", "epoch", "start", "train_epoch", "evaluate", "save", "load")
        missing = ", ".join(member for member in wanted if not hasattr(made, member))
        raise WorkloadError(f"workload {name} made a {type(made).__name__}, which lacks {missing}")
    return made
