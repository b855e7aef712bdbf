"""Resumable recipes of the vision models in both frameworks, built in by names such as ``resnet18-keras``.

Every function takes the fields of `recipes.Options` as keywords. SGD with momentum 0.9; no weight
decay, for it means different things in the two; the learning rate falls to a tenth after epochs 60 and 80.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptflip.errors import UsageError
from ckptflip.training.checks import check_options
from ckptflip.vision.recipes import CHANNELS, MILESTONES, MOMENTUM, Options, Recipe

if TYPE_CHECKING:
    import torch

    from ckptflip.training import keras as with_keras
    from ckptflip.training.pytorch import Augment, Data, TorchWorkload

# A gradient scaler's usual 65536 overflows in the first steps of these models, which are then skipped.
_FIRST_SCALE = 4096.0
_TEST_BATCH = 256
# What Keras calls a precision.
_POLICIES = {
    "fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16",
    "mixed-fp16": "mixed_float16", "mixed-bf16": "mixed_bfloat16",
}  # fmt: skip


def resnet18(**options: Any) -> TorchWorkload:
    """``resnet18`` in PyTorch.

    Args:
        options: fields of `recipes.Options`, and `device` and `threads` of `TorchWorkload`.

    Example:
        >>> resnet18(precision="bf16", width=0.25).name
        'resnet18[data=digits,precision=bf16,width=0.25]'
    """
    return _torch("resnet18", **options)


def resnet50(**options: Any) -> TorchWorkload:
    """``resnet50`` in PyTorch; see `resnet18`."""
    return _torch("resnet50", **options)


def vgg16(**options: Any) -> TorchWorkload:
    """``vgg16`` in PyTorch, with batch normalisation; see `resnet18`."""
    return _torch("vgg16", **options)


def alexnet(**options: Any) -> TorchWorkload:
    """``alexnet`` in PyTorch; see `resnet18`."""
    return _torch("alexnet", **options)


def resnet18_keras(**options: Any) -> with_keras.KerasWorkload:
    """``resnet18`` in Keras; its twin's layers, data, crops, order of samples and learning rates.

    Args:
        options: fields of `recipes.Options`, and `threads` of `KerasWorkload`.
    """
    return _keras("resnet18", **options)


def resnet50_keras(**options: Any) -> with_keras.KerasWorkload:
    """``resnet50`` in Keras; see `resnet18_keras`."""
    return _keras("resnet50", **options)


def vgg16_keras(**options: Any) -> with_keras.KerasWorkload:
    """``vgg16`` in Keras, with batch normalisation; see `resnet18_keras`."""
    return _keras("vgg16", **options)


def alexnet_keras(**options: Any) -> with_keras.KerasWorkload:
    """``alexnet`` in Keras; see `resnet18_keras`."""
    return _keras("alexnet", **options)


def _recipe(architecture: str, options: dict[str, Any], others: Sequence[str], suffix: str = "") -> Recipe:
    """A recipe of checked options; the workload takes `others` besides."""
    taken = [*(field.name for field in dataclasses.fields(Options)), *others]
    check_options(f"{architecture}{suffix}", options, taken)
    return Recipe(architecture, Options(**options), suffix)


def _torch(architecture: str, *, device: str = "cpu", threads: int = 1, **options: Any) -> TorchWorkload:
    made = _recipe(architecture, options, ("device", "threads"))
    import torch

    from ckptflip.training.pytorch import TorchWorkload  # first: it says which extra brings PyTorch
    from ckptflip.vision import torch_models

    stored, casting = _dtypes(made.options.precision)
    build = getattr(torch_models, architecture)
    scaled = made.options.precision == "mixed-fp16"
    return TorchWorkload(
        made.name,
        model=lambda: build(made.classes, CHANNELS, made.options.width).to(stored),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=made.rate, momentum=MOMENTUM),
        loss=_cross_entropy,
        data=lambda: _tensors(made, stored),
        batch_size=made.options.batch_size,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES, 0.1),
        scaler=(lambda: torch.amp.GradScaler(device, init_scale=_FIRST_SCALE)) if scaled else None,
        augment=_augment(made) if made.options.augment else None,
        autocast=casting,
        device=device,
        threads=threads,
        test_batch=_TEST_BATCH,
    )


def _dtypes(precision: str) -> tuple[torch.dtype, torch.dtype | None]:
    """How weights are stored, and what steps are cast to."""
    import torch

    stored = {"fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
    casting = {"mixed-fp16": torch.float16, "mixed-bf16": torch.bfloat16}
    return stored.get(precision, torch.float32), casting.get(precision)


def _tensors(made: Recipe, stored: torch.dtype) -> Data:
    import torch

    (x, y), (x_test, y_test) = made.images
    return (
        (torch.from_numpy(x).to(stored), torch.from_numpy(y)),
        (torch.from_numpy(x_test).to(stored), torch.from_numpy(y_test)),
    )


def _augment(made: Recipe) -> Augment:
    from ckptflip.vision.augment import apply_torch

    return lambda images, seed, epoch, indices: apply_torch(images, made.draws(seed, epoch, indices))


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """In float32 at least: the exponentials of half a dozen logits overflow in float16."""
    import torch

    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    return torch.nn.functional.cross_entropy(wide, targets)


def _keras(architecture: str, *, threads: int = 1, **options: Any) -> with_keras.KerasWorkload:
    made = _recipe(architecture, options, ("threads",), "-keras")
    from ckptflip.training.keras import KerasWorkload  # first: it chooses Keras' backend
    from ckptflip.training.keras_settings import backend
    from ckptflip.vision import augment, keras_models

    if made.options.precision == "fp64" and backend() != "tensorflow":
        raise UsageError(
            f"on its {backend()} backend Keras computes in float32, whatever a layer's dtype: for fp64 set "
            f"KERAS_BACKEND=tensorflow, or use the workload {architecture}"
        )
    build = getattr(keras_models, architecture)

    def model() -> Any:
        policy = _POLICIES[made.options.precision]
        found = build(made.classes, CHANNELS, made.options.width, dtype=policy)
        _compile(found, made)
        return found

    def changed(images: Any, seed: int, epoch: int, indices: Any) -> Any:
        return augment.apply(images, made.draws(seed, epoch, indices), channels_last=True)

    return KerasWorkload(
        made.name,
        model=model,
        data=lambda: _channels_last(made),
        batch_size=made.options.batch_size,
        augment=changed if made.options.augment else None,
        test_batch=_TEST_BATCH,
        threads=threads,
    )


def _compile(model: Any, made: Recipe) -> None:
    import keras

    steps = -(-len(made.images[0][0]) // made.options.batch_size)
    # A boundary is the last step at the rate before it.
    rates = keras.optimizers.schedules.PiecewiseConstantDecay(
        [epoch * steps - 1 for epoch in MILESTONES], [made.rate, made.rate / 10, made.rate / 100]
    )
    wide = "float64" if made.options.precision == "fp64" else "float32"
    optimizer: Any = keras.optimizers.SGD(rates, momentum=MOMENTUM)
    if made.options.precision == "mixed-fp16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=_FIRST_SCALE)
    # Logits of float16 or bfloat16 are widened by the loss.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=wide)
    model.compile(optimizer, loss, jit_compile=False)


def _channels_last(made: Recipe) -> with_keras.Data:
    wide = np.float64 if made.options.precision == "fp64" else np.float32
    (x, y), (x_test, y_test) = (
        (np.ascontiguousarray(pixels.transpose(0, 2, 3, 1), wide), labels.astype(np.int32))
        for pixels, labels in made.images
    )
    return (x, y), (x_test, y_test)
