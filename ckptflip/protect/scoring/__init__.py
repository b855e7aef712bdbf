"""Scoring: every protection against the same faults, in one trial.

`scored` is a workload for campaigns. Its checkpoint holds a trained model; each trial alters that model, and
one evaluation measures it bare and under every contender: what was noticed, and what was left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from ckptflip.protect.scoring.workload import ScoredWorkload

__all__ = ["scored"]


def scored(
    *, model: str = "dlrm", trained: int = 3, calibration: int = 8192, form: str = "fp32", **options: Any
) -> ScoredWorkload:
    """A model that is trained for some epochs, then measured bare and under every protection.

    Args:
        model: a built-in PyTorch workload, such as ``dlrm`` or ``digits-cnn``, or ``package.module:object``.
        trained: epochs before; the trained model is epoch 0.
        calibration: training samples that bounds are learnt from.
        form: ``fp32``, as it was trained; or ``int8``: linear layers and tables quantised after training,
            with their checksums; for models made of these alone, such as ``dlrm``.
        options: of `model`.

    Raises:
        UsageError: an option makes no sense, or the workload is none of PyTorch's.

    Example:
        >>> scored(model="digits-mlp", trained=1).name
        'scored[trained=1,model=digits-mlp]'
    """
    for name, value, least in (("trained", trained, 0), ("calibration", calibration, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} is a whole number of {least} or more, not {value!r}")
    from ckptflip.training.workload import find

    recipe = find(model, **options)
    from ckptflip.protect.scoring.forms import form_of
    from ckptflip.protect.scoring.workload import ScoredWorkload
    from ckptflip.training.pytorch import TorchWorkload

    if not isinstance(recipe, TorchWorkload):
        raise UsageError(f"protections are scored on PyTorch workloads; {model} is a {type(recipe).__name__}")
    return ScoredWorkload(recipe, trained, calibration, form=form, contenders=form_of(form).contenders)
