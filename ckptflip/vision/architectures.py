"""AlexNet, VGG16, ResNet18 and ResNet50 for 32x32 images, each described once for every framework.

Sources: Krizhevsky et al. 2012 (AlexNet), Simonyan and Zisserman 2015 (VGG16, configuration D), He et al.
2016 (ResNets; the stride of a bottleneck sits on its 3x3 convolution, as in most code since), with the
changes that small images ask for: docs/vision.md states them. A layer's name is its module path in PyTorch,
and its name in Keras with hyphens for dots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ckptflip.errors import UsageError

INPUT = "input"
SIDE = 32
NORM_EPSILON = 1e-5
# How much of a batch's statistic enters the running one. Keras' `momentum` is what stays: 1 - this.
NORM_UPDATE = 0.1


def dense_scale(hidden: bool) -> float:
    """Variance of a dense layer's first weights, times its inputs: He et al. 2015 before a ReLU, else 1/3."""
    return 2.0 if hidden else 1 / 3


@dataclass(frozen=True, slots=True)
class Layer:
    """What every layer has: its name, and the names of the layers whose outputs it takes."""

    name: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conv(Layer):
    """A convolution with square kernels; `padding` zeros are put on each of the four sides."""

    channels: int
    filters: int
    kernel: int
    stride: int
    padding: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Norm(Layer):
    """Batch normalisation over the channels, with scale, shift and running statistics."""

    channels: int


@dataclass(frozen=True, slots=True)
class Relu(Layer):
    """max(0, x)."""


@dataclass(frozen=True, slots=True)
class MaxPool(Layer):
    """The maximum over 2x2 squares, side by side."""


@dataclass(frozen=True, slots=True)
class Mean(Layer):
    """The mean of each channel over the whole image."""


@dataclass(frozen=True, slots=True)
class Flatten(Layer):
    """The image as a vector: channel by channel, each row by row, in every framework."""


@dataclass(frozen=True, slots=True)
class Dropout(Layer):
    """Zeroes values with probability `rate` while training."""

    rate: float


@dataclass(frozen=True, slots=True)
class Dense(Layer):
    """A fully connected layer with bias. The last one is not `hidden` and begins with smaller weights."""

    features: int
    units: int
    hidden: bool


@dataclass(frozen=True, slots=True)
class Add(Layer):
    """The sum of two layers."""


