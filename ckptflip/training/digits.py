"""Built-in workloads on scikit-learn's handwritten digits: 8x8 pixels, ten classes, 1797 images on board."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from ckptflip.errors import UsageError
from ckptflip.training import digits_data

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ckptflip.training.pytorch import Data, TorchWorkload

PRECISIONS = ("fp32", "fp64", "fp16", "bf16")


def cnn(precision: str = "fp32") -> TorchWorkload:
    """``digits-cnn``: two convolutions, dropout, two dense layers; SGD with momentum, step schedule.

    About 98 % after 15 epochs; an epoch takes less than 0.1 s on one core (fp16: about 1 s, for CPUs have
    no fast convolutions of it).

    Args:
        precision: one of `PRECISIONS`: of weights, optimizer and steps; the loss is computed in float32 at
            least. Another than fp32 is another workload: its checkpoints cannot be taken up here.

    Raises:
        UsageError: no such precision.

    Example:
        >>> cnn(precision="bf16").name
        'digits-cnn[precision=bf16]'
    """
    name = named("digits-cnn", precision)
    workload = _torch_workload()
    import torch

    stored = {"fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}.get(
        precision, torch.float32
    )
    return workload(
        name,
        model=lambda: _cnn_model().to(stored),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5),
        loss=_cross_entropy,
        data=lambda: _stored_as(stored),
        batch_size=64,
    )


def mlp() -> TorchWorkload:
    """``digits-mlp``: two dense layers, Adam; about 96 % after 15 epochs."""
    workload = _torch_workload()
    import torch

    return workload(
        "digits-mlp",
        model=_mlp_model,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
        loss=torch.nn.CrossEntropyLoss(),
        data=images,
        batch_size=64,
    )


def images(extra: str = "torch") -> Data:
    """The digits, split 80:20 by class; the split is the same for every seed.

    Args:
        extra: the extra that brings scikit-learn, for the message where it is missing.

    Returns:
        ``((inputs, targets), (test inputs, test targets))``: float32[n, 1, 8, 8] in 0 to 1, int64[n].
    """
    pixels, targets = digits_data.digits(extra)
    inputs = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train, test = digits_data.split()
    return (inputs[train], targets[train]), (inputs[test], targets[test])


def named(name: str, precision: str) -> str:
    """What a digits workload of a precision is called.

    Raises:
        UsageError: no such precision.

    Example:
        >>> named("digits-cnn", "fp32"), named("digits-cnn", "fp64")
        ('digits-cnn', 'digits-cnn[precision=fp64]')
    """
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(str(precision), PRECISIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"a precision is one of {', '.join(PRECISIONS)}, not {precision!r}{hint}")
    return name if precision == "fp32" else f"{name}[precision={precision}]"


def _torch_workload() -> type[TorchWorkload]:
    """Imported late: the Keras twins want the images alone. It says which extra brings PyTorch."""
    from ckptflip.training.pytorch import TorchWorkload

    return TorchWorkload


def _stored_as(dtype: torch.dtype) -> Data:
    """The digits with pixels of this dtype: sixteenths are exact in all of them."""
    import torch

    (x, y), (x_test, y_test) = images()
    return (torch.from_numpy(x).to(dtype), y), (torch.from_numpy(x_test).to(dtype), y_test)


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float32 at least: exponentials of moderate logits overflow in float16."""
    import torch

    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    return torch.nn.functional.cross_entropy(wide, targets)


def _cnn_model() -> nn.Module:
    from torch import nn

    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 16, 3, padding=1), relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3, padding=1), relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2), flatten=nn.Flatten(), dropout1=nn.Dropout(0.25),
        fc1=nn.Linear(512, 64), relu3=nn.ReLU(), dropout2=nn.Dropout(0.25),
        fc2=nn.Linear(64, 10),
    ))  # fmt: skip


def _mlp_model() -> nn.Module:
    from torch import nn

    return nn.Sequential(OrderedDict(
        flatten=nn.Flatten(), fc1=nn.Linear(64, 64), relu=nn.ReLU(), fc2=nn.Linear(64, 10)
    ))  # fmt: skip
