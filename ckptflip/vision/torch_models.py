"""The vision models in PyTorch; `keras_models` holds their twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptflip.errors import MissingExtraError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The vision models in PyTorch") from error

from ckptflip.vision import architectures
from ckptflip.vision.architectures import INPUT, NORM_EPSILON, NORM_UPDATE, Layer


def alexnet(classes: int = 10, channels: int = 3, width: float = 1, dropout: float = 0.5) -> Network:
    """AlexNet for 32x32 images, freshly initialised; see `architectures.alexnet`."""
    return Network(architectures.alexnet(classes, channels, width, dropout))


def vgg16(classes: int = 10, channels: int = 3, width: float = 1, batch_norm: bool = True) -> Network:
    """VGG16 for 32x32 images, freshly initialised; see `architectures.vgg16`."""
    return Network(architectures.vgg16(classes, channels, width, batch_norm))


def resnet18(classes: int = 10, channels: int = 3, width: float = 1) -> Network:
    """ResNet18 for 32x32 images, freshly initialised; see `architectures.resnet18`.

    Example:
        >>> sum(parameter.numel() for parameter in resnet18().parameters())
        11173962
    """
    return Network(architectures.resnet18(classes, channels, width))


def resnet50(classes: int = 10, channels: int = 3, width: float = 1) -> Network:
    """ResNet50 for 32x32 images, freshly initialised; see `architectures.resnet50`."""
    return Network(architectures.resnet50(classes, channels, width))


class Network(nn.Module):  # type: ignore[misc]
    """A model made from a description. Every layer is a submodule under its name, so hooks can reach it.

    Args:
        layers: in an order in which each comes after its inputs; the last one is the output.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        for layer in self.layers:
            _place(self, layer.name.split("."), _module(layer))
        last_use = {name: layer.name for layer in self.layers for name in layer.inputs}
        self._done = {
            layer.name: [name for name in set(layer.inputs) if last_use[name] == layer.name]
            for layer in self.layers
        }

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images.

        Args:
            images: float[n, channels, 32, 32].

        Returns:
            float[n, classes].
        """
        values = {INPUT: images}
        for layer in self.layers:
            module = self.get_submodule(layer.name)
            values[layer.name] = module(*(values[name] for name in layer.inputs))
            # What no later layer takes need not live on.
            for name in self._done[layer.name]:
                del values[name]
        return values[self.layers[-1].name]


class Add(nn.Module):  # type: ignore[misc]
    """The sum of two tensors, as a module so that hooks can see it."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Their sum."""
        return left + right


class Mean(nn.Module):  # type: ignore[misc]
    """The mean over height and width: float[n, c, h, w] to float[n, c].

    A plain mean, because adaptive pooling has no deterministic backward pass on CUDA.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The mean of each channel."""
        return images.mean(dim=(2, 3))


def _place(root: nn.Module, path: list[str], module: nn.Module) -> None:
    for part in path[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(path[-1], module)


def _module(layer: Layer) -> nn.Module:
    made: Any
    match layer:
        case architectures.Conv():
            made = nn.Conv2d(
                layer.channels, layer.filters, layer.kernel, layer.stride, layer.padding, bias=layer.bias
            )
            # As keras_models sets it up: He et al. 2015 by the outputs, biases 0.
            nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias:
                nn.init.zeros_(made.bias)
        case architectures.Norm():
            made = nn.BatchNorm2d(layer.channels, eps=NORM_EPSILON, momentum=NORM_UPDATE)
        case architectures.Dense():
            made = nn.Linear(layer.features, layer.units)
            limit = (3 * architectures.dense_scale(layer.hidden) / layer.features) ** 0.5
            nn.init.uniform_(made.weight, -limit, limit)
            nn.init.zeros_(made.bias)
        case architectures.Dropout():
            made = nn.Dropout(layer.rate)
        case architectures.Relu():
            made = nn.ReLU()
        case architectures.MaxPool():
            made = nn.MaxPool2d(2)
        case architectures.Mean():
            made = Mean()
        case architectures.Flatten():
            made = nn.Flatten()
        case architectures.Add():
            made = Add()
        case _:
            raise TypeError(f"no module stands for {layer}")
    return made
