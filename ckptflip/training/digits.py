"""Built-in workloads on scikit-learn's handwritten digits: 8x8 pixels, ten classes, 1797 images on board."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from ckptflip.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import nn

    from ckptflip.training.pytorch import Data, TorchWorkload


def cnn() -> TorchWorkload:
    """``digits-cnn``: two convolutions, dropout, two dense layers; SGD with momentum, step schedule.

    About 98 % after 15 epochs; an epoch takes less than 0.1 s on one core.
    """
    workload = _torch_workload()
    import torch

    return workload(
        "digits-cnn",
        model=_cnn_model,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5),
        loss=torch.nn.CrossEntropyLoss(),
        data=images,
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
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError("scikit-learn", extra, "The digits workloads") from error
    pixels, targets = load_digits(return_X_y=True)
    inputs = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    x, x_test, y, y_test = train_test_split(inputs, targets, test_size=0.2, stratify=targets, random_state=0)
    return (x, y), (x_test, y_test)


def _torch_workload() -> type[TorchWorkload]:
    """Imported late: the Keras twins want the images alone. It says which extra brings PyTorch."""
    from ckptflip.training.pytorch import TorchWorkload

    return TorchWorkload


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