class _Chain:
    """Collects layers; each takes the last one unless told otherwise."""

    def __init__(self, channels: int) -> None:
        self.layers: list[Layer] = []
        self.last = INPUT
        self.channels = channels

    def add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self.last = layer.name

    def conv(
        self,
        name: str,
        filters: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        bias: bool,
        source: str | None = None,
    ) -> None:
        inputs = (source or self.last,)
        self.add(Conv(name, inputs, self.channels, filters, kernel, stride, kernel // 2, bias))
        self.channels = filters

    def norm(self, name: str) -> None:
        self.add(Norm(name, (self.last,), self.channels))

    def relu(self, name: str) -> None:
        self.add(Relu(name, (self.last,)))

    def pool(self, name: str) -> None:
        self.add(MaxPool(name, (self.last,)))


def alexnet(
    classes: int = 10, channels: int = 3, width: float = 1, dropout: float = 0.5
) -> tuple[Layer, ...]:
    """AlexNet for 32x32 images: five convolutions, three dense layers, no normalisation.

    Args:
        classes: outputs.
        channels: of the images.
        width: what the channels and units of all hidden layers are multiplied with.
        dropout: rate before the first two dense layers.

    Example:
        >>> [layer.name for layer in alexnet() if isinstance(layer, (Conv, Dense))]
        ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc1', 'fc2', 'fc3']
    """
    chain = _begun(classes, channels, width)
    for number, (filters, stride, pooled) in enumerate(
        [(64, 2, True), (192, 1, True), (384, 1, False), (256, 1, False), (256, 1, True)], start=1
    ):
        chain.conv(f"conv{number}", _scaled(filters, width), stride=stride, bias=True)
        chain.relu(f"relu{number}")
        if pooled:
            chain.pool(f"pool{number}")
    chain.add(Flatten("flatten", (chain.last,)))
    # Stride 2 and three poolings leave 2x2 of the 32x32 pixels.
    features, units = chain.channels * 4, _scaled(4096, width)
    for number in (1, 2):
        if dropout:
            chain.add(Dropout(f"dropout{number}", (chain.last,), dropout))
        chain.add(Dense(f"fc{number}", (chain.last,), features, units, hidden=True))
        chain.relu(f"relu{number + 5}")
        features = units
    chain.add(Dense("fc3", (chain.last,), features, classes, hidden=False))
    return tuple(chain.layers)


def vgg16(
    classes: int = 10, channels: int = 3, width: float = 1, batch_norm: bool = True
) -> tuple[Layer, ...]:
    """VGG16 for 32x32 images: thirteen convolutions, one dense layer on the last 1x1 image.

    Args:
        classes: outputs.
        channels: of the images.
        width: what the channels of all hidden layers are multiplied with.
        batch_norm: normalise after every convolution.
    """
    chain = _begun(classes, channels, width)
    for block, (filters, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
        for number in range(1, count + 1):
            chain.conv(f"conv{block}_{number}", _scaled(filters, width), bias=True)
            if batch_norm:
                chain.norm(f"bn{block}_{number}")
            chain.relu(f"relu{block}_{number}")
        chain.pool(f"pool{block}")
    chain.add(Flatten("flatten", (chain.last,)))
    chain.add(Dense("fc", (chain.last,), chain.channels, classes, hidden=False))
    return tuple(chain.layers)


def resnet18(classes: int = 10, channels: int = 3, width: float = 1) -> tuple[Layer, ...]:
    """ResNet18 for 32x32 images: 3x3 stem, no first pooling, two basic blocks per stage.

    Args:
        classes: outputs.
        channels: of the images.
        width: what the channels of all hidden layers are multiplied with.

    Example:
        >>> [layer.name for layer in resnet18()][:6]
        ['conv1', 'bn1', 'relu1', 'layer1.0.conv1', 'layer1.0.bn1', 'layer1.0.relu1']
    """
    return _resnet(classes, channels, width, (2, 2, 2, 2), _basic)


def resnet50(classes: int = 10, channels: int = 3, width: float = 1) -> tuple[Layer, ...]:
    """ResNet50 for 32x32 images: as `resnet18`, with 3, 4, 6 and 3 bottleneck blocks per stage."""
    return _resnet(classes, channels, width, (3, 4, 6, 3), _bottleneck)


ARCHITECTURES: dict[str, Callable[..., tuple[Layer, ...]]] = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet50": resnet50,
}

_Block = Callable[[_Chain, str, int, int], None]


def _resnet(
    classes: int, channels: int, width: float, blocks: Sequence[int], block: _Block
) -> tuple[Layer, ...]:
    chain = _begun(classes, channels, width)
    chain.conv("conv1", _scaled(64, width), bias=False)
    chain.norm("bn1")
    chain.relu("relu1")
    for stage, count in enumerate(blocks, start=1):
        for number in range(count):
            stride = 2 if stage > 1 and number == 0 else 1
            block(chain, f"layer{stage}.{number}", _scaled(64 * 2 ** (stage - 1), width), stride)
    chain.add(Mean("mean", (chain.last,)))
    chain.add(Dense("fc", (chain.last,), chain.channels, classes, hidden=False))
    return tuple(chain.layers)


def _basic(chain: _Chain, path: str, filters: int, stride: int) -> None:
    source, channels = chain.last, chain.channels
    chain.conv(f"{path}.conv1", filters, 3, stride, bias=False)
    chain.norm(f"{path}.bn1")
    chain.relu(f"{path}.relu1")
    chain.conv(f"{path}.conv2", filters, bias=False)
    chain.norm(f"{path}.bn2")
    _joined(chain, path, source, channels, stride, "relu2")


def _bottleneck(chain: _Chain, path: str, filters: int, stride: int) -> None:
    source, channels = chain.last, chain.channels
    for number, (kernel, wide, step) in enumerate([(1, 1, 1), (3, 1, stride), (1, 4, 1)], start=1):
        chain.conv(f"{path}.conv{number}", filters * wide, kernel, step, bias=False)
        chain.norm(f"{path}.bn{number}")
        if number < 3:
            chain.relu(f"{path}.relu{number}")
    _joined(chain, path, source, channels, stride, "relu3")


def _joined(chain: _Chain, path: str, source: str, channels: int, stride: int, relu: str) -> None:
    """Add the block's input, through a 1x1 convolution where its form changed."""
    main, filters = chain.last, chain.channels
    if stride != 1 or channels != filters:
        chain.channels = channels
        chain.conv(f"{path}.downsample.0", filters, 1, stride, bias=False, source=source)
        chain.norm(f"{path}.downsample.1")
        source = chain.last
    chain.add(Add(f"{path}.add", (main, source)))
    chain.relu(f"{path}.{relu}")


def _begun(classes: int, channels: int, width: float) -> _Chain:
    if classes < 1 or channels < 1:
        raise UsageError(f"classes ({classes}) and channels ({channels}) must be 1 or more")
    if not 0 < width <= 16:
        raise UsageError(f"width is more than 0 and at most 16, 1 for the full model; not {width}")
    return _Chain(channels)


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))
