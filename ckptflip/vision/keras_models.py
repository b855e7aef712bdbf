"""The vision models in Keras 3, on any of its backends; `torch_models` holds their twins.

Images are channels last. Where PyTorch's padding is symmetric and Keras' is not (stride 2), the zeros are
put there by a layer of their own, ``<name>-pad``; before a flattening layer, ``<name>-order`` turns the image
so that its flattened order is PyTorch's. A dot in a layer's name is a hyphen here (`weights.keras_name`):
Keras' torch backend takes no dots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptflip.errors import MissingExtraError
from ckptflip.vision import architectures
from ckptflip.vision.architectures import INPUT, NORM_EPSILON, NORM_UPDATE, SIDE, Layer
from ckptflip.vision.weights import keras_name

if TYPE_CHECKING:
    import keras

_LAST = "channels_last"


def alexnet(
    classes: int = 10, channels: int = 3, width: float = 1, dropout: float = 0.5, dtype: str = "float32"
) -> keras.Model:
    """AlexNet for 32x32 images, freshly initialised; see `architectures.alexnet` and `network`."""
    return network(architectures.alexnet(classes, channels, width, dropout), channels, dtype)


def vgg16(
    classes: int = 10, channels: int = 3, width: float = 1, batch_norm: bool = True, dtype: str = "float32"
) -> keras.Model:
    """VGG16 for 32x32 images, freshly initialised; see `architectures.vgg16` and `network`."""
    return network(architectures.vgg16(classes, channels, width, batch_norm), channels, dtype)


def resnet18(classes: int = 10, channels: int = 3, width: float = 1, dtype: str = "float32") -> keras.Model:
    """ResNet18 for 32x32 images, freshly initialised; see `architectures.resnet18` and `network`."""
    return network(architectures.resnet18(classes, channels, width), channels, dtype)


def resnet50(classes: int = 10, channels: int = 3, width: float = 1, dtype: str = "float32") -> keras.Model:
    """ResNet50 for 32x32 images, freshly initialised; see `architectures.resnet50` and `network`."""
    return network(architectures.resnet50(classes, channels, width), channels, dtype)


def network(layers: Sequence[Layer], channels: int = 3, dtype: str = "float32") -> keras.Model:
    """A functional model made from a description; it takes float[n, 32, 32, channels] and gives logits.

    Args:
        layers: in an order in which each comes after its inputs; the last one is the output.
        channels: of the images.
        dtype: Keras' name of the precision, such as ``float64`` or ``mixed_bfloat16``; every layer gets it.

    Raises:
        MissingExtraError: Keras is not installed.
    """
    try:
        import keras
    except ImportError as error:
        raise MissingExtraError("keras", "keras", "The vision models in Keras") from error
    policy = keras.dtype_policies.get(dtype)
    image = keras.Input((SIDE, SIDE, channels), name=INPUT, dtype=policy.compute_dtype)
    values: dict[str, Any] = {INPUT: image}
    for layer in layers:
        inputs = [values[name] for name in layer.inputs]
        values[layer.name] = _applied(keras.layers, layer, inputs, policy)
    return keras.Model(image, values[layers[-1].name])


def _applied(kinds: Any, layer: Layer, inputs: list[Any], policy: Any) -> Any:
    name = keras_name(layer.name)
    common = {"name": name, "dtype": policy}
    only = inputs[0]
    match layer:
        case architectures.Conv():
            return _conv(kinds, layer, only, common)
        case architectures.Norm():
            made = kinds.BatchNormalization(axis=-1, epsilon=NORM_EPSILON, momentum=1 - NORM_UPDATE, **common)
            return made(only)
        case architectures.Dense():
            return kinds.Dense(layer.units, kernel_initializer=_uniform(layer.hidden), **common)(only)
        case architectures.Dropout():
            return kinds.Dropout(layer.rate, **common)(only)
        case architectures.Relu():
            return kinds.ReLU(**common)(only)
        case architectures.MaxPool():
            return kinds.MaxPooling2D(2, data_format=_LAST, **common)(only)
        case architectures.Mean():
            return kinds.GlobalAveragePooling2D(data_format=_LAST, **common)(only)
        case architectures.Flatten():
            # Channels first, then row by row: the dense kernels after it are PyTorch's, transposed.
            turned = kinds.Permute((3, 1, 2), name=f"{name}-order", dtype=policy)(only)
            return kinds.Flatten(data_format=_LAST, **common)(turned)
        case architectures.Add():
            return kinds.Add(**common)(inputs)
        case _:
            raise TypeError(f"no Keras layer stands for {layer}")


def _conv(kinds: Any, layer: architectures.Conv, image: Any, common: dict[str, Any]) -> Any:
    # With stride 1 and an odd kernel "same" is symmetric; with stride 2 Keras would pad less on one side.
    same = layer.stride == 1
    if layer.padding and not same:
        image = kinds.ZeroPadding2D(
            layer.padding, data_format=_LAST, name=f"{common['name']}-pad", dtype=common["dtype"]
        )(image)
    made = kinds.Conv2D(
        layer.filters, layer.kernel, strides=layer.stride, padding="same" if same else "valid",
        use_bias=layer.bias, data_format=_LAST, kernel_initializer=_he(), **common,
    )  # fmt: skip
    return made(image)


def _he() -> Any:
    from keras.initializers import VarianceScaling

    return VarianceScaling(scale=2.0, mode="fan_out", distribution="untruncated_normal")


def _uniform(hidden: bool) -> Any:
    from keras.initializers import VarianceScaling

    return VarianceScaling(architectures.dense_scale(hidden), mode="fan_in", distribution="uniform")
